"""Two layouts told by folder names: nnU-Net's raw folders, and images/ beside labels/."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from medvisionllama.data import msd
from medvisionllama.data.check.findings import Finding
from medvisionllama.data.formats.dicom import open_series
from medvisionllama.data.index import Case, Dataset, patient_of
from medvisionllama.data.labels import check_no_ignore
from medvisionllama.data.near_names import (
    constant_ending,
    datasets_in,
    misnamed_folders,
    unread_files,
    why_none_meets,
)
from medvisionllama.data.readers import SUFFIXES, is_scan, read_header, stem_of
from medvisionllama.errors import DataError

ABOUT = ("name", "description", "reference", "licence", "license", "release")
"""What names.json, or a dataset.json, may tell of a dataset beside its names."""
_ASKED = 5
"""Scans whose headers tell how many channels all have."""
# What network storage (Synology) and macOS lay beside somebody's files.
_SYSTEM_FOLDERS = {"@eadir", "__macosx"}


def is_nnunet(root: Path, content: dict[str, Any]) -> bool:
    """Whether a dataset.json is nnU-Net's: one with a `training` list only if files lie as nnU-Net has them."""
    if "training" not in content or "channel_names" not in content:
        return "channel_names" in content
    labels = content.get("labels")
    numbered = isinstance(labels, dict) and not any(isinstance(value, str) for value in labels.values())
    if not numbered or not all((root / name).is_dir() for name in ("imagesTr", "labelsTr")):
        return False
    return any(
        _one_of(root / "imagesTr", f"{stem_of(path)}_0000").is_file() for path in scans_of(root / "labelsTr")
    )


def index_nnunet(root: Path, content: dict[str, Any], patient_pattern: str | None) -> Dataset:
    """Index imagesTr/CASE_0000.nii.gz, one file per channel, and labelsTr/CASE.nii.gz.

    Raises:
        DataError: a folder or a channel is missing, or the classes are regions, which need merging first.
    """
    where = root / "dataset.json"
    names, labels = content.get("channel_names"), content.get("labels")
    if not (isinstance(names, dict) and names and isinstance(labels, dict)):
        raise DataError(f"{where} needs 'training' (MSD), or 'channel_names' and 'labels' (nnU-Net)")
    check_no_ignore(labels, where)
    classes: dict[int, str] = {}
    for name, value in labels.items():
        if not isinstance(value, int):
            raise DataError(
                f"{where}: the class {name!r} is {value!r}; region-based classes are not supported, give one number each"
            )
        msd.check_value(value, name, where)
        classes[value] = name
    num_channels = len(names)
    cases = []
    for label in scans_of(root / "labelsTr"):
        case_id = stem_of(label)
        images = tuple(
            _one_of(root / "imagesTr", f"{case_id}_{channel:04d}") for channel in range(num_channels)
        )
        cases.append(Case(case_id, patient_of(case_id, patient_pattern), images, label))
    try:
        channels = tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        raise DataError(
            f"{where}: 'channel_names' must map channel numbers to names, as {{'0': 'T1'}}"
        ) from None
    return Dataset(
        root.name, root, tuple(cases), channels, {value: classes[value] for value in sorted(classes) if value}
    )


def index_plain(
    root: Path, patient_pattern: str | None, exclude: Sequence[str] = ()
) -> tuple[Dataset, list[Finding]]:
    """Index images/ and labels/ by equal names; `_0000` channel endings and a names.json are understood.

    An image may be a folder with the files of one DICOM series.

    Args:
        exclude: cases and patients whose number of channels does not matter, since they will be left out.

    Returns:
        The dataset, and the images and labels without a partner or with two files, which it leaves out.

    Raises:
        DataError: no image has a label of its name, or cases have different channel files.
    """
    labels, alone = _by_stem(scans_of(root / "labels"))
    images, twice = _by_stem(scans_of(root / "images", series=True))
    case_ids = _case_ids(images, labels)
    alone += [replace(finding, cases=(case_ids[finding.cases[0]],)) for finding in twice]
    groups: dict[str, list[Path]] = {}
    for stem, path in images.items():
        groups.setdefault(case_ids[stem], []).append(path)
    if groups and labels and not groups.keys() & labels.keys():
        bare = {re.sub(r"_\d{4}$", "", stem): path for stem, path in images.items()}
        ends_bare = constant_ending(labels, bare) and not constant_ending(labels, images)
        raise DataError(f"{root}: {why_none_meets(bare if ends_bare else images, labels)}")
    lone = sorted(groups.keys() ^ labels.keys())
    unread = {name: unread_files(root / name) for name in ("images", "labels")} if lone else {}
    for case_id in lone:
        missing = "labels" if case_id in groups else "images"
        other = unread[missing].get(case_id)
        found = f"{other} alone, a format that is not read," if other else "no file"
        message = f"{root}: the case {case_id!r} has {found} in {missing}/; add {missing}/{case_id}{SUFFIXES[0]} or remove its partner"
        alone.append(Finding("no-partner", message, (case_id,)))
    cases = tuple(
        Case(case_id, patient_of(case_id, patient_pattern), tuple(images), labels[case_id])
        for case_id, images in sorted(groups.items())
        if case_id in labels
    )
    wanted = [case for case in cases if not {case.case_id, case.patient_id} & set(exclude)]
    endings = {case.case_id: _endings(case) for case in wanted}
    for case_id, files in endings.items():
        other, usual = next(iter(endings.items()))
        if files != usual:
            raise DataError(
                f"{root}/images: the case {case_id!r} has the channel files {', '.join(files)}, the case {other!r} {', '.join(usual)}; every case needs the same"
            )
        if usual != tuple(f"_{channel:04d}" for channel in range(len(usual))):
            raise DataError(
                f"{root}/images: the case {case_id!r} has the channel files {', '.join(usual)}; number channels without gaps (_0000, _0001), or give visits names and labels of their own"
            )
    names = read_names(root)
    num_channels = max((len(files) for files in endings.values()), default=1)
    if num_channels == 1 and cases:
        # One file a case may still be 4-D.
        named = names.get("channels")
        num_channels = _usual_channels(wanted, len(named) if isinstance(named, list) else 0)
    channels, classes = _checked_names(root / "names.json", names, _default_channels(wanted, num_channels))
    return Dataset(root.name, root, cases, channels, classes), alone


