"""Checkpoints on this machine: a folder, or one file of weights with its config.json beside it."""

from collections.abc import Iterator
from pathlib import Path

from medvisionllama.errors import BlockError
from medvisionllama.llm.ranges import ByteSource, LocalFile
from medvisionllama.llm.reader import CheckpointReader

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class FolderPlace:
    """A folder; `file` restricts the weights to one file of it."""

    advice = "download it again"

    def __init__(self, folder: Path, *, file: str | None = None) -> None:
        self.folder = folder
        self.name = str(folder)
        self._file = file

    def weight_files(self) -> Iterator[tuple[str, ...]]:
        if self._file:
            yield (self._file,)
            return
        yield ("model.safetensors.index.json",)
        yield ("model.safetensors",)
        loose = self._matching("*.safetensors")
        if loose:
            yield loose
        yield ("pytorch_model.bin.index.json",)
        yield ("pytorch_model.bin",)
        consolidated = self._matching("consolidated.*.pth")
        if len(consolidated) > 1:
            raise BlockError(
                f"{self.folder} holds a model cut into {len(consolidated)} parts for as many GPUs ({consolidated[0]}, …); use the checkpoint in Hugging Face's format"
            )
        yield from ((name,) for name in consolidated)

    def open(self, file: str) -> ByteSource | None:
        path = self.folder / file
        return LocalFile(path) if path.is_file() else None

    def content(self, file: str) -> bytes | None:
        try:
            return (self.folder / file).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BlockError(
                f"{self.folder / file} cannot be read ({error.strerror}); check its permissions"
            ) from None

    def _matching(self, pattern: str) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self.folder.glob(pattern)))


def folder_source(path: Path) -> CheckpointReader:
    """Open a checkpoint's folder, or one file of it.

    Raises:
        BlockError: no checkpoint there.
    """
    if path.is_dir():
        return CheckpointReader(FolderPlace(path), name=path.resolve().name)
    if path.suffix not in _SUFFIXES:
        raise BlockError(
            f"{path} is not a checkpoint; give a folder, or a file that ends in .gguf, {', '.join(_SUFFIXES)}"
        )
    return CheckpointReader(FolderPlace(path.parent, file=path.name), name=path.name)
