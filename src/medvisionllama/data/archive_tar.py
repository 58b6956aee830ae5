"""Tar archives, plain or gzipped, entry by entry, with a hard limit on every read of `tarfile`."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from medvisionllama.data.archives import PIECE, Member, refused

_MAX_HEADER_BYTES = 1 << 20
"""Headers of one entry; long names and attributes take a few thousand."""
_MAX_PADDING_BYTES = 1 << 22
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class _Metered:
    """The unpacked bytes of the archive, of which no more are given out than was allowed last.

    `tarfile` reads extended headers whole, as large as they call themselves.
    """

    def __init__(self, archive: Path, stream: IO[bytes]) -> None:
        self._archive = archive
        self._stream = stream
        self._allowed = 0
        self.last = b""
        """What was given out last."""

    def allow(self, count: int) -> None:
        self._allowed = count

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= self._allowed:
            raise refused(self._archive, f"a header of an entry is larger than {_MAX_HEADER_BYTES:,} bytes")
        self._allowed -= count
        self.last = self._stream.read(count)
        return self.last

    def seek(self, place: int, whence: int = 0) -> int:
        return self._stream.seek(place, whence)

    def tell(self) -> int:
        return self._stream.tell()


class TarReader:
    """An open tar archive."""

    damage: tuple[type[Exception], ...] = (
        tarfile.TarError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        ValueError,
        OverflowError,
        RecursionError,
    )

    def __init__(self, archive: Path, *, compressed: bool) -> None:
        self._archive = archive
        self._file = archive.open("rb")
        self._stream = cast(IO[bytes], gzip.GzipFile(fileobj=self._file)) if compressed else self._file
        self._metered = _Metered(archive, self._stream)
        self._current: tarfile.TarInfo | None = None

    def members(self) -> Iterator[Member]:
        """List the entries in order."""
        self._metered.allow(_MAX_HEADER_BYTES)
        # Bytes that are no UTF-8 are kept as surrogates, so that the check of names can say so.
        with tarfile.open(
            fileobj=cast(IO[bytes], self._metered), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (entry := self._next(tar)) is not None:
                self._current = entry
                yield Member(entry.name, entry.size, entry.isdir(), _forbidden(entry))
        self._check_end()

    def pieces(self) -> Iterator[bytes]:
        """Read the content of the entry that `members` gave last."""
        assert self._current is not None
        self._stream.seek(self._current.offset_data)
        left = self._current.size
        while left:
            piece = self._stream.read(min(PIECE, left))
            if not piece:
                raise EOFError("it ends inside a file")
            left -= len(piece)
            yield piece

    def place(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._stream.close()
        self._file.close()

    def _next(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        self._metered.allow(_MAX_HEADER_BYTES)
        entry = tar.next()
        cast(Any, tar).members.clear()  # a list of all of them is what a bomb of entries would fill
        if entry is not None and entry.size < 0:
            raise tarfile.ReadError("an entry of negative size")
        return entry

    def _check_end(self) -> None:
        """Make sure that the end is the end: `tarfile` also stops where the file does, or at nonsense."""
        if self._metered.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")
        left = _MAX_PADDING_BYTES
        # To the end, since gzip keeps its checksum there.
        while piece := self._stream.read(1 << 16):
            left -= len(piece)
            if left < 0 or piece.strip(b"\0"):
                raise refused(self._archive, "something follows its end")


def is_tar(head: bytes) -> bool:
    """Whether 512 bytes are the header of an entry, or the end of an empty archive."""
    if head == bytes(tarfile.BLOCKSIZE):
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _forbidden(entry: tarfile.TarInfo) -> str:
    if entry.issparse():
        return _KINDS[tarfile.GNUTYPE_SPARSE]
    if entry.isreg() or entry.isdir():
        return ""
    return _KINDS.get(entry.type, f"of an unknown kind {entry.type!r}")
