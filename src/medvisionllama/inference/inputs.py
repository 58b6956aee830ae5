"""Which scans a list of files and folders names."""

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from medvisionllama.data.formats import dicom, format_of
from medvisionllama.data.formats.dicom import open_series
from medvisionllama.data.formats.dicom_series import Series, find_series
from medvisionllama.data.formats.itk import is_segmentation
from medvisionllama.data.readers import SUFFIXES, ScanSource, is_scan, read_header, stem_of
from medvisionllama.errors import DataError


@dataclass(frozen=True)
class Scan:
    """One image to segment: a file, a DICOM series, or one of these per channel."""

    case_id: str
    images: tuple[ScanSource, ...]
    num_voxels: int = 0
    """Of all channels together."""

    @property
    def files(self) -> list[Path]:
        """Everything that is read of it."""
        return files_of_scan(self.images)


def files_of_scan(images: Iterable[ScanSource]) -> list[Path]:
    """Files of a scan's channels; of a DICOM series, each of its images."""
    return [file for source in images for file in (source.files if isinstance(source, Series) else (source,))]


def collect_scans(inputs: Sequence[Path], *, channels: Sequence[str]) -> list[Scan]:
    """List the scans in files and folders, and check every header before any is segmented.

    Folders are searched for DICOM series, with the folders below them. Studies hold series that nobody means to
    segment: one that makes no volume, or lies beside a damaged file, fails when its turn comes, unless all do.

    Args:
        channels: names of the channels that the run was trained on. With several, a scan is one 4-D file or, as
            nnU-Net has it, files ending in _0000, _0001 and so on.

    Raises:
        DataError: nothing there, two scans of one name, one scan in two formats, or another number of channels.
    """
    # Two names of one stored file are two scans, as where equal files are links into a store.
    by_name = {path.parent.resolve() / path.name: path for given in inputs for path in _scans_at(given)}
    files = list(by_name.values())
    numbered = Counter((path.parent, _base(path)) for path in files)
    groups: dict[tuple[Path, str], list[ScanSource]] = {}
    for path in files:
        alone = numbered[path.parent, _base(path)] == 1
        groups.setdefault((path.parent, _case_of(path, len(channels), alone=alone)), []).append(path)
    taken = {name for _, name in groups}
    # Of all at once: a series may lie in several of them.
    found = find_series(*(path for path in inputs if _may_be_dicom(path)), keep_going=True)
    for name, series in _named_series(found, taken):
        groups[series.folder, name] = [series]
    scans: dict[str, Scan] = {}
    for (_, case_id), sources in groups.items():
        if case_id in scans:
            raise DataError(
                f"{sources[0]} and {scans[case_id].images[0]} would both become the mask {case_id}; predict them into two folders"
            )
        images = tuple(sorted(sources, key=stem_of))
        for image, following in pairwise(images):
            # Channels have names of their own.
            if stem_of(image) == stem_of(following):
                raise DataError(f"{image} and {following.name} are the same case; remove one")
        scans[case_id] = Scan(case_id, images)
    if not scans:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no scan there; give files ({', '.join(suffix for suffix in SUFFIXES if suffix != '.seg.nrrd')}), DICOM series, or folders of them"
        )
    failed = []
    for scan in list(scans.values()):
        try:
            scans[scan.case_id] = _checked(scan, channels)
        except DataError as error:
            first = scan.images[0]
            if isinstance(first, Path) and not first.is_dir():
                raise
            failed.append(error)
    if len(failed) == len(scans):
        raise failed[0]
    return list(scans.values())


def _checked(scan: Scan, channels: Sequence[str]) -> Scan:
    """The scan with its size, if its headers fit together and to the run."""
    headers = [read_header(path) for path in scan.images]
    found = sum(header.num_channels for header in headers)
    if found != len(channels):
        first = scan.images[0]
        if isinstance(first, Series):
            names = ", ".join(f"CASE_{number:04d}.nii.gz" for number in range(len(channels)))
            raise DataError(
                f"{first} is one channel, the run was trained on {len(channels)} ({', '.join(channels)}); convert the series of a case to {names}, by dcm2niix for example (medvisionllama data convert does it for a labelled dataset with images/CASE_0000/ and so on, its imagesTs/ as well)"
            )
        raise DataError(
            f"{scan.images[0]} has {found} channels, the run was trained on {len(channels)} ({', '.join(channels)}); give scans like those"
        )
    if len(scan.images) > 1 and not _are_numbered(scan.images):
        raise DataError(
            f"{scan.images[0]}: the channel files of {scan.case_id} must end in _0000 to _{len(channels) - 1:04d}"
        )
    return replace(scan, num_voxels=found * math.prod(headers[0].shape))


def _are_numbered(files: Sequence[ScanSource]) -> bool:
    """Whether names end in _0000, _0001 and so on, in this order."""
    return all(stem_of(file).endswith(f"_{number:04d}") for number, file in enumerate(files))


def _named_series(series: Sequence[Series], taken: Container[str]) -> list[tuple[str, Series]]:
    """Name each series after its folder, as training does, or after itself where that would not tell it apart.

    Args:
        taken: names of other scans.
    """
    places = [one.folder.resolve() for one in series]
    folders, names = Counter(places), Counter(place.name for place in set(places))
    return [
        (
            place.name
            if place.name and folders[place] == names[place.name] == 1 and place.name not in taken
            else one.name,
            one,
        )
        for place, one in zip(places, series, strict=True)
    ]


def _scans_at(path: Path) -> list[Path]:
    """Scans that one argument names, but DICOM series."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give scans or folders of scans")
    if is_segmentation(path):
        raise DataError(f"{path} is a segmentation, not a scan; give the scan it was drawn on")
    if path.is_dir():
        return sorted(child for child in path.iterdir() if is_scan(child) and not is_segmentation(child))
    if _may_be_dicom(path):
        open_series(path)  # which says what is wrong with it
        return []
    return [path]


def _may_be_dicom(path: Path) -> bool:
    return path.is_dir() or format_of(path) is dicom


def _base(path: Path) -> str:
    """A file's stem without a four-digit number at its end."""
    return re.sub(r"_\d{4}$", "", stem_of(path))


def _case_of(path: Path, num_channels: int, *, alone: bool) -> str:
    """Name of a file's case: nnU-Net's channel number is dropped, a number that is part of the name is not.

    Args:
        alone: no other file beside it differs in the number only.
    """
    stem, base = stem_of(path), _base(path)
    if base == stem or read_header(path).num_channels == num_channels > 1:
        return stem
    if num_channels > 1:
        return base
    # One channel: img_0000 alone is nnU-Net's img; beside img_0001 it is one scan of a numbered series.
    return base if stem.endswith("_0000") and alone else stem
