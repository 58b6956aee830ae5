"""What a matrix will cost: sizes of every arm, steps, hours and disk, before anything is trained."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvisionllama._files import canonical_hash
from medvisionllama.config import Config
from medvisionllama.data.fingerprint import Fingerprint, fingerprint
from medvisionllama.data.msd_tasks import find_task
from medvisionllama.data.planning import Plan
from medvisionllama.data.resample import shape_at
from medvisionllama.data.splits import Splits, make_splits, select
from medvisionllama.errors import DataError, MedVisionLlamaError, is_out_of_memory
from medvisionllama.experiments.fair import match_run
from medvisionllama.experiments.matrix import PlannedRun
from medvisionllama.experiments.probe import Timing, time_steps
from medvisionllama.experiments.store import Experiment
from medvisionllama.inference.views import views_of
from medvisionllama.inference.windows import window_starts
from medvisionllama.networks.factory import network_sizes
from medvisionllama.networks.sizes import Sizes
from medvisionllama.progress import Progress
from medvisionllama.training.prepare import divide, plan_of
from medvisionllama.training.timetable import total_steps
from medvisionllama.types import SpacingMm, Triple

_DIVIDING = {"path", "modality", "patient_pattern", "exclude", "splits", "split_seed", "num_cases"}
"""Settings that decide which scans there are and who trains on them."""
START_SECONDS = 8.0
"""Of each run, before its first step: Python, libraries, headers, the block."""


@dataclass(frozen=True)
class Scans:
    """What a run sees of its dataset."""

    plan: Plan
    train_cases: int
    validation_cases: int
    test_cases: int
    windows: int
    """Crops that cover the median case."""


@dataclass
class Row:
    """Runs of one task, model and arm."""

    task: str
    model: str
    arm: str
    runs: int = 0
    trainable: int | None = None
    frozen: int | None = None
    gflops: float | None = None
    matched: str = ""
    """Of a matched arm: what it was fitted to, and how near it came."""
    step_seconds: float | None = None
    hours: float | None = None
    """Of all runs, one after the other."""
    gigabytes: float | None = None
    problem: str = ""


@dataclass
class Estimate:
    """The planning table and its sums."""

    rows: list[Row] = field(default_factory=list)
    num_runs: int = 0
    done: int = 0
    prepared_gigabytes: float = 0.0
    """Of scans in the cache, which runs of one dataset and grid share; of datasets that are here."""
    problems: list[str] = field(default_factory=list)

    @property
    def num_unknown(self) -> int:
        """Runs of which something is not known, so that they are not in the sums."""
        return sum(row.runs for row in self.rows if row.problem)

    @property
    def hours(self) -> float | None:
        """Of the known runs, one after the other; None if no row could be timed."""
        known = [row.hours for row in self.rows if row.hours is not None]
        return sum(known) if known else None

    @property
    def gigabytes(self) -> float:
        return sum(row.gigabytes or 0.0 for row in self.rows)


def estimate(
    experiment: Experiment, runs: Sequence[PlannedRun], *, timed: bool, progress: Progress
) -> Estimate:
    """Describe every arm; with `timed`, train each kind of network for about a second.

    What cannot be known here (a dataset that is elsewhere) is left out and said.
    """
    groups: dict[tuple[str, str, str], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.task, run.model, run.arm), []).append(run)
    found = Estimate(num_runs=len(runs))
    known = _Known(experiment)
    with progress.track("sizes and timings" if timed else "sizes", len(groups)) as advance:
        for number, (names, members) in enumerate(groups.items(), start=1):
            row = Row(*names, runs=len(members))
            try:
                _describe(row, members, known, timed=timed)
            except MedVisionLlamaError as error:
                row.problem = str(error)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                row.problem = f"{row.model}, {row.arm}: a step does not fit the memory of this machine"
            found.rows.append(row)
            advance(number, row.arm)
    found.prepared_gigabytes = known.prepared_bytes / 1e9
    found.problems = list(dict.fromkeys(row.problem for row in found.rows if row.problem))
    return found


class _Known:
    """What several rows share: datasets are opened once, networks of one shape are timed once."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._datasets: dict[str, Any] = {}
        self._timings: dict[str, Timing] = {}
        self._sizes: dict[str, Sizes] = {}
        self._prepared: dict[str, dict[str, int]] = {}
        """Bytes of each case, by dataset and grid."""
        self._counted: set[tuple[Any, ...]] = set()

    @property
    def prepared_bytes(self) -> int:
        """Of all scans that `prepare` was told of."""
        return sum(sum(cases.values()) for cases in self._prepared.values())

    def data(self, run: PlannedRun) -> Path:
        """Folder of a run's dataset, there or not."""
        if run.scans.phantoms is not None:
            return self.experiment.data_of(run)
        return self.experiment.data_root / (run.scans.data or "")

    def scans(self, run: PlannedRun, config: Config) -> Scans:
        """The crops and cases of a run."""
        # A fraction takes its share of one division; folds and seeds hardly change how many cases that is.
        whole = config.model_copy(
            update={"data": config.data.model_copy(update={"fraction": 1.0, "fold": 0})}
        )
        key = _division(config)
        if key not in self._datasets:
            try:
                dataset, splits, selection = divide(whole, drawn=whole.data.splits)
                seen = set(dataset.patients) - set(selection.test)
                self._datasets[key] = (dataset, splits, fingerprint(dataset, only=seen))
            except MedVisionLlamaError as error:
                self._datasets[key] = error
        known = self._datasets[key]
        if isinstance(known, MedVisionLlamaError):
            if self.data(run).exists():
                raise known
            if published := _published(run, config):
                return published
            # Which says how to tell where it is.
            self.experiment.data_of(run)
            raise known
        dataset, splits, found = known
        plan = plan_of(dataset, found, config)
        windows = _windows(plan, found, config.inference.overlap)
        return _scans(plan, splits, dataset.patients, config, windows=windows)

    def prepare(self, runs: Sequence[PlannedRun], config: Config, plan: Plan) -> None:
        """Count the scans that the runs of an arm have in the cache, each once for all arms of one grid."""
        known = self._datasets[_division(config)]
        if isinstance(known, MedVisionLlamaError):
            return
        dataset, splits, found = known
        grid = plan.crop_size if plan.resize else plan.spacing_mm
        key = canonical_hash(
            [str(config.data.path), grid, [rule == "dataset" for rule in plan.channel_rules]]
        )
        counted = self._prepared.setdefault(key, {})
        facts = {case.case_id: case for case in found.facts}
        for run in runs:
            # What a fraction leaves out may train without labels.
            all_are_seen = config.unlabelled.scans == "unused"
            fraction = 1.0 if all_are_seen else run.fraction
            number = None if all_are_seen else config.data.num_cases
            seed = None if config.data.splits else run.settings.get("data.split_seed")
            if (place := (key, fraction, number, run.fold, seed)) in self._counted:
                continue
            drawn = splits if seed is None else make_splits(dataset.patients, seed=seed)
            chosen = select(drawn, dataset.patients, fold=run.fold, fraction=fraction, num_cases=number)
            for name in {*chosen.train, *chosen.validation} - counted.keys():
                counted[name] = _prepared_bytes(facts[name].shape, facts[name].spacing_mm, plan)
            self._counted.add(place)

    def sizes(self, config: Config, plan: Plan) -> Sizes:
        """Parameters and operations."""
        key = canonical_hash([_shape_of(config), plan.network_shapes])
        if key not in self._sizes:
            self._sizes[key] = network_sizes(config.network, **plan.network_shapes)
        return self._sizes[key]

    def timing(self, config: Config, plan: Plan) -> Timing:
        """Seconds of a step."""
        train = config.train
        settings = [train.batch_size, train.accumulate, train.precision, train.optimizer]
        key = canonical_hash([_shape_of(config), plan.network_shapes, settings])
        if key not in self._timings:
            self._timings[key] = time_steps(config, plan.network_shapes)
        return self._timings[key]


