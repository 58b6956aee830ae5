"""The directory of a safetensors file, believed only after every entry is checked.

Unlike the `safetensors` package it needs no memory map and no local file, so a header can be read from a server.
The format: https://huggingface.co/docs/safetensors
"""

import json
import math
from typing import Any

import torch

from medvisionllama.errors import BlockError
from medvisionllama.llm.ranges import ByteSource, Entry, damaged, read_bytes

_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_entries(source: ByteSource) -> dict[str, Entry]:
    """Read where each tensor lies.

    Raises:
        BlockError: a header that is not one, or that contradicts itself or the size of the file.
    """
    if source.size < 8:
        raise damaged(source, f"it has {source.size} bytes")
    start = read_bytes(source, 0, 8)
    if start == b"version ":
        raise BlockError(
            f"{source.name} is a pointer of git-lfs, not the file itself; run `git lfs pull` there"
        )
    length = int.from_bytes(start, "little")
    if length > min(_MAX_HEADER, source.size - 8):
        raise damaged(source, f"its header would be {length} bytes long, the file has {source.size}")
    header = _header(source, read_bytes(source, 8, 8 + length))
    header.pop("__metadata__", None)
    first = 8 + length
    entries = {name: _entry(source, name, value, first) for name, value in header.items()}
    end = first
    # The format leaves no gap and no overlap: tensors lie end to end, up to the end of the file.
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise damaged(
                source, f"tensor {name!r:.60} begins at byte {entry.start}, the one before ends at {end}"
            )
        end = entry.end
    if end != source.size:
        raise damaged(source, f"its header describes {end} bytes, the file has {source.size}")
    return entries


def _header(source: ByteSource, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(source, f"its header is not readable: {error}") from None
    if not isinstance(header, dict):
        raise damaged(source, "its header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r:.60} is there twice")
    return result


def _entry(source: ByteSource, name: str, value: Any, first: int) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise damaged(source, f"tensor {name!r:.60} lacks dtype, shape or offsets") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BlockError(
            f"{source.name}: tensor {name!r:.60} has dtype {str(dtype)[:20]!r}; known are {', '.join(_DTYPES)}: use an unquantised checkpoint"
        )
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    # bool is an int in Python, and no number of elements.
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise damaged(source, f"tensor {name!r:.60} has an impossible shape or place")
    if len(shape) > _MAX_DIMENSIONS or end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise damaged(
            source, f"tensor {name!r:.60} of shape {str(shape)[:60]} does not fill bytes {start} to {end}"
        )
    if first + end > source.size:
        raise damaged(
            source, f"tensor {name!r:.60} ends at byte {first + end}, the file has {source.size} bytes"
        )
    return Entry(_DTYPES[dtype], tuple(shape), first + start, first + end)
