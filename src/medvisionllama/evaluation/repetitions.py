"""What many runs measured, patient by patient, and whether two of them may be compared.

A repetition is a run that is done, or a second evaluation of its weights (a variant). Its value for a patient is
the mean over the patient's cases of the mean over classes. The row of all classes merged counts only where it is
all there is. Measures are finite by the rule of empty masks (evaluation.metrics), so one that is not is refused
rather than left out: the arm that went wrong would gain by leaving it out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from medvisionllama.data.labels import FOREGROUND
from medvisionllama.errors import DataError

CELL = ["task", "model", "fraction"]
"""What is held fixed when arms are compared."""
KEYS = ["task", "model", "fraction", "arm", "fold", "seed"]
"""What names a repetition."""
METRICS = ("dice", "nsd", "hd95_mm")
LOWER_IS_BETTER = frozenset({"hd95_mm"})
DECIMALS = 12
"""Values of patients are rounded to these, so that equal ones are ties whatever order they were added up in."""

Key = tuple[str, str, float, str, int, int]


@dataclass(frozen=True)
class Repetition:
    """A finished run, or a variant of one, with its test patients."""

    run_id: str
    splits_sha256: str
    measured: frozenset[tuple[str, str, str]]
    """Patient, case and class of every row."""
    patients: pd.DataFrame
    """One row per patient, one column per metric."""
    volumes: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    """Millilitres of the label, by patient, case and class, where the table has them."""
    num_empty: int = 0
    """Rows of which a mask is empty, where the table says so: their measures are set by rule."""


def finished(
    runs: pd.DataFrame,
    cases: pd.DataFrame,
    *,
    metrics: Sequence[str] = METRICS,
    train_patients: Mapping[str, Collection[str]] | None = None,
) -> dict[Key, Repetition]:
    """Everything that is done, by task, model, fraction, arm, fold and seed.

    Args:
        train_patients: of each run, the patients it was trained or chosen by; given, every run that is done must
            be in it and none of its test patients among them. A variant is looked up as the run it is made of.

    Raises:
        DataError: a run twice, done but without cases, of two splits, tested on patients it was trained on, or
            with a measure that is not a finite number.
    """
    _check_columns(runs, "runs", [*KEYS, "run_id", "state", "splits_sha256"])
    _check_columns(cases, "cases", [*KEYS, "splits_sha256", "patient_id", "case_id", "class", *metrics])
    _check_runs(runs)
    ids = dict(zip(_keys(runs), runs["run_id"].astype(str), strict=True))
    used = of_classes(cases)
    used = used.assign(**{metric: _numbers(used, metric) for metric in metrics})
    rows = {_key(key): group for key, group in used.groupby(KEYS, sort=False)}
    patients = _patients(used, metrics)
    found: dict[Key, Repetition] = {}
    for key, row in zip(_keys(runs), runs.to_dict("records"), strict=True):
        if row["state"] != "done":
            continue
        run_id, sha256 = str(row["run_id"]), str(row["splits_sha256"])
        if key not in rows:
            raise DataError(
                f"run {run_id} is done, but no case of its arm {key[3]!r} was measured; evaluate it again"
            )
        group = rows[key]
        other = next((str(value) for value in group["splits_sha256"] if str(value) != sha256), None)
        if other is not None:
            raise DataError(
                f"run {run_id} was trained on the splits {sha256[:12]}, but its cases were measured on {other[:12]}; evaluate it again"
            )
        if train_patients is not None:
            variant_of = row.get("variant_of")
            source = ids.get((*key[:3], str(variant_of), *key[4:]), run_id) if variant_of else run_id
            if source not in train_patients:
                raise DataError(
                    f"the training patients of run {source} are not known, so its test patients cannot be checked; give them or leave the run out"
                )
            check_no_leak(train_patients[source], group["patient_id"], source)
        names = [tuple(name) for name in group[["patient_id", "case_id", "class"]].itertuples(index=False)]
        if len(set(names)) < len(names):
            raise DataError(f"run {run_id} has a case and class twice in its table; evaluate it again")
        volumes = dict(zip(names, group["volume_ml"], strict=True)) if "volume_ml" in group else {}
        num_empty = int((group["empty"].fillna("") != "").sum()) if "empty" in group else 0
        found[key] = Repetition(run_id, sha256, frozenset(names), patients[key], volumes, num_empty)
    return found


def check_no_leak(train_patients: Collection[str], test_patients: Collection[str], run_id: str) -> None:
    """Refuse a run that was tested on patients it was trained on.

    Raises:
        DataError: it was; names the first of them.
    """
    overlap = sorted(
        {str(patient) for patient in train_patients} & {str(patient) for patient in test_patients}
    )
    if overlap:
        raise DataError(
            f"run {run_id} was tested on {len(overlap)} of its training patients (the first is {overlap[0]!r}), so its results leak; train it on splits by patient"
        )


def check_pair(first: Repetition, second: Repetition) -> None:
    """Refuse to pair two runs that were not tested on the same patients of the same splits.

    Raises:
        DataError: other splits, patients, cases or classes, or other labels.
    """
    a, b = first.splits_sha256[:12], second.splits_sha256[:12]
    if first.splits_sha256 != second.splits_sha256:
        raise DataError(
            f"runs {first.run_id} (splits {a}) and {second.run_id} (splits {b}) have different splits and cannot be compared; train both on one splits.json"
        )
    if first.measured != second.measured:
        patient, case_id, name = min(first.measured ^ second.measured)
        raise DataError(
            f"runs {first.run_id} (splits {a}) and {second.run_id} (splits {b}) were not tested on the same patients: patient {patient!r}, case {case_id!r}, class {name!r} is in one table only; evaluate both again"
        )
    for key in sorted(first.volumes.keys() & second.volumes.keys()):
        mine, other = first.volumes[key], second.volumes[key]
        if abs(mine - other) > 1e-4 * max(abs(mine), abs(other)):
            _, case_id, name = key
            raise DataError(
                f"runs {first.run_id} and {second.run_id} were tested on different labels: class {name!r} of the case {case_id!r} has {mine:.4g} ml and {other:.4g} ml; evaluate both again on the same data"
            )


def _check_columns(frame: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise DataError(f"the table {name} has no column {missing[0]!r}; it needs {', '.join(columns)}")
    empty = [column for column in columns if column in KEYS and frame[column].isna().any()]
    if empty:
        raise DataError(f"the table {name} has an empty cell in the column {empty[0]!r}; fill it in")
    if name == "cases" and len(frame) and not frame["patient_id"].map(lambda value: type(value) is str).all():
        # 007 read as the number 7 is another patient, and would slip through the check for leaks.
        raise DataError(
            f"the table {name} has patient_ids that are not text; read it with patient_id as text"
        )


def _check_runs(runs: pd.DataFrame) -> None:
    twice = runs[runs.duplicated(KEYS, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        same = runs[(runs[KEYS] == first[KEYS]).all(axis=1)]["run_id"]
        raise DataError(
            f"runs {', '.join(map(str, same))} have the same task, model, fraction, arm, fold and seed; leave all but one out"
        )


def of_classes(cases: pd.DataFrame) -> pd.DataFrame:
    """Cases without the rows of all classes merged, where there are others."""
    is_class = cases["class"] != FOREGROUND
    has_classes = is_class.groupby([cases[key] for key in KEYS]).transform("any")
    return cases[is_class | ~has_classes.astype(bool)]


def _numbers(cases: pd.DataFrame, metric: str) -> pd.Series:
    numbers = pd.to_numeric(cases[metric], errors="coerce").astype(float)
    wrong = ~np.isfinite(numbers.to_numpy())
    if wrong.any():
        row = cases[wrong].iloc[0]
        raise DataError(
            f"{metric} of case {row['case_id']!r}, class {row['class']!r} in the arm {row['arm']!r} (fold {row['fold']}, seed {row['seed']}) of {row['task']} is {row[metric]!r} and not a finite number; evaluate that run again"
        )
    return numbers


def patient_values(cases: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean of each patient in each repetition, indexed by KEYS and patient_id; of what `of_classes` left.

    Classes first, then scans: a patient with two scans does not count twice.
    """
    scans = cases.groupby([*KEYS, "patient_id", "case_id"])[list(metrics)].mean()
    return scans.groupby([*KEYS, "patient_id"]).mean().round(DECIMALS)


def _patients(cases: pd.DataFrame, metrics: Sequence[str]) -> dict[Key, pd.DataFrame]:
    values = patient_values(cases, metrics)
    return {
        _key(key): group.droplevel(list(range(len(KEYS)))) for key, group in values.groupby(KEYS, sort=False)
    }


def _keys(frame: pd.DataFrame) -> list[Key]:
    return [_key(row) for row in frame[KEYS].itertuples(index=False, name=None)]


def _key(row: Any) -> Key:
    task, model, fraction, arm, fold, seed = row
    return str(task), str(model), float(fraction), str(arm), int(fold), int(seed)