def _division(config: Config) -> str:
    """A hash that configurations share which divide the same scans."""
    return canonical_hash(config.data.model_dump(mode="json", include=_DIVIDING))


def _shape_of(config: Config) -> dict[str, Any]:
    """The network but for the values of its block: controls that differ in nothing else cost the same."""
    network = config.network.model_dump(mode="json")
    block = network["block"]
    if network["insert"] != "llm":
        network["block"] = None
    elif block["weights"] != "identity":
        # A model's layers are alike but for their values.
        block |= {"weights": "any", "layers": len(block["layers"])}
    return network


def _published(run: PlannedRun, config: Config) -> Scans | None:
    """What is known of a task of the decathlon without its files, if whole scans are resized to one shape."""
    if config.data.geometry != "resize" or config.data.crop_size is None or run.scans.data is None:
        return None
    try:
        task = find_task(run.scans.data.name)
    except DataError:
        return None
    edge = config.network.patch_size
    plan = Plan(
        channels=task.channels,
        classes=dict(enumerate(task.classes, start=1)),
        merged=config.data.labels == "foreground",
        resize=True,
        spacing_mm=(1.0, 1.0, 1.0),
        crop_size=config.data.crop_size,
        strides=((edge, edge, edge), (1, 1, 1), (1, 1, 1)),
        flip_axes=(0,),
    )
    patients = {str(number): str(number) for number in range(task.num_training)}
    return _scans(plan, make_splits(patients), patients, config, windows=1)


