"""Zip archives, entry by entry."""

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from medvisionllama.data.archives import PIECE, Member, refused

_ENCRYPTED, _UTF8 = 0x1, 0x800
_UNIX = 3
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


class ZipReader:
    """An open zip archive."""

    damage: tuple[type[Exception], ...] = (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        OverflowError,
        RuntimeError,
        struct.error,
    )

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._file = archive.open("rb")
        self._current: tuple[zipfile.ZipFile, zipfile.ZipInfo] | None = None

    def members(self) -> Iterator[Member]:
        """List the entries in the order of the directory at the archive's end."""
        with zipfile.ZipFile(self._file) as opened:
            for entry in opened.infolist():
                self._current = opened, entry
                yield Member(self._name(entry), entry.file_size, entry.is_dir(), _forbidden(entry))

    def pieces(self) -> Iterator[bytes]:
        """Read the content of the entry that `members` gave last; its checksum is verified at its end."""
        assert self._current is not None
        opened, entry = self._current
        with opened.open(entry) as file:
            while piece := file.read(PIECE):
                yield piece

    def place(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def _name(self, entry: zipfile.ZipInfo) -> str:
        # As written: zipfile itself cuts at a zero and, on Windows, turns backslashes.
        name = entry.orig_filename
        if not entry.flag_bits & _UTF8 and not name.isascii():
            raise refused(self._archive, f"the name {ascii(name)[:80]} is not UTF-8")
        return name


def _forbidden(entry: zipfile.ZipInfo) -> str:
    if entry.flag_bits & _ENCRYPTED:
        return "encrypted"
    if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return "packed by a method other than deflate"
    if entry.is_dir() and entry.file_size:
        return "a folder with content"
    if entry.create_system == _UNIX:
        return _KINDS.get(stat.S_IFMT(entry.external_attr >> 16), "")
    return ""
