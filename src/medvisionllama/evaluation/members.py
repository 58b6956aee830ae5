"""Runs that are measured as one: none may have seen the scored patients, and their files have own names."""

import hashlib
from collections.abc import Collection, Sequence

from medvisionllama.config import read_config
from medvisionllama.data.index import Case, Dataset
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.evaluation.evaluate import Split
from medvisionllama.run_dir import RunDir
from medvisionllama.training.seen import names_under, patients_by_part

_LONGEST_NAME = 100


def check_distinct(members: Sequence[RunDir]) -> None:
    """Raise ConfigError if a run is given twice and would count twice."""
    places = [member.path.resolve() for member in members]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(
                f"{members[number].path} is given twice and would count twice; give each run once"
            )


def check_unseen(
    members: Sequence[RunDir], dataset: Dataset, scored: Collection[Case], *, split: Split
) -> None:
    """Refuse an ensemble of which a member was trained, or chosen, by a patient that is to be scored.

    Patients of the validation split may have validated other members too, as each run validates on its own.

    Args:
        dataset: of the first member, whose cases are scored.

    Raises:
        DataError: a member has seen a patient.
        CheckpointError: its manifest does not say whom it has seen.
    """
    patients: dict[str, dict[str, str]] = {}
    for case in scored:
        patients.setdefault(case.patient_id, {})[case.case_id] = case.patient_id
    parts = ("train", "validation") if split == "test" else ("train",)
    for member in members:
        seen = patients_by_part(member, (*dataset.cases, *dataset.excluded))
        pattern = read_config(member.config).data.patient_pattern
        names = {patient: names_under(cases, pattern) for patient, cases in patients.items()}
        for part in parts:
            both = sorted(patient for patient in patients if names[patient] & seen[part])
            if both:
                raise DataError(
                    f"{member.path} has {len(both)} of the {len(patients)} {split} patients among its {part} patients (the first is {both[0]!r}), so the result would leak; give runs of the same splits{' and fold' if split == 'validation' else ''}"
                )


def name_ensemble(first: RunDir, also: Sequence[RunDir]) -> str:
    """Name the further runs for a file: `with-fold1-fold2`; a run from another folder gets a few digits more."""
    if not also:
        return ""
    names = []
    for run_dir in also:
        path = run_dir.path.resolve()
        elsewhere = path.parent != first.path.resolve().parent
        names.append(path.name + (f"-{_digits(str(path))}" if elsewhere else ""))
    name = "-".join(sorted(names))
    return f"with-{name}" if len(name) <= _LONGEST_NAME else f"with-{len(also)}-runs-{_digits(name)}"


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
