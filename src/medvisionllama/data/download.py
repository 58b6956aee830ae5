"""`data download`: an archive of the decathlon, or one's own, fetched, verified, unpacked and put in place.

All work happens in a hidden folder beside the result, `.NAME.download`: it holds a lock, the part that has come,
and what is being unpacked. The result appears by one rename. After an interruption the next call goes on; after a
refusal nothing is left.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from medvisionllama._files import locked
from medvisionllama._http import is_offline
from medvisionllama.data.archives import SUFFIXES, Limits, NoRoomError, extract
from medvisionllama.data.http_file import HttpFile, check_address
from medvisionllama.data.index import open_dataset
from medvisionllama.data.msd_tasks import MIRROR, TASKS, find_task
from medvisionllama.errors import DataError, command
from medvisionllama.progress import Progress, Silent


@dataclass(frozen=True)
class Wanted:
    """What to fetch, and how to know it."""

    name: str
    file: str
    url: str
    algorithm: str
    checksum: str
    """Empty if nobody has said what it must be."""

    @property
    def is_task(self) -> bool:
        return self.name in TASKS


def download(
    what: str,
    out: Path | str = Path(),
    *,
    mirror: str | None = None,
    sha256: str | None = None,
    keep_archive: bool = False,
    offline: bool | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch a task of the Medical Segmentation Decathlon, or an archive of one's own, to a folder in `out`.

    Args:
        what: a task of the decathlon (`Task04`, `4`, `hippocampus`), or an https address of a .tar, .tar.gz or
            .zip.
        mirror: where the tasks' archives lie; by default MEDVISIONLLAMA_MSD_MIRROR, or where MONAI keeps them.
        sha256: of the archive; takes the place of the MD5 sum known for a task.
        keep_archive: leave the archive in `out`, where a later call finds it.
        offline: fetch nothing; by default as HF_HUB_OFFLINE says.

    Returns:
        The dataset's folder.

    Raises:
        DataError: unknown task, offline, another checksum, an archive that is refused, or too little room.
    """
    wanted, out = wanted_of(what, mirror=mirror, sha256=sha256), Path(out)
    progress, limits = progress or Silent(), limits or Limits()
    target, kept = out / wanted.name, out / wanted.file
    if _is_there(target, wanted, progress):
        return target
    if is_offline(offline) and not kept.is_file():
        raise DataError(
            f"{wanted.name} is not in {out} and downloads are off; run `{command('data download', wanted.name if wanted.is_task else 'URL', '--out', out)}` while online"
        )
    out.mkdir(parents=True, exist_ok=True)
    with _work_folder(out / f".{wanted.name}.download", progress) as work:
        # Another process may have brought it while this one waited.
        if _is_there(target, wanted, progress):
            return target
        if kept.is_file():
            progress.say(f"using {kept}, which is here already")
            _verify(kept, wanted, progress)
            _place(kept, work, target, wanted, limits, progress)
            return target
        remote = HttpFile(wanted.url, work, plain_http=_proves(wanted), progress=progress)
        archive = remote.fetch(lambda size, left: _check_room(out, wanted, size, left, limits))
        try:
            _verify(archive, wanted, progress)
            _place(archive, work, target, wanted, limits, progress)
        except NoRoomError:
            raise  # the archive is good and stays for the next call
        except DataError:
            remote.discard()
            raise
        if keep_archive:
            archive.replace(kept)
        remote.discard()
    return target


