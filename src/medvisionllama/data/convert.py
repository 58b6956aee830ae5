"""`data convert`: the same cases in another layout, for other programs.

    msd      imagesTr/CASE.nii.gz, 4-D if there are several channels; labelsTr/CASE.nii.gz; dataset.json
    nnunet   imagesTr/CASE_0000.nii.gz, one 3-D file per channel; labelsTr/CASE.nii.gz; dataset.json
    plain    images/CASE.nii.gz, or one file per channel; labels/CASE.nii.gz; names.json for channels and classes

Case names stay, so a split made on one layout is the split of all. Unlabelled scans in imagesTs come along.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medvisionllama._files import write_json
from medvisionllama.data import msd
from medvisionllama.data.channels import (
    SUFFIX,
    Transfer,
    is_flat,
    lay_on,
    lies_otherwise,
    merge,
    pass_on,
    relabel,
    split,
)
from medvisionllama.data.folder import ABOUT, is_nnunet, read_names, scans_of
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.index import Case, Dataset, open_dataset
from medvisionllama.data.readers import read_label, stem_of
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.progress import Progress, Silent

Layout = Literal["msd", "nnunet", "plain"]


@dataclass(frozen=True)
class _Plan:
    dataset: Dataset
    layout: Layout
    new_values: dict[int, int]
    """Label values by those they had, where they change."""
    tests: tuple[Case, ...]
    about: dict[str, str]


def convert(
    source: Path | str,
    out: Path | str,
    *,
    to: Layout,
    transfer: Transfer = "link",
    renumber: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a dataset in another layout, with the same cases, voxels, geometry and names.

    The folder appears when it is whole, or not at all.

    Args:
        out: a folder that does not exist yet; for nnU-Net named as `Dataset004_Hippocampus`.
        transfer: how files that need no change come along: hard links where the disk allows, symbolic links,
            or copies.
        renumber: let the label values be 1, 2, 3, ... for nnU-Net, which takes no others.

    Raises:
        ConfigError: no such layout or way, or `renumber` for another layout than nnU-Net's.
        DataError: no dataset, an `out` that exists, values that nnU-Net does not take, or a file that is damaged.
    """
    source, out = Path(source), Path(out)
    _check_asked(to, transfer, renumber=renumber)
    _check_out(out, to, transfer)
    plan = _plan(open_dataset(source), to, renumber=renumber)
    with _whole_folder(out) as folder:
        _write(plan, folder, transfer, progress or Silent())
        _compare(plan, folder)
    return out


def _check_asked(to: str, transfer: str, *, renumber: bool) -> None:
    """Raise ConfigError for what is no layout or no way, or means nothing together."""
    for name, value, known in (("to", to, get_args(Layout)), ("transfer", transfer, get_args(Transfer))):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown; choose from {', '.join(known)}")
    if renumber and to != "nnunet":
        raise ConfigError(f"only nnU-Net needs values numbered anew; leave --renumber out for {to}")


def _check_out(out: Path, to: Layout, transfer: Transfer) -> None:
    if os.path.lexists(out):
        raise DataError(f"{out} exists already; remove it or choose another folder")
    if to == "nnunet" and not re.fullmatch(r"Dataset\d{3}_\w[\w-]*", out.name):
        raise DataError(
            f"{out.name!r} is no name that nnU-Net looks for; write OUT as a number of three digits and a name, such as {out.parent / 'Dataset104_Name'}"
        )
    if to == "msd" and transfer == "symlink":
        raise DataError(
            "an MSD folder must not lead outside itself, which symbolic links would do; leave --symlink out for hard links, or give --copy"
        )


def _plan(dataset: Dataset, to: Layout, *, renumber: bool) -> _Plan:
    is_plain = not (dataset.root / "dataset.json").is_file()
    content = read_names(dataset.root) if is_plain else msd.read_dataset_json(dataset.root / "dataset.json")
    about = {key: content[key] for key in ABOUT if isinstance(content.get(key), str)}
    return _Plan(
        dataset,
        to,
        _new_values(dataset, renumber=renumber) if to == "nnunet" else {},
        _test_cases(dataset, content, with_folders=is_plain),
        {"name": dataset.name, **about},
    )


