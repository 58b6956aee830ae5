"""Tables of measures: predicted files against label files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from medvisionllama._files import write_text
from medvisionllama.config import Config
from medvisionllama.data.index import Dataset, open_configured, patient_of
from medvisionllama.data.labels import FOREGROUND, may_be_cropped, on_one_grid, whole_label
from medvisionllama.data.readers import read_label
from medvisionllama.data.volume import Volume, same_place, shear_fault, to_ras
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.evaluation.masks import Pair, by_name, check_values, classes_of, read_mask
from medvisionllama.evaluation.metrics import measure
from medvisionllama.progress import Progress, Silent
from medvisionllama.run_dir import RunDir
from medvisionllama.types import MaskArray

Split = Literal["test", "validation"]


def evaluate_files(
    pairs: Sequence[Pair],
    classes: dict[int, str],
    *,
    merged: bool = False,
    tolerance_mm: float,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure every pair: one row per case and class, and one for all classes merged.

    Args:
        merged: the predictions know one foreground only, so the labels' classes are merged before comparing.

    Raises:
        DataError: a prediction on another grid than its label.
    """
    rows: list[dict[str, Any]] = []
    with (progress or Silent()).track("measuring", len(pairs)) as advance:
        for number, pair in enumerate(pairs, start=1):
            predicted, truth = read_pair(pair, classes, merged=merged)
            names = {"case_id": pair.case_id, "patient_id": pair.patient_id}
            rows += [
                {**names, **row, "tolerance_mm": tolerance_mm}
                for row in measure_classes(predicted, truth, classes, tolerance_mm=tolerance_mm)
            ]
            advance(number)
    return pd.DataFrame(rows)


def open_dataset_of(run_dir: RunDir, config: Config, split: Split, *, instead: str) -> Dataset:
    """Open the dataset of a run that has cases of a split.

    Raises:
        ConfigError: a run that trained on every case, so that none is left; with what to do instead.
        DataError: the dataset has moved, or cannot be read.
    """
    if config.data.fold == "all":
        raise ConfigError(
            f"{run_dir.path} trained on all labelled cases (data.fold=all), so it has no {split} cases; {instead}"
        )
    assert config.data.path is not None, "fit wrote it"
    if not config.data.path.is_dir():
        raise DataError(
            f"the dataset of {run_dir.path} is no longer at {config.data.path}; put it back there, or correct data.path in {run_dir.config}"
        )
    return open_configured(config.data, begun=True)


def parts_of(run_dir: RunDir) -> dict[str, str]:
    """Part of a run that each of its cases belongs to; training patients that a fraction left out have none.

    By the run's manifest: neither who came into the dataset's folder since, nor a new scan of a patient, is in any.
    """
    return {name: part for part, names in run_dir.read_cases().items() for name in names}


def read_pair(pair: Pair, classes: dict[int, str], *, merged: bool = False) -> tuple[Volume, Volume]:
    """Read a predicted mask and the true one, in RAS and on one grid.

    Raises:
        DataError: a prediction on another grid than its label, or a value that is no class's.
    """
    # Merged, a label's segments are foreground whatever they are called.
    stored = read_label(pair.label) if merged or pair.by_value else read_mask(pair.label, classes)
    # A label may be stored with other axes than its image, and the mask has the image's.
    predicted, truth = to_ras(read_mask(pair.prediction, classes)), to_ras(stored)
    # The mask lies on its scan's grid; either may be stored as the part that holds segments.
    truth = whole_label(pair.label, truth, predicted.shape, predicted.affine)
    predicted = whole_label(pair.prediction, predicted, truth.shape, truth.affine)
    if may_be_cropped(pair.prediction) and may_be_cropped(pair.label):
        predicted, truth = on_one_grid(predicted, truth)
    _same_grid(pair, predicted, truth)
    check_values(pair.prediction, predicted, classes)
    if not merged and pair.declared:
        check_values(pair.label, truth, classes)
    return predicted, merged_foreground(truth) if merged else truth


def merged_foreground(label: Volume) -> Volume:
    """All classes of a label as one."""
    return Volume((label.array > 0).astype(np.uint8), label.affine)


def measure_classes(
    predicted: Volume, truth: Volume, classes: dict[int, str], *, tolerance_mm: float
) -> Iterable[dict[str, Any]]:
    """One row per class, then the merged foreground."""
    spacing_mm, voxel_ml = truth.spacing_mm, truth.voxel_ml
    axes = truth.affine[:3, :3] if shear_fault(truth.affine) else None

    def row(name: str, a: MaskArray, b: MaskArray) -> dict[str, Any]:
        measures = measure(a, b, spacing_mm, tolerance_mm=tolerance_mm, voxel_ml=voxel_ml, axes=axes)
        return {"class": name, **asdict(measures)}

    # Two masks at a time: those of a hundred classes of a large CT would take tens of gigabytes.
    for value, name in classes.items():
        yield row(name, predicted.array == value, truth.array == value)
    if len(classes) > 1:
        yield row(FOREGROUND, predicted.array > 0, truth.array > 0)


