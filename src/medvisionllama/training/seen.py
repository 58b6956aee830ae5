"""Whom a run has seen: the patients by whom its weights were trained or chosen, as its folder tells."""

import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from medvisionllama.config import DataConfig, read_config
from medvisionllama.data.index import Case, Dataset, patient_of
from medvisionllama.data.splits import Selection, Splits, patients_of, read_splits
from medvisionllama.errors import CheckpointError, DataError, command
from medvisionllama.run_dir import RunDir

Seen = dict[str, dict[str, str]]
"""Patient of each case, of those that trained a run and of those that validated it."""


def seen_by(run_dir: RunDir) -> Seen:
    """Cases that trained and validated a run, or any run whose weights it began with.

    Raises:
        CheckpointError: the manifest does not say whom it has seen.
    """
    config, manifest = read_config(run_dir.config), run_dir.read_manifest()
    try:
        named = {part: list(manifest["cases"][part]) for part in ("train", "validation")}
        # They trained as well, if without their labels.
        without_labels: dict[str, str] = manifest["unlabelled"]
        before = seen_before(manifest)
        pattern = config.data.patient_pattern
        seen = {part: {name: patient_of(name, pattern) for name in names} for part, names in named.items()}
        seen["train"] |= without_labels
        return {part: {**before.get(part, {}), **cases} for part, cases in seen.items()}
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{run_dir.manifest} does not say which cases the run has seen, so a leak cannot be excluded; restore it or leave the run out"
        ) from None


def seen_before(manifest: Mapping[str, Any]) -> Seen:
    """Those of the run that a run began with, and of all before it."""
    seen: Seen = (manifest.get("started_from") or {}).get("seen", {})
    return seen


def patients_by_part(run_dir: RunDir, cases: Iterable[Case]) -> dict[str, set[str]]:
    """Patients that trained and validated a run, or any run whose weights it began with.

    Args:
        cases: whose patients are known; of others the run's own pattern tells.

    Raises:
        CheckpointError: the manifest does not say whom it has seen.
    """
    known = {case.case_id: case.patient_id for case in cases}
    return {
        part: {known.get(name, patient) for name, patient in seen.items()}
        for part, seen in seen_by(run_dir).items()
    }


def check_strangers(
    before: RunDir, seen: Seen, config: DataConfig, dataset: Dataset, splits: Splits, selection: Selection
) -> None:
    """Refuse to begin with the weights of a run that knows who is to score the new one.

    Weights that were chosen by a patient may be chosen by the same again, and not tested. Who is excluded may be
    kept for a test of one's own, or be a double of somebody who scores.

    Args:
        seen: by the earlier run.
        config, dataset, splits, selection: of the new run.

    Raises:
        DataError: it has seen one of them, by the case's name or by the patient's.
    """
    known = {part: names_under(cases, config.patient_pattern) for part, cases in seen.items()}
    either = known["train"] | known["validation"]

    theirs = read_config(before.config).data.patient_pattern

    def names_of(cases: Iterable[str]) -> set[str]:
        return names_under({case: dataset.patients[case] for case in cases}, theirs)

    excluded = names_under({case.case_id: case.patient_id for case in dataset.excluded}, theirs)
    clashes = {
        "validates": known["train"] & names_of(selection.validation),
        "tests": either & names_of(selection.test),
        # With nobody to score the run, there is nobody who could be a double of one who does.
        "is excluded from": known["train"] & excluded if selection.validation else set(),
    }
    for what, names in clashes.items():
        if names:
            name = min(names)
            ways = [*_division_of(before, config, name, splits), "begin without that run"]
            raise DataError(
                f"{before.path} has trained on or been chosen by {name!r}, who {what} this run, so the result would leak; {', or '.join(ways)}, or rename the cases if these are other people"
            )


def names_under(cases: Mapping[str, str], pattern: str | None) -> set[str]:
    """Cases, their patients, and their patients as another run's pattern has them: by either, two may be one."""
    names = {*cases, *cases.values()}
    for case in cases:
        # A pattern is made for one dataset's names.
        with suppress(DataError):
            names.add(patient_of(case, pattern))
    return names


def _division_of(before: RunDir, config: DataConfig, name: str, splits: Splits) -> list[str]:
    """How to divide as the earlier run did, if that is a way: its division knows the one who must not score."""
    fold = read_config(before.config).data.fold
    if fold == "all":
        return ["train with --fold all too, which leaves nobody to score the run"]
    try:
        kept = patients_of(read_splits(before.splits))
    except DataError:
        return []
    if not kept & names_under({name: name}, config.patient_pattern):
        return []
    where = f"--set {shlex.quote(f'data.splits={before.splits}')}"
    if patients_of(splits) - kept:
        pattern = ("--patient-pattern", config.patient_pattern) if config.patient_pattern else ()
        excluded = [part for who in config.exclude for part in ("--exclude", who)]
        extend = command("data split", "DATA", "--keep", before.splits, *pattern, *excluded, "--out", "NEW")
        where = f"--set data.splits=NEW, made by {extend},"
    return [f"divide as it did, by {where} and --fold {fold}"]