def _new_values(dataset: Dataset, *, renumber: bool) -> dict[int, int]:
    values = sorted(dataset.classes)
    if values == list(range(1, len(values) + 1)):
        return {}
    if not renumber:
        raise DataError(
            f"{dataset.root} has the label values {', '.join(map(str, values))}, and nnU-Net takes only 1, 2, 3, ... without gaps; give --renumber to number them anew (dataset.json then keeps the old values)"
        )
    return {value: number for number, value in enumerate(values, start=1)}


def _test_cases(dataset: Dataset, content: dict[str, Any], *, with_folders: bool) -> tuple[Case, ...]:
    """Unlabelled scans: those in imagesTs, and those an MSD folder lists elsewhere.

    Args:
        with_folders: a folder in imagesTs is a scan too, one DICOM series, as in images/.
    """
    root = dataset.root
    # One channel may have its number in the file's name too.
    numbered = any(len(case.images) > 1 or _has_number(case) for case in dataset.cases)
    per_channel = numbered or is_nnunet(root, content)
    listed = content.get("test")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
    paths = {msd.inside(root, name) for name in names if isinstance(name, str)}
    folder = root / "imagesTs"
    if folder.is_dir():
        paths |= set(scans_of(folder, series=with_folders))
    groups: dict[str, list[Path]] = {}
    for path in sorted(path for path in paths if path.exists()):
        stem = stem_of(path)
        groups.setdefault(re.sub(r"_\d{4}$", "", stem) if per_channel else stem, []).append(path)
    for case_id, images in groups.items():
        expected = len(dataset.channels) if per_channel else 1
        if len(images) != expected:
            raise DataError(
                f"{images[0].parent}: the unlabelled case {case_id!r} has {len(images)} files where {expected} are expected; add or remove files"
            )
    return tuple(Case(case_id, case_id, tuple(images), None) for case_id, images in groups.items())


def _has_number(case: Case) -> bool:
    return stem_of(case.images[0]) == f"{case.case_id}_0000"


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that becomes it, or disappears."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".partial-{secrets.token_hex(8)}-{out.name}"
    folder.mkdir()
    try:
        yield folder
        if os.path.lexists(out):
            raise DataError(f"{out} has been made by somebody else meanwhile; choose another folder")
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(plan: _Plan, folder: Path, transfer: Transfer, progress: Progress) -> None:
    images, labels = ("images", "labels") if plan.layout == "plain" else ("imagesTr", "labelsTr")
    tests = [(case, "imagesTs") for case in plan.tests]
    work = [*((case, images) for case in plan.dataset.cases), *tests]
    for name in {images, labels, *(name for _, name in tests)}:
        (folder / name).mkdir()
    found: set[int] = set()
    with progress.track(f"writing {plan.layout} layout", len(work)) as advance:
        for done, (case, name) in enumerate(work, start=1):
            _write_images(plan, case, folder / name, transfer)
            if case.label is not None:
                target = folder / labels / f"{case.case_id}{SUFFIX}"
                found |= _write_label(plan, case.label, case.images[0], target, transfer)
            advance(done, case.case_id)
    if plan.layout == "plain":
        write_json(folder / "names.json", _names(plan))
    else:
        make: Callable[[_Plan], dict[str, Any]] = _msd_json if plan.layout == "msd" else _nnunet_json
        if plan.layout == "nnunet" and not plan.dataset.classes:
            plan = replace(plan, dataset=replace(plan.dataset, classes=_found_classes(plan.dataset, found)))
        write_json(folder / "dataset.json", make(plan))


def _write_images(plan: _Plan, case: Case, folder: Path, transfer: Transfer) -> None:
    if plan.layout == "nnunet":
        num = len(plan.dataset.channels)
        targets = [folder / f"{case.case_id}_{channel:04d}{SUFFIX}" for channel in range(num)]
        if len(case.images) == 1 and (num > 1 or not is_flat(case.images[0])):
            split(case.images[0], targets)
            return
        for source, target in zip(case.images, targets, strict=True):
            pass_on(source, target, transfer)
    elif len(case.images) == 1:
        pass_on(case.images[0], folder / f"{case.case_id}{SUFFIX}", transfer)
    elif plan.layout == "plain":
        for channel, source in enumerate(case.images):
            pass_on(source, folder / f"{case.case_id}_{channel:04d}{SUFFIX}", transfer)
    else:
        merge(case.images, folder / f"{case.case_id}{SUFFIX}")


