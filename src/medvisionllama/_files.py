"""Files that are either whole or absent: written to a temporary name, flushed to disk, then renamed."""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from medvisionllama.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows does without locks
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a disk says that has no locks."""


def with_home(path: Path | str) -> Path:
    """A path in which `~` is somebody's home; as it is where the name after `~` is no user's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def flush(path: Path) -> None:
    """Bring a file to the disk, so that a rename never shows one that is empty after a crash."""
    # Windows flushes only what may be written to.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any failure it disappears.

    The temporary name keeps the suffixes, since nibabel and numpy choose the format by them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The end of the name is enough: one as long as the disk allows would leave no room for more.
    temporary = path.parent / f".partial-{secrets.token_hex(8)}-{path.name[-40:]}"
    # The kernel reduces 0666 by the umask; asking for the umask would mean changing it for every thread.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def as_before(paths: Iterable[Path]) -> Iterator[ExitStack]:
    """Have files again as they were, or absent, when the block ends, unless it calls `pop_all` of what this yields.

    A process that is killed within, or stopped while it puts files back, leaves what was there beside it, under a
    hidden name, `.before-` and more.
    """
    others: list[Path] = []
    undone: list[Path] = []
    try:
        with ExitStack() as undo:
            # Called last, however those before it end.
            undo.callback(undone.extend, others)
            for path in paths:
                if path.exists():
                    others.append(path.with_name(f".before-{secrets.token_hex(8)}-{path.name[-40:]}"))
                    _keep(path, others[-1])
                    undo.callback(_put_back, path, others[-1])
                else:
                    undo.callback(path.unlink, missing_ok=True)
            yield undo
    finally:
        for other in [] if undone else others:
            other.unlink(missing_ok=True)


def linked(path: Path, other: Path) -> bool:
    """Give a file a second name; False on another disk, of somebody else's file, or where there are no links."""
    try:
        os.link(path, other)
    except OSError:
        return False
    return True


def _keep(path: Path, other: Path) -> None:
    if linked(path, other):
        return
    try:
        shutil.copyfile(path, other)
    except BaseException:
        other.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # times and rights, on somebody else's disk
        shutil.copystat(path, other)


def _put_back(path: Path, other: Path) -> None:
    if path.exists() and path.samefile(other):
        other.unlink()
    else:
        other.replace(path)


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, making it and its folder; its holder may delete both. Windows does without, and so do disks
    that have no locks.

    Args:
        waiting: called once if another process holds it.
    """
    if fcntl is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        return
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Open for writing: network disks lock nothing else.
            file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            continue  # its holder has just removed the folder
        try:
            if not _take_if_possible(file):
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(path, file):
                continue  # what was locked has been deleted meanwhile, and locks nobody out
            yield
            return
        finally:
            os.close(file)


@contextmanager
def lock_if_free(path: Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Hold a lock file if no other process does within so many seconds, and say whether; the file stays.

    The system frees the lock when the process ends, however it ends. Windows and disks without locks do without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield True
        return
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        deadline = time.monotonic() + seconds
        while not (free := _take_if_possible(file)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield free
    finally:
        os.close(file)


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock file; looking holds it for an instant itself."""
    if fcntl is None:
        return False
    try:
        # To be read by whoever may read alone: a shared lock needs no more.
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _take(file, fcntl.LOCK_SH)
    except OSError:  # a disk without locks
        return False
    finally:
        os.close(file)


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder itself, so that no file is left behind, and say whether.

    Windows does without, and so do disks that lock no folders, as network disks do.
    """
    if fcntl is None:
        yield False
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        yield _waited_for(file)
    finally:
        os.close(file)


def _waited_for(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _take(file: int, kind: int) -> bool:
    """Lock an open file unless another process has it, and say whether that went."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take_if_possible(file: int) -> bool:
    """The same, and True on a disk that has no locks, which must not keep anybody from working."""
    try:
        return _take(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("this disk has no file locks, so nothing keeps two processes from the same work in it")
        return True


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def check_file_name(path: Path, example: str) -> None:
    """Refuse to begin what would end by writing a file where a folder is, or where none may be written.

    Raises:
        ConfigError: with the name of a file in that folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, and a file is written; name one, as {path / example}")
    # Folders that are missing are made.
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fault = "is read-only" if nearest.is_dir() else "is a file"
        raise ConfigError(f"{path} cannot be written, as {nearest} {fault}; choose another folder")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or none; what is no text, as in some names of files, is shown by its bytes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_json(path: Path, record: Any) -> None:
    """Add a line of JSON that is on the disk on return, after whatever a crash left of the line before."""
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read() not in {b"", b"\n"}
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    """What `append_json` wrote, nothing if there is no file; a line that a crash cut short is passed over."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found


def canonical_hash(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys and no spaces: the same on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """One hash of several files in their order, whatever their names; of a single file, its own."""
    hashes = [file_sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else canonical_hash(hashes)


def user_cache() -> Path:
    """Where fetched blocks and preprocessed scans live: MEDVISIONLLAMA_CACHE, or the desktop's cache folder.

    The folder is readable by its owner only, since preprocessed scans are patient data.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medvisionllama"
    folder = Path(os.environ.get("MEDVISIONLLAMA_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
