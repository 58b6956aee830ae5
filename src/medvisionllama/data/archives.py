"""Unpacking a stranger's archive: regular files and folders, below one new folder, and nothing else.

`tarfile` and `zipfile` only parse here. Every name is checked and every file is written by our own loop, which
counts what really comes out while it comes out. Why `tarfile`'s filters do not do: docs/decisions/0012.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medvisionllama._http import short
from medvisionllama.data.member_names import Names
from medvisionllama.errors import DataError
from medvisionllama.progress import Advance, Progress, Silent

SUFFIXES = (".tar.gz", ".tar", ".tgz", ".zip")
PIECE = 1 << 20


class NoRoomError(DataError):
    """The disk, or a limit that the caller set, is too small for an archive that may be a good one."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to."""

    max_members: int = 100_000
    max_bytes: int | None = None
    """By default what the disk has free, less `spare_bytes`."""
    spare_bytes: int = 200_000_000
    """Left free on the disk."""
    max_ratio: float = 200.0
    """Unpacked bytes for each byte of the archive; label maps reach 100, made-up zeros 1,000."""
    ratio_from_bytes: int = 100_000_000
    """Archives that unpack to less are no bombs, whatever their ratio."""


@dataclass(frozen=True)
class Member:
    """One entry of an archive, as the archive declares it."""

    name: str
    size: int
    is_folder: bool
    forbidden: str = ""
    """What it is, if it is neither a file nor a folder."""


class Reader(Protocol):
    """An open archive."""

    damage: tuple[type[Exception], ...]
    """What its library raises of archives that are not whole."""

    def members(self) -> Iterator[Member]:
        """List the entries in order; the last step checks that the archive ends as it should."""

    def pieces(self) -> Iterator[bytes]:
        """Read the content of the entry that `members` gave last."""

    def place(self) -> int:
        """Bytes of the archive that have been read."""

    def close(self) -> None:
        """Let go of the file."""


def extract(
    archive: Path, destination: Path, limits: Limits | None = None, *, progress: Progress | None = None
) -> None:
    """Unpack a .tar, .tar.gz or .zip, told by its content, into a folder that does not exist yet.

    macOS's `._` twins are left out. Modes, owners and dates are ignored. On any failure the folder disappears.

    Raises:
        DataError: no such archive, damaged, truncated, or one that a careful person would not unpack.
        NoRoomError: it does not fit.
    """
    limits = limits or Limits()
    if destination.exists():
        raise DataError(f"{destination} exists already; remove it or choose another folder")
    if not destination.parent.is_dir():
        raise DataError(f"{destination.parent} is not a folder; make it first")
    destination.mkdir()
    try:
        with closing(open_archive(archive)) as reader:
            try:
                _unpack(archive, reader, destination, limits, progress or Silent())
            except DataError:
                raise
            except reader.damage as error:
                raise refused(archive, f"it is damaged or truncated ({short(error)})") from None
    except BaseException:
        shutil.rmtree(destination, ignore_errors=True)
        raise


def open_archive(archive: Path) -> Reader:
    """Choose the reader by the first bytes.

    Raises:
        DataError: no such file, or not an archive.
    """
    from medvisionllama.data import archive_tar, archive_zip

    try:
        with archive.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{archive} cannot be read ({error.strerror}); check the path") from None
    if head.startswith(b"PK"):
        return archive_zip.ZipReader(archive)
    if head.startswith(b"\x1f\x8b") or archive_tar.is_tar(head):
        return archive_tar.TarReader(archive, compressed=head.startswith(b"\x1f\x8b"))
    raise refused(archive, f"it is no tar, tar.gz or zip archive: it begins with {head[:16]!r}")


def refused(archive: Path, what: str) -> DataError:
    """The error of an archive that is not unpacked."""
    return DataError(
        f"{archive.name} is refused: {what}; nothing was unpacked, get the archive again from a source you trust"
    )


class _Room:
    """How much the entries may declare together."""

    def __init__(self, archive: Path, limits: Limits, destination: Path) -> None:
        self._archive = archive
        free = shutil.disk_usage(destination).free - limits.spare_bytes
        self._room = max(free if limits.max_bytes is None else min(free, limits.max_bytes), 0)
        self._honest = max(limits.max_ratio * archive.stat().st_size, limits.ratio_from_bytes)
        self._declared = 0

    def take(self, size: int) -> None:
        """Count an entry, before a byte of it is read."""
        self._declared += size
        if self._declared > self._honest:
            raise refused(
                self._archive,
                f"it would unpack to {self._declared / 1e9:,.1f} GB or more, over {self._honest / 1e9:,.1f} GB, which is no honest compression",
            )
        if self._declared > self._room:
            raise NoRoomError(
                f"{self._archive.name} would unpack to {self._declared / 1e9:,.2f} GB or more, and the disk or the limit leaves {self._room / 1e9:,.2f} GB; nothing was unpacked, free some space or choose another disk"
            )


def _unpack(archive: Path, reader: Reader, destination: Path, limits: Limits, progress: Progress) -> None:
    names, room = Names(), _Room(archive, limits, destination)
    with progress.track(f"unpacking {archive.name}", max(archive.stat().st_size, 1)) as advance:
        for number, member in enumerate(reader.members(), start=1):
            if number > limits.max_members:
                raise refused(archive, f"it has more than {limits.max_members:,} entries")
            # Before twins are left out: their bytes have to be read past as well.
            room.take(member.size)
            try:
                parts = names.add(member.name, is_folder=member.is_folder)
            except ValueError as error:
                raise refused(archive, str(error)) from None
            if member.forbidden:
                raise refused(
                    archive,
                    f"{names.shown(member.name)} is {member.forbidden}, and only files and folders are taken",
                )
            if not parts:
                continue
            path = destination.joinpath(*parts)
            if member.is_folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            written = _write(path, reader, member.size, advance)
            if written != member.size:
                raise refused(
                    archive,
                    f"{names.shown(member.name)} has {'more' if written > member.size else 'fewer'} bytes than the {member.size:,} declared",
                )
        if not names.num_files:
            raise refused(archive, "it holds no file")


def _write(path: Path, reader: Reader, size: int, advance: Advance) -> int:
    """Write an entry's content and return its length; what is longer than declared is not written to its end."""
    length = 0
    # "x": a file that is already there, as whatever its name hides, is never written through.
    with path.open("xb") as file:
        for piece in reader.pieces():
            length += len(piece)
            if length > size:
                break
            file.write(piece)
            advance(reader.place())
        file.flush()
        os.fsync(file.fileno())
    return length
