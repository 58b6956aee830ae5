"""From a dataset's folder to what training needs: division, plan, and preprocessed cases."""

import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from medvisionllama._files import canonical_hash, with_home
from medvisionllama.config import Config
from medvisionllama.data.cache import CachedCase, build_cache, found_classes, label_values
from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.headers import persons_of
from medvisionllama.data.check.rules import uneven_findings
from medvisionllama.data.check.run import dataset_findings
from medvisionllama.data.fingerprint import Fingerprint, fingerprint
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.data.index import Case, Dataset, open_configured, patient_of_stranger
from medvisionllama.data.normalisation import fit_normalisation
from medvisionllama.data.places import fit_places
from medvisionllama.data.planning import AIR, Plan, has_values_of_ct, is_ct, make_plan
from medvisionllama.data.splits import (
    LEAST_PATIENTS,
    Selection,
    Splits,
    make_splits,
    patients_of,
    read_splits,
    select,
    undivided,
)
from medvisionllama.errors import ConfigError, DataError, command
from medvisionllama.inference.inputs import Scan, collect_scans
from medvisionllama.progress import Progress

_LEAST_GRID_DICE = 0.85
"""Of a class on the network's grid; below, a line says what it costs."""


@dataclass(frozen=True)
class PreparedData:
    """Everything a run sees of its data; the test cases appear by name only."""

    splits: Splits
    selection: Selection
    plan: Plan
    train: tuple[CachedCase, ...]
    validation: tuple[CachedCase, ...]
    unlabelled: tuple[CachedCase, ...] = ()

    @property
    def hashes(self) -> dict[str, str]:
        """What must be equal for a run to go on, and for two runs to be compared."""
        content = {
            case.case_id: case.content_sha256 for case in (*self.train, *self.validation, *self.unlabelled)
        }
        return {"splits_sha256": self.splits.sha256, "data_sha256": canonical_hash(content)}


def prepare_data(
    config: Config,
    *,
    drawn: Path | None,
    begun: bool = False,
    progress: Progress,
    check_division: Callable[[Dataset, Splits, Selection], None] | None = None,
) -> PreparedData:
    """Divide, plan from the cases that are not kept for the test, and preprocess this run's.

    Args:
        drawn, begun: see `divide`.
        check_division: may refuse who trains, validates and tests, before a scan is read.

    Raises:
        DataError: the dataset cannot be used as it is.
    """
    dataset, splits, selection = divide(config, drawn=drawn, begun=begun)
    if check_division is not None:
        check_division(dataset, splits, selection)
    seen = [case for case in dataset.cases if case.case_id not in set(selection.test)]
    found = fingerprint(dataset, only={case.case_id for case in seen})
    _say_warnings(dataset, found, progress)
    plan = plan_of(dataset, found, config)
    wanted = {*selection.train, *selection.validation}
    chosen = [case for case in seen if case.case_id in wanted]
    unlabelled = unlabelled_cases(config, dataset, selection, found.facts, progress)
    chosen += unlabelled
    progress.say(_say_division(dataset, selection))
    if unlabelled:
        progress.say(
            f"{len(unlabelled)} more scans train without labels, by masks that the network gives them"
        )
    with progress.track("preparing scans", len(chosen)) as advance:
        counter = iter(range(1, len(chosen) + 1))
        cached = build_cache(chosen, plan, on_case=lambda: advance(next(counter)))
    cases = {case.case_id: case for case in cached}
    if not plan.classes:
        plan = plan.model_copy(update={"classes": found_classes([cases[name] for name in wanted])})
        values = ", ".join(map(str, plan.classes))
        progress.say(f"label values found: {values}; the dataset names no classes, which names.json can do")
        if len(plan.classes) > 1 and not plan.merged:
            own = [(name, label_values(cases[name])) for name in sorted(wanted)]
            for finding in uneven_findings(own):
                progress.say(f"look at this: {finding.message}")
    training = [cases[name] for name in selection.train]
    for line in (
        *_like_ct(training, plan),
        *_untaught(training, plan, config),
        *_too_thin(training, plan),
    ):
        progress.say(f"look at this: {line}")
    rules = fit_normalisation(training, plan.channel_rules)
    plan = plan.with_normalisation(rules, len(training))
    plan = plan.model_copy(update={"places": fit_places(training, merged=plan.merged)})
    for line in plan.lines:
        progress.say(line)
    return PreparedData(
        splits,
        selection,
        plan,
        train=tuple(training),
        validation=tuple(cases[name] for name in selection.validation),
        unlabelled=tuple(case for case in cached if case.case_id not in wanted),
    )


def plan_of(dataset: Dataset, found: Fingerprint, config: Config) -> Plan:
    """Plan as a run of this configuration would; `found` leaves the test cases out.

    Raises:
        ConfigError: settings that do not fit the dataset.
    """
    return make_plan(
        dataset,
        found,
        config.data,
        flip=config.augment.enabled and config.augment.flip == "auto",
        patch_size=None if config.network.head == "skip" else config.network.patch_size,
    )


