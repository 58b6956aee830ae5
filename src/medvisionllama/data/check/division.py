"""Rules on a splits file: does it fit the dataset, and does an image sit in two of its parts?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medvisionllama.data.check.findings import Finding
from medvisionllama.data.splits import Splits, read_splits
from medvisionllama.errors import DataError


def read_division(path: Path) -> tuple[Splits | None, list[Finding]]:
    """Read splits; what is wrong with the file itself becomes a finding."""
    try:
        return read_splits(path), []
    except DataError as error:
        return None, [Finding("splits", str(error), file=path)]


def division_findings(splits: Splits, patients: Mapping[str, str], path: Path) -> list[Finding]:
    """Patients that the splits do not know, and parts without a patient.

    Args:
        patients: patient of each case.
    """
    found, findings = set(patients.values()), []
    listed: set[str] = set(splits.test)
    outside: dict[str, int] = {}
    empty: dict[str, None] = {}
    for number, fold in enumerate(splits.folds):
        parts = {
            f"train part of fold {number}": fold.train,
            f"validation part of fold {number}": fold.validation,
        }
        parts["test part"] = splits.test
        known = {patient for part in parts.values() for patient in part}
        listed |= known
        for patient in sorted(found - known):
            outside.setdefault(patient, number)
        empty |= {name: None for name, part in parts.items() if not found & set(part)}
    if outside:
        cases = tuple(case for case, owner in patients.items() if owner in outside)
        names = list(outside)
        if len(names) == 1:
            what = f"the patient {names[0]!r} is in no part of fold {outside[names[0]]}"
        else:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            what = f"{len(names)} of {len(found)} patients are in no part ({', '.join(names[:4])}{more})"
        message = f"{path}: {what}; draw new splits for this dataset (medvisionllama data split), or add them to these (its --keep)"
        findings.append(Finding("not-in-splits", message, cases, path))
    if empty:
        message = f"{path}: no patient of the {', '.join(empty)} is in this dataset; draw new splits for it (medvisionllama data split)"
        findings.append(Finding("splits", message, file=path))
    absent = listed - found
    if absent:
        message = (
            f"{path}: {len(absent)} of {len(listed)} patients are not in this dataset, as {min(absent)!r}"
        )
        findings.append(Finding("splits-absent", message, file=path))
    return findings


def leak_findings(
    splits: Splits, patients: Mapping[str, str], duplicates: Sequence[Finding], path: Path
) -> list[Finding]:
    """Say where an image that occurs under several patients is in the test and in training."""
    findings = []
    for finding in duplicates:
        if finding.code != "duplicate-across-patients":
            continue
        tested = [case for case in finding.cases if patients[case] in splits.test]
        trained = [case for case in finding.cases if case not in tested]
        if tested and trained:
            message = f"{path}: the image of {tested[0]}, which is kept for the test, is also {trained[0]}, which is not; remove one and draw new splits"
            findings.append(Finding("splits-leak", message, finding.cases, path))
    return findings
