"""Which DICOM series lie in a folder, whatever its files are called."""

import filecmp
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medvisionllama.data.formats.dicom_header import (
    FileHeader,
    Slice,
    check_named_as_slice,
    is_dicom,
    read_dataset,
    read_file_header,
)
from medvisionllama.data.formats.header import why_unreadable
from medvisionllama.errors import DataError


@dataclass(frozen=True)
class Series:
    """The images of one scan. Two are equal if they are of the same files."""

    series_uid: str
    study_uid: str
    description: str
    modality: str
    number: int | None
    files: tuple[Path, ...]
    """In the order of the slices along their normal."""
    folder: Path
    slices: tuple[Slice, ...] = field(repr=False, compare=False)
    """The frames of all files, in the same order."""
    listed: Mapping[Path, Set[Path]] = field(default_factory=dict, repr=False, compare=False)
    """What lay in the folders of its files when it was found."""

    @property
    def name(self) -> str:
        """A file name without suffix: number, description and eight digits that stand for the uid."""
        words = re.sub(r"[^A-Za-z0-9]+", "_", self.description or self.modality).strip("_")[:40]
        number = "" if self.number is None else f"{self.number}"
        # What is damaged has no uid.
        digest = hashlib.sha256((self.series_uid or str(self.files[0])).encode()).hexdigest()[:8]
        return "_".join(part for part in (number, words, digest) if part)

    def __str__(self) -> str:
        """How messages name it."""
        known = self.description or (f"number {self.number}" if self.number is not None else self.name)
        return f"series {known} ({self.folder})"


def find_series(*paths: Path, keep_going: bool = False) -> tuple[Series, ...]:
    """List the series of images in folders and the folders below them, or in files.

    Files that are no scans are passed over: other formats, directories, reports, masks, presentation states,
    screenshots and localisers. The same image under two names counts once, and a series that lies in several places
    is one. A .dcm or .ima file that is no DICOM is damaged if it lies beside slices.

    Args:
        keep_going: a DICOM file that is damaged, has gone or may not be read is the fault of the series in its
            folder, which it may belong to, or, where there is none, of a series of its own; the others are well.

    Raises:
        DataError: a path does not exist, or a DICOM file is damaged.
        OSError: as `files_below`.
    """
    groups: dict[str, list[FileHeader]] = {}
    damaged: dict[Path, tuple[Path, str]] = {}
    # Paths may lie within one another.
    given = [file for path in paths for file in _files_of(path)]
    files = {file.parent.resolve() / file.name: file for file in given}
    # Of folders what the search has found there, and no more: what came since may belong to a series.
    listed = _listed({path.parent for path in paths if path.is_file()})
    for file in given:
        listed.setdefault(file.parent, set()).add(file)
    others: list[Path] = []

    @contextmanager
    def noted(file: Path) -> Iterator[None]:
        try:
            yield
        except (DataError, FileNotFoundError, PermissionError) as error:
            if not keep_going:
                raise
            damaged.setdefault(file.parent, (file, why_unreadable(file, error)))

    for file in files.values():
        with noted(file):
            header = read_file_header(file)
            if header is None:
                others.append(file)
            else:
                groups.setdefault(header.series_uid, []).append(header)
    found = [_series(group, listed) for group in groups.values()]
    told = {file.parent for series in found for file in series.files}
    for file in others:
        if file.parent in told:
            with noted(file):
                check_named_as_slice(file)
    found = [_with_fault(series, damaged) for series in found]
    found += [_without_header(*fault) for folder, fault in damaged.items() if folder not in told]
    return tuple(sorted(found, key=lambda series: (series.folder, series.number or 0, series.series_uid)))


def person_of(source: Path | Series) -> str:
    """SHA-256 of the first PatientID in a series; empty where there is none, or a file is damaged."""
    try:
        for file in files_of(source):
            # The directory of a CD has none, and lies before the images.
            if number := str(read_dataset(file, ("PatientID",)).get("PatientID") or "").strip():
                return hashlib.sha256(number.encode()).hexdigest()
    except (OSError, DataError):
        # What is wrong with it is said when its header is read.
        return ""
    return ""


