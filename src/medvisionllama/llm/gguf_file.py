"""The directory of a GGUF file: metadata, and where each tensor lies.

Unlike `gguf.GGUFReader` this reads no more than the directory, builds no array for each word of the vocabulary
(which takes seconds), and believes no length before it has checked it.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

from medvisionllama.llm.ranges import ByteSource, damaged, read_bytes

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PIECE = 1 << 20
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it is stored."""

    kind: int
    """The number of its quantisation."""
    shape: tuple[int, ...]
    """Row after row, as PyTorch counts."""
    start: int
    """First byte in the file."""


def read_directory(source: ByteSource) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Read metadata and the places of the tensors.

    Raises:
        BlockError: not a GGUF file, or one that ends in its directory.
    """
    cursor = _Cursor(source)
    if source.size < 24 or cursor.take(4) != b"GGUF":
        raise damaged(source, "it does not begin as a GGUF file does")
    version = cursor.number("I")
    if version not in {2, 3}:
        raise damaged(source, f"GGUF version {version}, known are 2 and 3")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        name = cursor.string()
        if name in metadata:
            raise damaged(source, f"{name!r:.60} is there twice")
        metadata[name] = cursor.value(cursor.number("I"))
    found = {}
    for _ in range(num_tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > 8 or name in found:
            raise damaged(source, f"tensor {name!r:.60} is there twice or has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        found[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise damaged(source, f"alignment {alignment}")
    first = math.ceil(cursor.place / alignment) * alignment
    return metadata, {
        name: GgufTensor(kind, shape, first + offset) for name, (shape, kind, offset) in found.items()
    }


class _Cursor:
    """Reads values one after the other, in pieces of a megabyte."""

    def __init__(self, source: ByteSource) -> None:
        self.place = 0
        self._source = source
        self._piece = b""
        self._start = 0

    def take(self, count: int) -> bytes:
        if self.place + count > self._source.size:
            raise damaged(self._source, f"its directory goes on beyond byte {self._source.size}")
        offset = self.place - self._start
        if offset + count > len(self._piece):
            self._start, offset = self.place, 0
            end = min(self.place + max(count, _PIECE), self._source.size)
            self._piece = read_bytes(self._source, self.place, end)
        self.place += count
        return self._piece[offset : offset + count]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        # Some vocabularies hold single bytes of a character.
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise damaged(self._source, f"metadata of unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            content = self.take(count * struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", content))
        if inner != _STRING:
            raise damaged(self._source, f"a list of type {inner}")
        # Eight bytes are the least that a string takes.
        if count > self._source.size // 8:
            raise damaged(self._source, f"a list of {count} strings")
        return [self.string() for _ in range(count)]