def plan_from_headers(config: Config) -> Plan:
    """Plan as a run of this configuration would, from the headers of the cases that it may see.

    Raises:
        DataError: the dataset cannot be used as it is.
        ConfigError: settings that do not fit it.
    """
    dataset, _, selection = divide(config, drawn=config.data.splits)
    found = fingerprint(dataset, only=set(dataset.patients) - set(selection.test))
    return plan_of(dataset, found, config)


def divide(config: Config, *, drawn: Path | None, begun: bool = False) -> tuple[Dataset, Splits, Selection]:
    """Open the dataset and say who trains, validates and is kept for the test.

    Args:
        drawn: a splits file to obey; without one, splits are drawn by `data.split_seed`.
        begun: the file is that of a run that has begun: who came into the dataset since is none of its patients.

    Raises:
        ConfigError: channels that are not the dataset's, or more training cases than there are.
        DataError: a dataset or splits that cannot be used.
    """
    assert config.data.path is not None, "checked by the caller"
    dataset = open_configured(config.data, begun=begun)
    if config.data.modality is not None:
        if len(config.data.modality) != len(dataset.channels):
            raise ConfigError(
                f"data.modality names {len(config.data.modality)} channels, the dataset has {len(dataset.channels)}; name each"
            )
        dataset = replace(dataset, channels=config.data.modality)
    splits = read_splits(with_home(drawn)) if drawn else _draw_splits(config, dataset.patients)
    if begun:
        dataset = dataset.only(patients_of(splits))
    patients = dataset.patients
    wanted = config.data.num_cases
    if wanted is not None and config.data.fraction < 1:
        raise ConfigError(
            f"data.num_cases={wanted} and data.fraction={config.data.fraction} both say how much trains; give one of them"
        )
    chosen = select(splits, patients, fold=config.data.fold, fraction=config.data.fraction, num_cases=wanted)
    if wanted is not None and wanted > len(chosen.train):
        raise ConfigError(
            f"data.num_cases={wanted}: fold {config.data.fold} has {len(chosen.train)} training cases; give at most so many, or leave it out to use all"
        )
    return dataset, splits, chosen


def _draw_splits(config: Config, patients: Mapping[str, str]) -> Splits:
    """Who leaves nobody out needs no division, so a single labelled patient is enough."""
    draw = make_splits
    if config.data.fold == "all" and len(set(patients.values())) < LEAST_PATIENTS:
        draw = undivided
    return draw(patients, seed=config.data.split_seed)


def unlabelled_cases(
    config: Config,
    dataset: Dataset,
    selection: Selection,
    facts: Sequence[CaseFacts],
    progress: Progress,
) -> list[Case]:
    """Scans that train without labels: those of a folder, or of the fold's patients whom the run leaves out.

    Args:
        facts: of the dataset's cases, whose PatientIDs tell patients under other names.

    Raises:
        ConfigError: it leaves out none.
        DataError: no scans in the folder, scans that the dataset has with labels, or scans of patients who
            validate, test or are excluded, by their names or by the PatientIDs of DICOM.
    """
    scans = config.unlabelled.scans
    if scans == "none":
        return []
    if scans == "unused":
        # In no part are only training patients whom the run leaves out.
        rest = set(dataset.patients) - {*selection.train, *selection.validation, *selection.test}
        if not rest:
            raise ConfigError(
                "unlabelled.scans=unused, but all training cases of the fold train with their labels; drop it, or leave cases out by --cases or --fraction"
            )
        return [replace(case, label=None) for case in dataset.cases if case.case_id in rest]
    found = collect_scans([scans], channels=dataset.channels)
    # Studies hold series that make no volume, and those have no size.
    if unusable := [scan for scan in found if not scan.num_voxels]:
        progress.say(
            f"{len(unusable)} of {len(found)} scans without labels are left out, since their headers make no volume like the others (the first is {unusable[0].images[0]})"
        )
        found = [scan for scan in found if scan.num_voxels]
    known = {case.case_id for case in (*dataset.cases, *dataset.excluded)}
    kept = {dataset.patients[name] for name in (*selection.validation, *selection.test)}
    # Whoever is excluded may be kept for a test of one's own, or be a double of somebody who validates.
    kept |= {case.patient_id for case in dataset.excluded}
    owned = [(case.patient_id, case.persons) for case in facts]
    persons = _persons_of(kept, owned + [(case.patient_id, persons_of(case)) for case in dataset.excluded])
    cases = [_case_of(scan, config.data.patient_pattern) for scan in found]
    for case, scan in zip(cases, found, strict=True):
        if scan.case_id in known:
            raise DataError(
                f"{scan.images[0]} is named like a case of {dataset.root}, which may be kept for the test; give scans that are not in the dataset, or unlabelled.scans=unused"
            )
        # Another frame of a test patient shows the same anatomy, with a label or without.
        if case.patient_id in kept:
            raise DataError(
                f"{scan.images[0]} is of the patient {case.patient_id!r}, who validates, tests or is excluded from this run; take that patient's scans out of {scans}"
            )
        if persons & persons_of(case):
            raise DataError(
                f"{scan.images[0]} has the PatientID of a patient who validates, tests or is excluded from this run; take that patient's scans out of {scans}"
            )
    return cases