def evaluate_folders(
    predictions: Path,
    labels: Path,
    *,
    merged: bool = False,
    tolerance_mm: float = 1.0,
    patient_pattern: str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure masks against labels of the same names.

    Class names come from a dataset.json beside the labels folder, if there is one.

    Args:
        merged: the masks know one foreground only, as those of the presets `paper` and `reference`.
        patient_pattern: finds the patient in a file's name; by default frames, visits and the like are one patient.

    Raises:
        DataError: no file in common, a prediction without a label, or a name that the pattern does not match.
    """
    predicted, truth = by_name(predictions), by_name(labels)
    missing = sorted(predicted.keys() - truth.keys())
    if missing:
        raise DataError(
            f"{predicted[missing[0]]} has no label of that name in {labels}; rename it or remove it"
        )
    if not predicted:
        raise DataError(f"{predictions} holds no mask; give the folder that `medvisionllama predict` wrote")
    pairs = [
        Pair(name, patient_of(name, patient_pattern), predicted[name], truth[name])
        for name in sorted(predicted)
    ]
    left_out = len(truth.keys() - predicted.keys())
    if left_out and progress:
        progress.say(f"{left_out} labels in {labels} have no prediction and are left out")
    classes = {1: FOREGROUND} if merged else classes_of(labels, pairs)
    return evaluate_files(pairs, classes, merged=merged, tolerance_mm=tolerance_mm, progress=progress)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, whole or not at all."""
    write_text(path, table.to_csv(index=False, float_format="%.9g"))


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of `write_table`; names of digits (case 007) stay names."""
    names = dict.fromkeys(("case_id", "patient_id", "class", "empty"), str)
    return pd.read_csv(path, keep_default_na=False, dtype=names)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Of each class, mean Dice over patients with its 95 % bootstrap interval, median and quartiles over cases."""
    from medvisionllama.evaluation.statistics import bootstrap_interval, patient_means

    rows = []
    for name, group in table.groupby("class", sort=False):
        dices, patients = group["dice"].tolist(), group["patient_id"].tolist()
        low, high = bootstrap_interval(dices, patients)
        row: dict[str, Any] = {
            "class": name,
            "cases": len(group),
            "dice_mean": patient_means(dices, patients).mean(),
            "dice_low": low,
            "dice_high": high,
        }
        for column in ("dice", "nsd", "hd95_mm"):
            row |= {
                f"{column}_median": group[column].median(),
                f"{column}_q1": group[column].quantile(0.25),
                f"{column}_q3": group[column].quantile(0.75),
            }
        rows.append({**row, "empty": int((group["empty"] != "").sum())})
    return pd.DataFrame(rows)


def mean_class_dice(table: pd.DataFrame) -> pd.Series:
    """Mean Dice over classes of each case; the merged foreground counts only where it is all there is."""
    classes = table[table["class"] != FOREGROUND]
    return (table if classes.empty else classes).groupby("case_id")["dice"].mean()


def _same_grid(pair: Pair, predicted: Volume, truth: Volume) -> None:
    if predicted.shape != truth.shape:
        raise DataError(
            f"{pair.prediction} has shape {predicted.shape}, its label {truth.shape}; a mask must lie on its scan's own grid"
        )
    if not same_place(truth.affine, predicted.affine, truth.shape):
        raise DataError(
            f"{pair.prediction} has another affine than its label {pair.label}; a mask must lie on its scan's own grid"
        )


def mean_dice(table: pd.DataFrame) -> float:
    """Mean class Dice of a table: over the classes of a case, the cases of a patient, and patients."""
    patients = table.groupby("case_id")["patient_id"].first()
    return float(mean_class_dice(table).groupby(patients).mean().mean())


def to_json(table: pd.DataFrame, more: Mapping[str, Any]) -> str:
    """A table, its summary and more facts for machines."""
    return json.dumps(
        {
            "mean_class_dice": mean_dice(table),
            # pandas writes what is not a number as null, which JSON has, and not as NaN, which it has not.
            "classes": json.loads(summarise(table).to_json(orient="records")),
            "cases": json.loads(table.to_json(orient="records")),
            **more,
        },
        indent=2,
    )
