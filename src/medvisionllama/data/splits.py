"""Who trains, who validates, who is never seen: drawn by patient, from a seed, independent of any model.

The test patients are drawn once; the rest is cut into folds; within a fold the training patients have one random
order, so that a smaller share of them is a subset of every larger one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvisionllama._files import canonical_hash, write_json
from medvisionllama.errors import DataError, command
from medvisionllama.types import FoldName

TEST_SHARE = 0.1
NUM_FOLDS = 5
LEAST_PATIENTS = 3
"""One for each part: who trains, who validates and who tests."""


@dataclass(frozen=True)
class Fold:
    """Patients of one fold; `train` is in the order in which few-shot subsets take them."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """Patients of the test set and of every fold."""

    seed: int
    test: tuple[str, ...]
    folds: tuple[Fold, ...]

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        return {**content, "sha256": canonical_hash(content)}

    @property
    def sha256(self) -> str:
        """Hash of the whole division; runs may be compared only where it is equal."""
        return str(self.to_json()["sha256"])


@dataclass(frozen=True)
class Selection:
    """Case names of one run."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def make_splits(patients: Mapping[str, str], *, seed: int = 0) -> Splits:
    """Divide patients: a tenth to test (at least one), the rest into five folds (fewer if patients are fewer).

    Args:
        patients: patient of each case.

    Raises:
        DataError: fewer than three patients, one for each part.
    """
    unique = sorted(set(patients.values()))
    if len(unique) < LEAST_PATIENTS:
        raise DataError(
            f"a split needs at least {LEAST_PATIENTS} patients (train, validation, test), found {len(unique)}; label more patients, train a single run on all of them without a score (--fold all), or check data.patient_pattern"
        )
    order = [unique[index] for index in np.random.default_rng(seed).permutation(len(unique))]
    num_test = max(1, round(TEST_SHARE * len(order)))
    test, rest = order[:num_test], order[num_test:]
    num_folds = min(NUM_FOLDS, len(rest))
    folds = []
    for number in range(num_folds):
        validation = rest[number::num_folds]
        train = [patient for patient in rest if patient not in set(validation)]
        shuffled = np.random.default_rng([seed, number]).permutation(len(train))
        folds.append(Fold(tuple(train[index] for index in shuffled), tuple(sorted(validation))))
    return Splits(seed, tuple(sorted(test)), tuple(folds))


def undivided(patients: Mapping[str, str], *, seed: int = 0) -> Splits:
    """Everyone trains, in each fold: for `--fold all` of fewer patients than a division needs.

    Of those who are added later, if they are enough, some test and the others validate in one fold each.
    """
    everyone = Fold(tuple(sorted(set(patients.values()))), ())
    return Splits(seed, (), (everyone,) * NUM_FOLDS)


def patients_of(splits: Splits) -> set[str]:
    """Everyone whom a division knows."""
    return {*splits.test, *(patient for fold in splits.folds for patient in (*fold.train, *fold.validation))}


def extend_splits(splits: Splits, patients: Mapping[str, str]) -> Splits:
    """Divide the patients whom a division does not know, and leave all others where they are.

    Newcomers fill the test up to its tenth. The rest validate, each in the fold that has fewest, and train in the
    others behind those who were there, so that a smaller number of cases takes the same ones as before.

    Args:
        patients: patient of each case.
    """
    known = patients_of(splits)
    unknown = sorted(set(patients.values()) - known)
    order = [unknown[index] for index in np.random.default_rng(splits.seed).permutation(len(unknown))]
    num_test = max(0, round(TEST_SHARE * (len(known) + len(unknown))) - len(splits.test))
    test, rest = order[:num_test], order[num_test:]
    validation = [set(fold.validation) for fold in splits.folds]
    for patient in rest:
        min(validation, key=len).add(patient)
    folds = tuple(
        Fold((*fold.train, *(patient for patient in rest if patient not in scores)), tuple(sorted(scores)))
        for fold, scores in zip(splits.folds, validation, strict=True)
        # Of what was not divided before, as many folds as there are patients to validate.
        if scores or not rest
    )
    return Splits(splits.seed, tuple(sorted((*splits.test, *test))), folds)


def select(
    splits: Splits,
    patients: Mapping[str, str],
    *,
    fold: FoldName,
    fraction: float = 1.0,
    num_cases: int | None = None,
) -> Selection:
    """Name the cases of one run.

    Args:
        fold: `all` takes every case, and neither a fraction nor a number.
        fraction: share of the fold's training patients, rounded up.
        num_cases: take whole patients until so many cases are reached, instead of a fraction.

    Raises:
        DataError: no such fold, or patients of the dataset that the splits do not know.
    """
    if fold == "all":
        return Selection(tuple(sorted(patients)), (), ())
    if not 0 <= fold < len(splits.folds):
        raise DataError(
            f"fold {fold} does not exist; this split has folds 0 to {len(splits.folds) - 1}, and all"
        )
    chosen = splits.folds[fold]
    unknown = set(patients.values()) - {*splits.test, *chosen.train, *chosen.validation}
    if unknown:
        raise DataError(
            f"the patient {min(unknown)!r} is in no part of the splits; draw new splits for this dataset, or add the newcomers to these with: {command('data split', 'DATA', '--keep', 'SPLITS', '--out', 'NEW')}"
        )
    cases: dict[str, list[str]] = {}
    for case_id, patient in patients.items():
        cases.setdefault(patient, []).append(case_id)
    train = chosen.train[: math.ceil(fraction * len(chosen.train) - 1e-9)]
    if num_cases is not None:
        train = _first_patients(chosen.train, cases, num_cases)
    parts = (train, chosen.validation, splits.test)
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        if not any(patient in cases for patient in part):
            raise DataError(
                f"no patient of the {name} part of the splits is in this dataset; draw new splits for it"
            )
    return Selection(
        *(tuple(sorted(case for patient in part for case in cases.get(patient, ()))) for part in parts)
    )


def write_splits(splits: Splits, path: Path) -> None:
    write_json(path, splits.to_json())


def read_splits(path: Path) -> Splits:
    """Read splits and verify them.

    Raises:
        DataError: unreadable, changed since they were drawn, or with a patient in two parts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("sha256")
        folds = tuple(Fold(tuple(fold["train"]), tuple(fold["validation"])) for fold in content["folds"])
        splits = Splits(content["seed"], tuple(content["test"]), folds)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; draw splits with: {command('data split', 'DATA', '--out', path)}"
        ) from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} is not a splits file; draw one with: {command('data split', 'DATA', '--out', path)}"
        ) from None
    if splits.sha256 != found:
        raise DataError(
            f"{path} was changed since it was drawn (its sha256 does not match); draw new splits instead of editing"
        )
    for number, fold in enumerate(splits.folds):
        parts = [*fold.train, *fold.validation, *splits.test]
        if len(parts) != len(set(parts)):
            raise DataError(
                f"{path}: fold {number} has a patient in two parts, so results would leak; draw new splits"
            )
    return splits


def _first_patients(
    order: tuple[str, ...], cases: Mapping[str, list[str]], num_cases: int
) -> tuple[str, ...]:
    taken: list[str] = []
    count = 0
    for patient in order:
        if count >= num_cases:
            break
        taken.append(patient)
        count += len(cases.get(patient, ()))
    return tuple(taken)
