"""The directory of a PyTorch checkpoint (.bin, .pth), without ever running what a pickle asks for.

Such a file is an archive of arrays and one pickle that refers to them. The pickle is read by `torch.load` with
`weights_only=True`, which knows tensors and plain containers and refuses all else. It gets the pickle in an archive
whose arrays are empty, inside PyTorch's fake-tensor mode, which notes where each array would lie: so no array is
read, and not even the small header before each. Files from before PyTorch 1.6 are one stream and are read whole.
"""

import io
import lzma
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medvisionllama.errors import BlockError
from medvisionllama.llm.ranges import ByteSource, Entry, Seekable, damaged, read_bytes

_MAX_PICKLE = 256_000_000
_MAX_WORD = 64
_LOCAL_HEADER = 30
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "state = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "state = state.get('state_dict', state); "
    "save_file({name: value.clone().contiguous() for name, value in state.items()}, sys.argv[2])"
)
# What a file that is not a checkpoint makes PyTorch's reader raise.
_UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
    AssertionError,
    MemoryError,
    ImportError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def pickle_entries(source: ByteSource) -> dict[str, Entry | Tensor]:
    """Read where each tensor lies; the tensors themselves from a file that cannot be read in parts.

    Raises:
        BlockError: not a PyTorch checkpoint, or one that wants to run code.
    """
    if source.size < 4:
        raise damaged(source, f"it has {source.size} bytes")
    if read_bytes(source, 0, 4) != b"PK\x03\x04":
        return _whole(source)
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with zipfile.ZipFile(Seekable(source)) as archive:
            outline, arrays = _outline(source, archive)
    except (*_UNREADABLE, OSError) as error:
        if isinstance(error, BlockError):
            raise
        raise damaged(source, f"not a PyTorch checkpoint: {error}") from None
    with FakeTensorMode():
        state = _load(source, outline)
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized:
            raise BlockError(f"{source.name}: {name} is not a plain tensor; use an unquantised checkpoint")
    if any(not hasattr(value.untyped_storage(), "_checkpoint_offset") for value in state.values()):
        return _whole(source)  # PyTorch before 2.7 does not note the places
    return {name: _entry(source, name, value, arrays) for name, value in state.items()}


def conversion(name: str) -> str:
    """Write the command that turns a pickle, which it runs, into safetensors."""
    file = name.rpartition("/")[2]
    return f'python -c "{_CONVERT}" {file} {file.rpartition(".")[0]}.safetensors'


@dataclass(frozen=True)
class _Array:
    """A file of the archive."""

    start: int
    """Where its header lies."""
    end: int
    """Where the next header lies."""
    member: zipfile.ZipInfo


def _whole(source: ByteSource) -> dict[str, Entry | Tensor]:
    source.prefetch([(0, source.size)])
    return dict(_load(source, Seekable(source)))


def _outline(source: ByteSource, archive: zipfile.ZipFile) -> tuple[io.BytesIO, dict[int, _Array]]:
    """Copy an archive without the content of its arrays; arrays by the place of their content in the copy."""
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    starts = [member.header_offset for member in members] + [archive.start_dir]
    content = next((member for member in members if member.filename.endswith("data.pkl")), None)
    if content is None:
        raise damaged(source, "an archive without data.pkl")
    if content.file_size > min(_MAX_PICKLE, source.size):
        raise damaged(source, f"its pickle would be {content.file_size} bytes long")
    folder = content.filename.removesuffix("data.pkl")
    outline, copied = io.BytesIO(), {}
    with zipfile.ZipFile(outline, "w") as copy:
        for number, member in enumerate(members):
            inner = member.filename.removeprefix(folder)
            if inner in {"version", "byteorder"} and member.file_size > _MAX_WORD:
                raise damaged(source, f"{inner} would be {member.file_size} bytes long")
            if inner in {"data.pkl", "version", "byteorder"}:
                copy.writestr(member.filename, archive.read(member))
            elif inner.startswith("data/"):
                copied[member.filename] = _Array(starts[number], starts[number + 1], member)
                copy.writestr(member.filename, b"")
        places = {
            member.header_offset + _LOCAL_HEADER + len(member.filename.encode()): copied[member.filename]
            for member in copy.infolist()
            if member.filename in copied
        }
    outline.seek(0)
    return outline, places


def _load(source: ByteSource, file: io.IOBase) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except pickle.UnpicklingError:
        raise BlockError(
            f"{source.name} is a pickle that holds more than tensors, so it was not opened; if you trust it, convert it: {conversion(source.name)}"
        ) from None
    except _UNREADABLE as error:
        if isinstance(error, BlockError):
            raise
        raise damaged(source, f"not a PyTorch checkpoint: {error}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(value, Tensor) and isinstance(name, str)}
    if not tensors:
        raise damaged(source, "it holds no named tensors")
    return tensors


def _entry(source: ByteSource, name: str, value: Tensor, arrays: dict[int, _Array]) -> Entry:
    offset = value.untyped_storage()._checkpoint_offset
    if offset not in arrays:
        raise damaged(source, f"the array of {name} is missing")
    array = arrays[offset]
    reach = sum((length - 1) * step for length, step in zip(value.shape, value.stride(), strict=True))
    count = reach + 1 if value.numel() else 0
    if value.numel() > count:
        raise damaged(source, f"{name} has {value.numel()} numbers, of which {count} are stored")
    begin = _content(source, array)
    start = begin + int(value.storage_offset()) * value.dtype.itemsize
    end = start + count * value.dtype.itemsize
    # Sizes come from the pickle and places from the archive: they need not agree.
    if not begin <= start <= end <= begin + array.member.file_size or end > array.end:
        raise damaged(source, f"{name} is larger than its array")
    stride = None if value.is_contiguous() else tuple(value.stride())
    return Entry(value.dtype, tuple(value.shape), start, end, stride)


def _content(source: ByteSource, array: _Array) -> int:
    """Where an array's content begins.

    The archive's directory does not say, as each header has padding of unknown length. PyTorch's own files have no
    gap before the next header and aligned content; of others the header is read.
    """
    member = array.member
    if member.compress_type != zipfile.ZIP_STORED:
        raise damaged(source, "its arrays are compressed")
    trailer = 0
    if member.flag_bits & 8:
        trailer = 24 if max(member.header_offset, member.file_size) >= 0xFFFFFFFF else 16
    begin = array.end - trailer - member.file_size
    if begin % 64 == 0 and begin >= array.start + _LOCAL_HEADER + len(member.filename):
        return begin
    header = read_bytes(source, array.start, array.start + _LOCAL_HEADER)
    return (
        array.start
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
