"""What was fetched of a language model, in the user's cache: a few safetensors files and a manifest.

    layer-029.safetensors  norm.safetensors  rows.safetensors  tokenizer.json  config.json  manifest.json

The manifest has the SHA-256 of each file; it is verified whenever the file is used. Files are whole or absent.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medvisionllama._files import (
    atomic_path,
    file_sha256,
    locked,
    user_cache,
    write_bytes,
    write_json,
)
from medvisionllama.errors import BlockError
from medvisionllama.llm.ranges import LocalFile, read_tensor
from medvisionllama.llm.safetensors_file import safetensors_entries

NORM, ROWS, TOKENIZER, CONFIG, MANIFEST = (
    "norm.safetensors",
    "rows.safetensors",
    "tokenizer.json",
    "config.json",
    "manifest.json",
)
_LAYER = re.compile(r"layer-([0-9]{3,5})\.safetensors")


class BlockCache:
    """The kept pieces of one model."""

    def __init__(self, *folder: str) -> None:
        self.folder = user_cache().joinpath("blocks", *folder)

    def layers(self) -> tuple[int, ...]:
        """Positions of the layers that are kept."""
        found = (_LAYER.fullmatch(path.name) for path in self.folder.glob("layer-*.safetensors"))
        return tuple(sorted(int(match[1]) for match in found if match))

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def keep(self, file: str, content: Mapping[str, Tensor] | bytes) -> None:
        """Write a file, then its checksum; in between it has none, and is not called damaged."""
        path = self.folder / file
        if path.exists():
            self.note(
                sha256={name: value for name, value in self.noted("sha256", {}).items() if name != file}
            )
        if isinstance(content, bytes):
            write_bytes(path, content)
        else:
            with atomic_path(path) as temporary:
                mode = temporary.stat().st_mode
                save_file({name: value.contiguous() for name, value in content.items()}, temporary)
                temporary.chmod(mode)  # safetensors' own file is for its owner only
        self.note(sha256={**self.noted("sha256", {}), file: file_sha256(path)})

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        write_json(self.folder / MANIFEST, self._manifest() | facts)

    def noted(self, key: str, default: Any = None) -> Any:
        """Look up a fact in the manifest; one of another type than `default` counts as unknown."""
        value = self._manifest().get(key, default)
        return value if default is None or isinstance(value, type(default)) else default

    def tensors(self, file: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read a file of tensors, verified, converting one after the other.

        Raises:
            BlockError: the file is not what was kept.
        """
        path = self._verified(file)
        try:
            source = LocalFile(path)
            entries = safetensors_entries(source)
            return {name: _as(read_tensor(source, entry), dtype) for name, entry in entries.items()}
        except BlockError:
            raise self._changed(file) from None

    def content(self, file: str) -> bytes:
        """Read a file, verified."""
        return self._verified(file).read_bytes()

    def rows(self, token_ids: Sequence[int]) -> tuple[dict[int, Tensor], list[int]]:
        """Return the embeddings that are kept, and the tokens whose embeddings are not."""
        kept: dict[int, Tensor] = {}
        if self.has(ROWS):
            tensors = self.tensors(ROWS)
            kept = dict(zip(tensors["ids"].tolist(), tensors["rows"], strict=True))
        missing = sorted(set(token_ids) - set(kept))
        return kept, missing

    def keep_rows(self, kept: Mapping[int, Tensor]) -> None:
        """Keep embeddings by token, all at once."""
        ids = sorted(kept)
        self.keep(ROWS, {"ids": torch.tensor(ids), "rows": torch.stack([kept[token] for token in ids])})

    def forget(self, file: str) -> None:
        """Delete a file and its checksum."""
        (self.folder / file).unlink(missing_ok=True)
        if self.has(MANIFEST):
            self.note(sha256={k: v for k, v in self.noted("sha256", {}).items() if k != file})

    def clear(self) -> None:
        """Delete all that is kept of the model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.tidy()

    def tidy(self) -> None:
        """Delete folders in which nothing is kept, up to the cache itself."""
        folder, top = self.folder, user_cache()
        while folder != top:
            try:
                folder.rmdir()
            except OSError:
                if folder.exists():
                    return
            folder = folder.parent

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def _verified(self, file: str) -> Path:
        path = self.folder / file
        # A process that was killed may have left a file before its checksum was noted.
        expected = self.noted("sha256", {}).get(file)
        if expected and file_sha256(path) != expected:
            raise self._changed(file)
        return path

    def _changed(self, file: str) -> BlockError:
        return BlockError(
            f"{self.folder / file} is damaged: it is not what was kept there; delete {self.folder} and fetch the block again"
        )


def layer_file(position: int) -> str:
    return f"layer-{position:03d}.safetensors"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process fetch at a time, so that the others find what it has kept; on other machines too.

    A network disk shares the locks of files, and not those of folders.
    """
    lock = user_cache() / "blocks.lock"
    with locked(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype else tensor
