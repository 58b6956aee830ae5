"""Byte ranges of files, on disk or elsewhere, and the tensors that lie in them.

Every checkpoint format is read the same way: its directory says where a tensor lies, and exactly those bytes go
straight into the tensor's own memory. Nothing is memory-mapped, so bytes read and memory used can be counted.
"""

import io
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from medvisionllama.errors import BlockError

Range = tuple[int, int]
"""First byte, and the byte after the last."""


class ByteSource(Protocol):
    """A file of which any range can be read."""

    name: str
    """For messages: the path or the address."""
    advice: str
    """What to do if the file turns out to be damaged."""
    size: int

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on."""

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Learn which ranges will be read next; what lies elsewhere is brought here."""


class LocalFile:
    """A file on disk, open as long as this object lives."""

    advice = "download it again"

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            # Unbuffered: a buffer would read more than was asked for.
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise BlockError(f"{path} cannot be read ({error.strerror}); check the checkpoint") from None
        weakref.finalize(self, self._file.close)
        self.size = path.stat().st_size

    def read_into(self, buffer: memoryview, start: int) -> None:
        self._file.seek(start)
        done = 0
        while done < len(buffer):
            got = self._file.readinto(buffer[done:])
            if not got:
                raise damaged(self, f"it ends at byte {start + done}")
            done += got

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Already here."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    stride: tuple[int, ...] | None = None
    """In elements, if the tensor is not stored row after row."""


def read_bytes(source: ByteSource, start: int, end: int) -> bytes:
    """Read one range, which must lie inside the file."""
    if not 0 <= start <= end <= source.size:
        raise damaged(source, f"it has {source.size} bytes, bytes {start} to {end} are needed")
    buffer = bytearray(end - start)
    source.read_into(memoryview(buffer), start)
    return bytes(buffer)


def read_tensor(source: ByteSource, entry: Entry) -> Tensor:
    """Read one tensor, and no other byte."""
    if entry.stride is None:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        _fill(source, tensor, entry.start)
        return tensor
    flat = torch.empty((entry.end - entry.start) // entry.dtype.itemsize, dtype=entry.dtype)
    _fill(source, flat, entry.start)
    return flat.as_strided(entry.shape, entry.stride).contiguous()


def read_rows(source: ByteSource, entry: Entry, rows: Sequence[int]) -> Tensor:
    """Read some rows of a matrix `[row, column]`, and no other byte."""
    if entry.stride is not None or len(entry.shape) != 2:
        return read_tensor(source, entry)[torch.tensor(rows, dtype=torch.long)]
    tensor = torch.empty((len(rows), entry.shape[1]), dtype=entry.dtype)
    for place, (start, _) in zip(tensor, row_ranges(entry, rows), strict=True):
        _fill(source, place, start)
    return tensor


def row_ranges(entry: Entry, rows: Sequence[int]) -> list[Range]:
    """Where some rows of a matrix lie; the whole tensor if it is not stored row after row."""
    if entry.stride is not None or len(entry.shape) != 2:
        return [(entry.start, entry.end)]
    row_bytes = entry.shape[1] * entry.dtype.itemsize
    return [(entry.start + row * row_bytes, entry.start + (row + 1) * row_bytes) for row in rows]


def merged(ranges: Iterable[Range], *, gap: int = 0) -> list[Range]:
    """Join ranges that touch or overlap, or lie no more than `gap` bytes apart.

    >>> merged([(8, 12), (0, 4), (4, 6), (3, 3)])
    [(0, 6), (8, 12)]
    """
    result: list[Range] = []
    for start, end in sorted(item for item in ranges if item[0] < item[1]):
        if result and start <= result[-1][1] + gap:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def damaged(source: ByteSource, reason: object) -> BlockError:
    """Make the error for a file whose content contradicts itself."""
    return BlockError(
        f"{source.name} is damaged or truncated ({' '.join(str(reason).split())[:120]}); {source.advice}"
    )


class Seekable(io.RawIOBase):
    """A read-only file object over a `ByteSource`, for code that knows files only.

    It reads in pieces of a quarter of a megabyte and keeps the last few, since such code reads a few bytes here and
    a few there, and each read may be a request over the network.
    """

    _PIECE, _KEPT = 1 << 18, 4

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._place = 0
        self._pieces: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._source.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._source.size - self._place))
        if count > self._PIECE:
            self._source.read_into(view[:count], self._place)
        else:
            done = 0
            while done < count:
                number, offset = divmod(self._place + done, self._PIECE)
                part = self._piece(number)[offset : offset + count - done]
                view[done : done + len(part)] = part
                done += len(part)
        self._place += count
        return count

    def _piece(self, number: int) -> bytes:
        if number not in self._pieces:
            start = number * self._PIECE
            self._pieces[number] = read_bytes(
                self._source, start, min(start + self._PIECE, self._source.size)
            )
            if len(self._pieces) > self._KEPT:
                self._pieces.pop(next(iter(self._pieces)))
        return self._pieces[number]


def _fill(source: ByteSource, tensor: Tensor, start: int) -> None:
    if math.prod(tensor.shape):
        source.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, start)