def _scans(plan: Plan, splits: Splits, patients: Mapping[str, str], config: Config, *, windows: int) -> Scans:
    # Folds and seeds hardly change how many cases there are.
    chosen = select(splits, patients, fold=0, fraction=config.data.fraction, num_cases=config.data.num_cases)
    return Scans(plan, len(chosen.train), len(chosen.validation), len(chosen.test), windows)


def _describe(row: Row, members: Sequence[PlannedRun], known: _Known, *, timed: bool) -> None:
    data = known.data(members[0])
    by_fraction = {run.fraction: run for run in members}
    counts = Counter(run.fraction for run in members)
    first = members[0]
    config = first.config(data=data)
    plan = known.scans(first, config).plan
    more = {}
    if first.match is not None:
        match = match_run(first, data=data, shapes=plan.network_shapes)
        more = match.settings
        row.matched = f"{first.match.by} of {first.match.arm}: {match.ratio:.3f}"
        config = first.config(data=data, more=more)
    known.prepare(members, config, plan)
    sizes = known.sizes(config, plan)
    row.trainable, row.frozen, row.gflops = sizes.trainable, sizes.frozen, sizes.gflops
    row.gigabytes = len(members) * _bytes(config.train.members * sizes.trainable) / 1e9
    if not timed:
        return
    timing = known.timing(config, plan)
    row.step_seconds = timing.step
    seconds = 0.0
    for fraction, run in by_fraction.items():
        of_run = run.config(data=data, more=more)
        seconds += counts[fraction] * _seconds(of_run, known.scans(run, of_run), timing, len(run.also))
    row.hours = seconds / 3600


def _seconds(config: Config, scans: Scans, timing: Timing, further: int) -> float:
    """Of one run, evaluations included."""
    train = config.train
    steps = total_steps(train, scans.train_cases)
    validation = train.num_validations * scans.validation_cases * scans.windows * timing.forward
    # Networks side by side share the threads that one was timed with.
    training = math.inf if steps is None else train.members * (steps * timing.step + validation)
    if train.max_minutes:
        training = min(training, 60 * train.max_minutes)
    plan = scans.plan
    # A crop stands for the scans, whose shapes are as many as they are.
    views = len(views_of(plan, plan.crop_size, axis=2, flip=config.inference.flip, turn=config.turns_views))
    looks = train.members * (1 + further) * views
    test = looks * scans.test_cases * scans.windows * timing.forward
    return START_SECONDS + training + test


def _windows(plan: Plan, found: Fingerprint, overlap: float) -> int:
    if plan.resize or not found.shapes:
        return 1
    median = [
        sorted(shape[axis] for shape in found.shapes.values())[len(found.shapes) // 2] for axis in range(3)
    ]
    shape = shape_at((median[0], median[1], median[2]), found.median_spacing_mm, plan.spacing_mm)
    return math.prod(
        len(window_starts(size, crop, overlap)) for size, crop in zip(shape, plan.crop_size, strict=True)
    )


def _prepared_bytes(shape: Triple, spacing_mm: SpacingMm, plan: Plan) -> int:
    """Of a scan in the cache: image in float32 and label on the run's grid, and the label on the scan's own."""
    grid = plan.crop_size if plan.resize else shape_at(shape, spacing_mm, plan.spacing_mm)
    native = 0 if grid == shape else math.prod(shape)
    return (4 * len(plan.channels) + 1) * math.prod(grid) + native


def _bytes(trainable: int) -> int:
    """On disk when a run is done: its weights in float32, and about a third of a megabyte of tables and masks."""
    return 4 * trainable + 300_000
