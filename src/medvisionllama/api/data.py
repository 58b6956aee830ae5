"""What the command line does with datasets, before a run: `medvisionllama data`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvisionllama._files import check_file_name, with_home
from medvisionllama.config import load_config
from medvisionllama.config.load import parse_overrides
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.progress import Progress

if TYPE_CHECKING:
    from medvisionllama.data.check.report import CheckReport
    from medvisionllama.data.planning import Plan
    from medvisionllama.data.splits import Splits


def check(
    data: Path | str,
    *,
    fast: bool = False,
    splits: Path | str | None = None,
    patient_pattern: str | None = None,
    exclude: str | Sequence[str] = (),
    html: Path | str | None = None,
    progress: Progress | None = None,
) -> "CheckReport":
    """Find what would break or mislead training on a dataset, or on scans without labels.

    Args:
        fast: read headers only.
        splits: a splits file that must fit the dataset.
        patient_pattern: regular expression whose first group is the patient in a case's name.
        exclude: cases and patients to leave out, as `data.exclude` does in training.
        html: where to write a page with pictures of every case.

    Returns:
        Findings and facts; `report.ok` is False when training must not start.

    Raises:
        DataError: there is nothing to check.
        ConfigError: `html` is a folder.
    """
    from medvisionllama.data.check.run import check_dataset

    pictures = None
    if html is not None:
        check_file_name(with_home(html), "check.html")
        from medvisionllama.reports.check_page import write_check_page
        from medvisionllama.reports.thumbnails import Thumbnails

        pictures = Thumbnails()
    report = check_dataset(
        with_home(data),
        fast=fast,
        splits=None if splits is None else with_home(splits),
        patient_pattern=patient_pattern,
        exclude=[exclude] if isinstance(exclude, str) else exclude,
        look=pictures,
        progress=progress,
    )
    if html is not None and pictures is not None:
        write_check_page(report, with_home(html), pictures)
    return report


def fingerprint(data: Path | str) -> dict[str, Any]:
    """Describe a dataset by its headers: cases, channels, classes, shapes, spacings, and the plan that follows.

    Raises:
        DataError: headers that do not fit together.
    """
    from medvisionllama.config import DataConfig
    from medvisionllama.data.fingerprint import fingerprint as read
    from medvisionllama.data.index import open_dataset
    from medvisionllama.data.planning import make_plan

    dataset = open_dataset(with_home(data))
    found = read(dataset)
    decided = make_plan(dataset, found, DataConfig(), flip=True, patch_size=None)
    shapes = list(found.shapes.values())
    spacings = Counter(found.spacings_mm.values()).most_common(5)
    return {
        "name": dataset.name,
        "cases": len(dataset.cases),
        "patients": len(set(dataset.patients.values())),
        "channels": list(dataset.channels),
        "classes": {str(value): name for value, name in dataset.classes.items()},
        "shape_min": [min(shape[axis] for shape in shapes) for axis in range(3)],
        "shape_max": [max(shape[axis] for shape in shapes) for axis in range(3)],
        "spacings_mm": {" × ".join(f"{edge:g}" for edge in spacing): count for spacing, count in spacings},
        "planned_spacing_mm": list(decided.spacing_mm),
        "planned_crop": list(decided.crop_size),
        "planned_strides": [list(stride) for stride in decided.strides],
        "mirrored_axes": list(decided.flip_axes),
        "reasons": decided.reasons,
    }


def split(
    data: Path | str,
    *,
    out: Path | str | None = None,
    seed: int | None = None,
    keep: Path | str | None = None,
    patient_pattern: str | None = None,
    exclude: str | Sequence[str] = (),
) -> "Splits":
    """Divide the patients into test and five folds, and write them with a hash.

    Args:
        out: the splits file, which `data.splits` takes; by default nothing is written.
        seed: 0 by default.
        keep: splits of fewer patients, all of whom stay where they are; the new ones are added to them.
        patient_pattern: regular expression whose first group is the patient in a case's name.
        exclude: cases and patients to leave out.

    Raises:
        DataError: a dataset that cannot be divided, or `out` is there and holds anything else.
        ConfigError: a seed below zero, or one for splits that are kept, which have their own.
    """
    from medvisionllama.data.index import open_dataset
    from medvisionllama.data.splits import extend_splits, make_splits, read_splits, write_splits

    if keep is not None and seed is not None:
        raise ConfigError(f"{keep} has its own seed, by which new patients are added; leave --seed out")
    if seed is not None and seed < 0:
        raise ConfigError(f"seed={seed}: a seed is 0 or more")
    excluded = [exclude] if isinstance(exclude, str) else exclude
    dataset = open_dataset(with_home(data), patient_pattern=patient_pattern, exclude=excluded)
    if keep is None:
        splits = make_splits(dataset.patients, seed=seed or 0)
    else:
        splits = extend_splits(read_splits(with_home(keep)), dataset.patients)
    if out is None:
        return splits
    out = with_home(out)
    if out.exists():
        # What is damaged or no division at all is left alone too.
        with suppress(DataError):
            if out.is_file() and read_splits(out) == splits:
                return splits
        raise DataError(
            f"{out} is there and holds another division, to which runs may refer, or something else; choose another --out, or remove it"
        )
    write_splits(splits, out)
    return splits


def plan(
    data: Path | str, *, preset: str = "small", overrides: str | Sequence[str] | Mapping[str, Any] = ()
) -> "Plan":
    """Decide from headers what a training would decide; `plan.lines` says why.

    Raises:
        MedVisionLlamaError: a dataset or settings that cannot be used as they are.
    """
    from medvisionllama.training.prepare import plan_from_headers

    return plan_from_headers(
        load_config(preset, {"data.path": with_home(data), **parse_overrides(overrides)})
    )