def _persons_of(patients: Collection[str], owned: Iterable[tuple[str, Collection[str]]]) -> set[str]:
    """PatientIDs, hashed, of some patients; one that several have, as the anonymous may, tells nothing.

    Args:
        owned: of each case, its patient and the PatientIDs in its files.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for patient, found in owned:
        for person in found:
            owners[person].add(patient)
    return {person for person, whose in owners.items() if len(whose) == 1 and whose <= set(patients)}


def _case_of(scan: Scan, pattern: str | None) -> Case:
    name, first = scan.case_id, scan.images[0]
    # A pattern is made for the dataset's names; a folder of other scans may have its own.
    patient = patient_of_stranger(name, pattern)
    if isinstance(first, Series):
        return Case(name, patient, (first.folder,), label=None, series=first)
    files = tuple(source for source in scan.images if isinstance(source, Path))
    return Case(name, patient, files, label=None)


def _say_division(dataset: Dataset, selection: Selection) -> str:
    """How many train, validate and are kept for the test."""
    scans = f"{len(dataset.cases)} cases of {len(set(dataset.patients.values()))} patients"
    if not selection.validation:
        return f"{dataset.name}: all {scans} train; none is left to choose weights by or to score the run"
    return f"{dataset.name}: {scans}; {len(selection.train)} train, {len(selection.validation)} validate, {len(selection.test)} are kept for the test"


def _like_ct(cases: Sequence[CachedCase], plan: Plan) -> list[str]:
    """Channels with the values of CT that would be scaled as MRI is, since nothing calls them CT."""
    asked = plan.normalisation_rules or ("auto",) * len(plan.channels)
    like_ct = [
        name
        for number, (name, rule) in enumerate(zip(plan.channels, asked, strict=True))
        if rule == "auto"
        and not is_ct(name)
        and sum(has_values_of_ct(*case.facts["ranges"][number]) for case in cases) > len(cases) / 2
    ]
    if not like_ct:
        return []
    names = ",".join("CT" if name in like_ct else name for name in plan.channels)
    return [
        f"the channel {' and '.join(like_ct)} reaches down to {AIR} and below in most training scans, as CT does, and is scaled scan by scan, as MRI is; if it is CT, stop and give --set {shlex.quote(f'data.modality={names}')}"
    ]


def _too_thin(cases: Sequence[CachedCase], plan: Plan) -> list[str]:
    """Classes that the run's coarser grid cannot hold."""
    if plan.merged or plan.resize:
        return []
    most = {
        name: median(case.facts["grid_dice"].get(str(value), 1.0) for case in having)
        for value, name in plan.classes.items()
        if (having := [case for case in cases if str(value) in case.facts["class_voxels"]])
    }
    thin = {name: dice for name, dice in most.items() if dice < _LEAST_GRID_DICE}
    if not thin:
        return []
    words = ", ".join(f"{name!r} {dice:.2f}" for name, dice in thin.items())
    voxel = "×".join(f"{edge:.3g}" for edge in plan.spacing_mm)
    finest = ",".join(
        f"{min(edges):.3g}" for edges in zip(*(case.native_spacing_mm for case in cases), strict=True)
    )
    return [
        f"at the run's voxels of {voxel} mm true masks themselves keep a Dice of {words} (median of training cases), so predictions will hardly have more; --set data.spacing_mm={finest} has the finest voxels of these scans, in crops that show less"
    ]


def _untaught(cases: Sequence[CachedCase], plan: Plan, config: Config) -> list[str]:
    """Classes that no training case has: no number of steps will teach them."""
    taught = {int(value) for case in cases for value in case.facts["class_voxels"]}
    names = [name for value, name in plan.classes.items() if value not in taught]
    if plan.merged or not names:
        return []
    way = (
        "label it in some, or take it out of the declared classes"
        if config.data.fold == "all"
        else "train on more cases, or on others by another --fold or data.split_seed"
    )
    return [f"no training case has {' or '.join(map(repr, names))}, so the network cannot learn it; {way}"]


def _say_warnings(dataset: Dataset, found: Fingerprint, progress: Progress) -> None:
    """Show what the headers give reason to look at; training goes on."""
    warnings = [
        finding for finding in dataset_findings(found.facts, dataset) if finding.severity == "warning"
    ]
    if warnings:
        more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
        progress.say(
            f"look at this: {warnings[0].message}{more}; see all with: {command('data check', dataset.root)}"
        )