def _write_label(plan: _Plan, source: Path, image: ScanSource, target: Path, transfer: Transfer) -> set[int]:
    """Write the label of an image; for nnU-Net, look at its values and return them."""
    if lies_otherwise(source, image):
        # NIfTI has no place for crops: what 3D Slicer left out is background.
        lay_on(source, image, target)
        source = target
    if plan.layout != "nnunet":
        if source != target:
            pass_on(source, target, transfer)
        return set()
    found = {int(value) for value in np.unique(read_label(source).array)} - {0}
    undeclared = found - set(plan.dataset.classes)
    if plan.dataset.classes and undeclared:
        raise DataError(
            f"{source} holds the value {min(undeclared)}, which is no class of the dataset ({', '.join(map(str, plan.dataset.classes))}), and nnU-Net refuses such labels; correct the label, or name the class in dataset.json"
        )
    if plan.new_values:
        relabel(source, target, plan.new_values)
    elif not is_flat(source):
        split(source, [target])
    elif source != target:
        pass_on(source, target, transfer)
    return found


def _found_classes(dataset: Dataset, found: set[int]) -> dict[int, str]:
    values = sorted(found)
    if values != list(range(1, len(values) + 1)):
        raise DataError(
            f'{dataset.root} names no classes and its labels hold {", ".join(map(str, values))}, where nnU-Net takes only 1, 2, 3, ... without gaps; name the classes in {dataset.root / "names.json"}, as {{"classes": {{"1": "liver"}}}}, and give --renumber'
        )
    return {value: f"class {value}" for value in values}


def _channels(plan: _Plan) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(plan.dataset.channels)}


def _names(plan: _Plan) -> dict[str, Any]:
    classes = {str(value): name for value, name in plan.dataset.classes.items()}
    return {**plan.about, "channels": list(plan.dataset.channels), "classes": classes}


def _msd_json(plan: _Plan) -> dict[str, Any]:
    cases = plan.dataset.cases
    return {
        **plan.about,
        "tensorImageSize": "4D" if len(plan.dataset.channels) > 1 else "3D",
        "modality": _channels(plan),
        "labels": {
            "0": "background",
            **{str(value): name for value, name in plan.dataset.classes.items()},
        },
        "numTraining": len(cases),
        "numTest": len(plan.tests),
        "training": [
            {"image": f"./imagesTr/{case.case_id}{SUFFIX}", "label": f"./labelsTr/{case.case_id}{SUFFIX}"}
            for case in cases
        ],
        "test": [f"./imagesTs/{case.case_id}{SUFFIX}" for case in plan.tests],
    }


def _nnunet_json(plan: _Plan) -> dict[str, Any]:
    names = _unique_names(plan.dataset.classes)
    content = {
        **plan.about,
        "channel_names": _channels(plan),
        "labels": {
            "background": 0,
            **{name: plan.new_values.get(value, value) for value, name in names.items()},
        },
        "numTraining": len(plan.dataset.cases),
        "file_ending": SUFFIX,
    }
    if plan.new_values:
        content["values_before_renumbering"] = {name: value for value, name in names.items()}
    return content


def _unique_names(classes: dict[int, str]) -> dict[int, str]:
    """Names as keys: where two classes share one, or take a word of nnU-Net's own, the value tells them apart."""
    taken = list(classes.values())
    return {
        value: f"{name} ({value})" if name in {"background", "ignore"} or taken.count(name) > 1 else name
        for value, name in classes.items()
    }


def _compare(plan: _Plan, folder: Path) -> None:
    """Read the result as anybody will, and make sure that it is the same dataset."""
    before, after = plan.dataset, open_dataset(folder)
    if before.patients != after.patients:
        different = sorted(before.patients.items() ^ after.patients.items())[0][0]
        raise DataError(
            f"the case {different!r} would have another name or patient in the {plan.layout} layout; rename it in {before.root}"
        )
    if len(before.channels) != len(after.channels):
        raise DataError(
            f"{before.root} names {len(before.channels)} channels and its files have {len(after.channels)}; correct 'modality' in dataset.json"
        )