def files_of(source: Path | Series) -> Iterator[Path]:
    """The DICOM files of a series, or of a folder and the folders below it, whatever else lies there."""
    # One by one: who looks for one thing in the first need not open the others.
    return iter(source.files) if isinstance(source, Series) else filter(is_dicom, _files_of(source))


def has_grown(series: Series) -> bool:
    """Whether an image of the series has come into its folders since it was found, as while it is being sent."""
    images = {piece.uid for piece in series.slices}
    for folder, before in series.listed.items():
        for file in _listed([folder]).get(folder, before) - before:
            header = None
            # One that is damaged, or gone again, is none yet.
            with suppress(DataError, OSError):
                header = None if file.name.startswith(".") else read_file_header(file)
            # A copy under another name is no new image.
            if header and header.series_uid == series.series_uid and header.slices[0].uid not in images:
                return True
    return False


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and of the folders below it, sorted. Links are followed, hidden names passed over.

    Raises:
        OSError: a folder cannot be listed; what it holds would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise error

    # Real places, so that a link which leads back ends there, and a folder under two names counts once.
    seen = {folder.resolve()}
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        inside = []
        for name in sorted(folders):
            real = Path(place, name).resolve()
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                inside.append(name)
        folders[:] = inside
        files = (Path(place, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file()]
    return sorted(found)


def _files_of(path: Path) -> list[Path]:
    """The file, or those of a folder and of the folders below it."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give a DICOM file or a folder of DICOM files")
    return [path] if path.is_file() else files_below(path)


def _listed(folders: Collection[Path]) -> dict[Path, set[Path]]:
    """What lies in folders, as far as they may be listed: of a file that was given, nobody needs its folder."""
    found = {}
    for folder in folders:
        with suppress(OSError):
            found[folder] = set(folder.iterdir())
    return found


def _series(headers: list[FileHeader], listed: Mapping[Path, Set[Path]]) -> Series:
    kept = _without_copies(headers)
    slices = along_normal([piece for header in kept for piece in header.slices])
    files = tuple(dict.fromkeys(piece.file for piece in slices))
    first = kept[0]
    return Series(
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        description=first.description,
        modality=first.modality,
        number=first.number,
        files=files,
        folder=_common_folder({file.parent for file in files}, files[0].parent),
        slices=tuple(slices),
        listed={folder: listed[folder] for folder in {file.parent for file in files} if folder in listed},
    )


def _common_folder(folders: Collection[Path], first: Path) -> Path:
    """The folder that holds all of them; the first where there is none, as on two drives."""
    if len(folders) == 1:
        return first
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:
        pass
    try:
        # Some were given from here, others from the root.
        return Path(os.path.commonpath([folder.absolute() for folder in folders]))
    except ValueError:
        return first


def _with_fault(series: Series, damaged: Mapping[Path, tuple[Path, str]]) -> Series:
    """The series, which says so if its folder holds a damaged file: one of its own slices may be missing."""
    faults = [damaged[file.parent][1] for file in series.files if file.parent in damaged]
    if not faults:
        return series
    first, *others = series.slices
    return replace(series, slices=(replace(first, fault=faults[0]), *others))


def _without_header(file: Path, fault: str) -> Series:
    """A series of which nothing is known but a damaged file."""
    return Series("", "", "", "", None, (file,), file.parent, (Slice(file, fault=fault),))


def _without_copies(headers: list[FileHeader]) -> list[FileHeader]:
    """Drop files that repeat another, byte by byte; what only claims to be the same image stays, to be refused."""
    kept: dict[str, list[FileHeader]] = {}
    for header in headers:
        same = kept.setdefault(header.slices[0].uid, [])
        if not any(filecmp.cmp(header.file, other.file, shallow=False) for other in same):
            same.append(header)
    return [header for same in kept.values() for header in same]


def along_normal(slices: list[Slice]) -> list[Slice]:
    """Sort by the position along the normal of the first slice; by file where positions are unknown."""
    if any(piece.position is None or piece.orientation is None for piece in slices):
        return sorted(slices, key=lambda piece: (piece.number or 0, piece.file, piece.frame))
    orientation = np.asarray(slices[0].orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    return sorted(
        slices, key=lambda piece: (float(normal @ np.asarray(piece.position)), piece.file, piece.frame)
    )