def wanted_of(what: str, *, mirror: str | None = None, sha256: str | None = None) -> Wanted:
    """Find out what is meant.

    Raises:
        DataError: neither a task nor an address of an archive, or an address or checksum that is none.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DataError(f"--sha256 {sha256[:80]!r} is no checksum; it has 64 digits from 0 to f")
    if "://" in what:
        check_address(what, plain_http=sha256 is not None)
        file = unquote(urlsplit(what).path).rpartition("/")[2]
        suffix = next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")
        name = file[: -len(suffix)] if suffix else ""
        if not re.fullmatch(r"\w[\w. -]{0,99}", name):
            raise DataError(
                f"the address ends in {file[:80]!r}; it must end in the name of an archive, such as name.tar (allowed: {', '.join(SUFFIXES)})"
            )
        return Wanted(name, file, what, "sha256", (sha256 or "").lower())
    task = find_task(what)
    base = mirror or os.environ.get("MEDVISIONLLAMA_MSD_MIRROR") or MIRROR
    check_address(base, plain_http=sha256 is not None)
    algorithm, checksum = ("sha256", sha256.lower()) if sha256 else ("md5", task.md5)
    return Wanted(task.name, task.file, f"{base.rstrip('/')}/{task.file}", algorithm, checksum)


def _proves(wanted: Wanted) -> bool:
    """Whether the checksum alone tells a forged archive; MD5 does not."""
    return wanted.algorithm == "sha256" and bool(wanted.checksum)


def _is_there(target: Path, wanted: Wanted, progress: Progress) -> bool:
    """Say so if the result is there; it appears whole, so a folder that is no dataset is somebody else's."""
    if not target.exists():
        return False
    if wanted.is_task:
        try:
            open_dataset(target)
        except DataError as error:
            raise DataError(
                f"{target} is in the way and is no whole dataset ({error}); remove it and run again"
            ) from None
    elif not target.is_dir():
        raise DataError(f"{target} is in the way; remove it or choose another --out")
    unseen = (
        " (of its archive nothing is left that --sha256 could be compared with)" if _proves(wanted) else ""
    )
    progress.say(f"{target} is there already; nothing to do{unseen}")
    return True


@contextmanager
def _work_folder(work: Path, progress: Progress) -> Iterator[Path]:
    """Make the hidden folder, for one process at a time, and remove it unless a part is worth keeping."""

    def wait() -> None:
        progress.say(f"another process is at work in {work.parent}; waiting for it")

    with locked(work / "lock", waiting=wait):
        shutil.rmtree(work / "unpacked", ignore_errors=True)
        try:
            yield work
        finally:
            shutil.rmtree(work / "unpacked", ignore_errors=True)
            if not (work / "archive.part").exists():
                for file in ("archive.json", "lock"):
                    with suppress(OSError):
                        (work / file).unlink()
                with suppress(OSError):
                    work.rmdir()


def _check_room(out: Path, wanted: Wanted, size: int, left: int, limits: Limits) -> None:
    """Before the first byte: the rest of the archive, and about as much again for what comes out of it."""
    needed, free = left + size, max(shutil.disk_usage(out).free - limits.spare_bytes, 0)
    if needed > free:
        raise NoRoomError(
            f"{wanted.file} needs about {needed / 1e9:,.2f} GB in {out} (the archive and what it unpacks to), and {free / 1e9:,.2f} GB are free; free some space or choose another --out"
        )


def _verify(archive: Path, wanted: Wanted, progress: Progress) -> None:
    if not wanted.checksum:
        return
    digest = hashlib.new(wanted.algorithm, usedforsecurity=False)
    with (
        archive.open("rb") as file,
        progress.track(f"checking {wanted.file}", max(archive.stat().st_size, 1)) as advance,
    ):
        while piece := file.read(1 << 20):
            digest.update(piece)
            advance(file.tell())
    if digest.hexdigest() != wanted.checksum:
        fate = (
            "remove it"
            if archive.name == wanted.file
            else "nothing was kept, run again or use another mirror"
        )
        raise DataError(
            f"{wanted.file} has the {wanted.algorithm} {digest.hexdigest()}, expected was {wanted.checksum}; {fate}"
        )


def _place(
    archive: Path, work: Path, target: Path, wanted: Wanted, limits: Limits, progress: Progress
) -> None:
    """Unpack, look at what came out, and rename it to its place."""
    unpacked = work / "unpacked"
    extract(archive, unpacked, limits, progress=progress)
    inside = list(unpacked.iterdir())
    # Archives hold one folder of their own name, most of them.
    root = inside[0] if len(inside) == 1 and inside[0].is_dir() else unpacked
    try:
        open_dataset(root)
    except DataError as error:
        reason = str(error).replace(str(root), wanted.file)
        if wanted.is_task:
            raise DataError(f"{wanted.file} holds no whole dataset ({reason}); nothing was kept") from None
        progress.say(f"note: what came is no dataset as it is: {reason}")
    root.rename(target)