def _case_ids(images: Collection[str], labels: Collection[str]) -> dict[str, str]:
    """The case of each image, by its name: that name, or the one that _0000 and other channel endings follow.

    Four digits may be a year or a patient's number too. They are a channel where _0000 is one of them, no image is
    called what precedes them and no label has them, and then only if a label is called what precedes them, or
    would have to be as others are.
    """
    numbered: dict[str, list[str]] = defaultdict(list)
    for stem in images:
        if found := re.fullmatch(r"(.+)_\d{4}", stem):
            numbered[found[1]].append(stem)
    channels = {
        base: stems
        for base, stems in numbered.items()
        if f"{base}_0000" in stems and base not in images and not any(stem in labels for stem in stems)
    }
    if not any(base in labels for base in channels):
        channels = {}
    bases = {stem: base for base, stems in channels.items() for stem in stems}
    return {stem: bases.get(stem, stem) for stem in images}


def _endings(case: Case) -> tuple[str, ...]:
    """Which channels a case has files of, as _0000; a lone file without a number is the first."""
    return tuple(
        "_0000" if stem_of(image) == case.case_id else stem_of(image).removeprefix(case.case_id)
        for image in case.images
    )


def no_dataset(root: Path) -> DataError:
    """The error of a folder that is none of the layouts: which one it nearly is, if it is."""
    within = datasets_in(root)
    if within:
        shown = ", ".join(within[:20]) + (f" and {len(within) - 20} more" if len(within) > 20 else "")
        return DataError(f"{root} is no dataset, its folders are; give one of these: {shown}")
    nearly = misnamed_folders(root)
    if nearly:
        return DataError(f"{root} holds no dataset; {nearly}")
    return DataError(f"{root} holds no dataset; expected dataset.json, or the folders images/ and labels/")


def read_names(root: Path) -> dict[str, Any]:
    """Read names.json of a folder with images/ and labels/, which it need not have.

    Raises:
        DataError: not JSON, or not an object.
    """
    path = root / "names.json"
    return msd.read_dataset_json(path) if path.is_file() else {}


def _checked_names(
    path: Path, content: dict[str, Any], default: list[str]
) -> tuple[tuple[str, ...], dict[int, str]]:
    """Names of channels, and of classes by label value, as `data convert` keeps them."""
    if unknown := sorted(set(content) - {"channels", "classes", *ABOUT}):
        raise DataError(
            f"{path} has the key {unknown[0]!r}; allowed are 'channels' and 'classes' ({', '.join(ABOUT)} beside them): correct its name, or remove it"
        )
    channels, classes = content.get("channels", default), content.get("classes", {})
    whole = isinstance(channels, list) and len(channels) == len(default) and isinstance(classes, dict)
    try:
        named = {int(value): str(name) for value, name in classes.items()} if whole else {}
    except ValueError:
        whole = False
    if negative := [value for value in named if value < 0] if whole else []:
        raise DataError(
            f"{path} names the class {named[negative[0]]!r} as {negative[0]}; classes are 1 and more, 0 is background"
        )
    if not whole:
        raise DataError(
            f"{path} must hold 'channels', a list of {len(default)}, and 'classes', as {{'1': 'liver'}}; correct or remove it"
        )
    return tuple(map(str, channels)), {value: named[value] for value in sorted(named) if value > 0}


def _default_channels(cases: Sequence[Case], num_channels: int) -> list[str]:
    """DICOM says what it is, and CT is scaled by its units; other files say nothing."""
    first = cases[0].images[0] if cases else None
    if num_channels == 1 and first is not None and first.is_dir():
        with suppress(DataError):
            return [open_series(first).modality or "channel 0"]
    return [f"channel {number}" for number in range(num_channels)]


def _usual_channels(cases: Sequence[Case], named: int) -> int:
    """Number of channels of the first images that can be read; what is wrong with others is said later.

    Where they differ it is the number of names, if one has so many, or else that of most.
    """
    numbers: Counter[int] = Counter()
    for case in cases:
        with suppress(DataError, OSError):
            numbers[read_header(case.images[0]).num_channels] += 1
        # One by one they would all be read twice, and a disk may be slow.
        if numbers.total() == _ASKED:
            break
    if named in numbers:
        return named
    return numbers.most_common(1)[0][0] if numbers else 1


def scans_of(folder: Path, *, series: bool = False) -> list[Path]:
    """Scans in a folder; with `series`, folders of DICOM slices too."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; the layout of {folder.parent} needs it")
    folders = {
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name.lower() not in _SYSTEM_FOLDERS
    }
    return sorted(path for path in folder.iterdir() if is_scan(path) or (series and path in folders))


def _by_stem(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Finding]]:
    """One path of each name, and the names that several have, as in two formats."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(stem_of(path), []).append(path)
    findings = []
    for stem, found in groups.items():
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            message = f"{found[0].parent}/{names} are the same case; remove one"
            findings.append(Finding("listed-twice", message, (stem,), found[1]))
    return {stem: found[0] for stem, found in groups.items()}, findings


def _one_of(folder: Path, stem: str) -> Path:
    paths = [folder / (stem + suffix) for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])
