"""The verbs of `medvisionllama experiment` as functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch

from medvisionllama._files import with_home
from medvisionllama.data.splits import read_splits
from medvisionllama.errors import ConfigError
from medvisionllama.experiments.estimate import Estimate, estimate
from medvisionllama.experiments.launch import Backend, Outcome, launch
from medvisionllama.experiments.matrix import PlannedRun, expand
from medvisionllama.experiments.store import Experiment, State
from medvisionllama.progress import Progress, Silent
from medvisionllama.run_dir import RunDir


def plan(
    matrix: Path | str,
    *,
    data: Path | str | None = None,
    probe: bool = True,
    threads: int = 1,
    progress: Progress | None = None,
) -> Estimate:
    """Say what a matrix will cost; nothing is written but phantoms, into the user's cache.

    Args:
        probe: train every kind of network for about a second, to tell hours.
        threads: of a run, for the probe.

    Raises:
        ConfigError: a matrix that cannot be used.
    """
    matrix = with_home(matrix)
    experiment = Experiment.look(matrix, data_root=None if data is None else with_home(data))
    runs = expand(experiment.matrix)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = estimate(experiment, runs, timed=probe, progress=progress or Silent())
    finally:
        torch.set_num_threads(before)
    states = experiment.states(runs)
    found.done = sum(state == "done" for state in states.values())
    return found


def run(
    matrix: Path | str,
    *,
    out: Path | str | None = None,
    data: Path | str | None = None,
    backend: Literal["local", "ray"] = "local",
    address: str | None = None,
    slots: int | None = None,
    threads: int | None = None,
    gpus_per_run: float | None = None,
    retries: int = 1,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Train and evaluate every run that is not done yet.

    Args:
        matrix: the matrix file, or the experiment's folder.
        out: the experiment's folder; by default experiments/NAME.
        data: folder under which the matrix's datasets lie; by default MEDVISIONLLAMA_DATA, or as before.
        backend: processes of this machine, or the nodes of a Ray cluster.
        address: of the Ray cluster; by default RAY_ADDRESS, or one that runs on this machine.
        slots: runs at a time on this machine; by default one for each GPU, or as many as cores and memory allow.
        threads: of each run; by default 1, or with GPUs the cores shared out among the slots.
        gpus_per_run: of a Ray cluster, by default none; 0.5 lets two runs share one.
        retries: how often a failed run is tried again.
        only: patterns of run ids, as "*-small-*"; by default all.

    Raises:
        MedVisionLlamaError: anything the user can fix, in one line.
    """
    matrix = with_home(matrix)
    root = None if data is None else with_home(data)
    _check_backend(backend, address=address, slots=slots, gpus_per_run=gpus_per_run)
    experiment = Experiment.look(matrix, out=out, data_root=root)
    chosen = select_runs(expand(experiment.matrix), only)
    # A dataset, a division or an earlier run that is not there would fail a hundred runs one by one. Of what is
    # done nothing is needed any more.
    states = experiment.states(chosen)
    left = [one for one in chosen if states[one.run_id] != "done"]
    datasets = {experiment.data_of(one): one.scans for one in {one.task: one for one in left}.values()}
    # Phantoms are made anew on a node that has none.
    needed = [folder for folder, scans in datasets.items() if scans.phantoms is None]
    _check_splits(experiment, left)
    starts = _earlier_runs(experiment, left)
    if not matrix.is_dir():
        experiment = Experiment.create(experiment.path, matrix, data_root=root)
    elif root is not None:
        experiment = Experiment.create(matrix, matrix / "matrix.yaml", data_root=root)
    workers = _make_backend(
        experiment,
        backend,
        address=address,
        slots=slots,
        threads=threads,
        gpus_per_run=gpus_per_run,
        folders=[*needed, *starts],
    )
    return launch(experiment, chosen, workers, retries=retries, progress=progress or Silent())


def _check_splits(experiment: Experiment, runs: Sequence[PlannedRun]) -> None:
    """Read the divisions that runs name; those that have begun have their own.

    Raises:
        ConfigError: one has fewer folds than a run needs.
        DataError: one cannot be read.
    """
    folds: dict[str, int] = {}
    for one in runs:
        has_begun = RunDir(experiment.files(one.run_id).path).config.is_file()
        if (file := one.settings.get("data.splits")) and not has_begun:
            folds[file] = max(folds.get(file, 0), one.fold)
    for file, fold in folds.items():
        number = len(read_splits(with_home(file)).folds)
        if fold >= number:
            raise ConfigError(
                f"{file} has {number} folds, and the matrix asks for fold {fold}; drop it from folds"
            )


def _earlier_runs(experiment: Experiment, chosen: Sequence[PlannedRun]) -> list[Path]:
    """Folders of the runs that others are to begin with; those that have begun have the weights in their own.

    Raises:
        CheckpointError: there is no such run.
    """
    wanted = set()
    for one in chosen:
        files = experiment.files(one.run_id)
        has_begun = files.trained.is_file() or RunDir(files.path).state.is_file()
        if (start := one.settings.get("train.start_from")) and not has_begun:
            wanted.add(with_home(start))
    for start in wanted:
        RunDir(start).check()
    return sorted(wanted)


@dataclass(frozen=True)
class Status:
    """Where an experiment is."""

    experiment: Experiment
    runs: tuple[PlannedRun, ...]
    states: dict[str, State]

    def count(self, state: State) -> int:
        """Runs in a state."""
        return sum(found == state for found in self.states.values())

    def failures(self) -> dict[str, str]:
        """The last error of each failed run."""
        failed = [run_id for run_id, state in self.states.items() if state == "failed"]
        records = {run_id: self.experiment.files(run_id).read_failures() for run_id in failed}
        return {run_id: found[-1]["error"] if found else "" for run_id, found in records.items()}

    def seconds_left(self) -> float | None:
        """At the mean pace of the finished runs most like them, in as many slots as work now.

        None if nothing works, or nothing is done to judge by.
        """
        working = self.count("running")
        done = [(run, self._facts(run)) for run in self.runs if self.states[run.run_id] == "done"]
        if not working or not done:
            return None
        alike: dict[tuple[str, str, float], list[PlannedRun]] = {}
        for run in self.runs:
            if self.states[run.run_id] != "done":
                alike.setdefault((run.task, run.model, run.fraction), []).append(run)
        return sum(len(runs) * _usual_seconds(runs[0], done) for runs in alike.values()) / working

    def _facts(self, run: PlannedRun) -> dict[str, Any]:
        return self.experiment.files(run.run_id).read_done() or {}


def _usual_seconds(run: PlannedRun, done: Sequence[tuple[PlannedRun, dict[str, Any]]]) -> float:
    """What finished runs of the same task, model and fraction took, or as near to these as there are any.

    Epochs take the longer the more cases train: those of another fraction are counted by its share.
    """
    near = [one for one in done if (one[0].task, one[0].model) == (run.task, run.model)] or done
    near = [one for one in near if one[0].fraction == run.fraction] or near
    train = run.config(data=Path()).train
    by_epochs = train.epochs is not None and train.max_steps is None
    longest = math.inf if train.max_minutes is None else 60 * train.max_minutes
    seconds = 0.0
    for other, facts in near:
        share = run.fraction / other.fraction if by_epochs else 1.0
        seconds += min(share * facts.get("seconds", 0.0), longest) + facts.get("evaluation_seconds", 0.0)
    return seconds / len(near)


def status(matrix: Path | str, *, out: Path | str | None = None) -> Status:
    """Look at every run of an experiment.

    Args:
        matrix: the matrix file, or the experiment's folder.
    """
    experiment = Experiment.look(with_home(matrix), out=out)
    runs = expand(experiment.matrix)
    return Status(experiment, tuple(runs), experiment.states(runs))


def report(
    matrix: Path | str,
    *,
    out: Path | str | None = None,
    reference: str | None = None,
    family: Literal["report", "task"] = "report",
    pages: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Compare the arms of an experiment, and write a page with its tables as CSV and LaTeX.

    Args:
        matrix: the matrix file, or the experiment's folder.
        reference: the arm to compare with; by default the matrix's. Another one's page goes to a folder of its own.
        family: comparisons that Holm's correction takes together: all of a measure, or those of each task, whose
            page goes to results/by-task.
        pages: write the page of each run too, with its overlays.

    Returns:
        The page.

    Raises:
        DataError: runs that must not be compared: other splits, or patients both in training and test.
        CheckpointError: damaged runs, or a folder without an experiment.
    """
    from medvisionllama.experiments.reporting import report_experiment

    experiment = Experiment.look(with_home(matrix), out=out)
    # A page of nothing, in a folder that nobody meant, would hide a forgotten --out.
    Experiment.open(experiment.path)
    return report_experiment(
        experiment, reference=reference, family=family, pages=pages, progress=progress or Silent()
    )


def select_runs(runs: Sequence[PlannedRun], patterns: Sequence[str]) -> list[PlannedRun]:
    """Runs whose id fits a pattern.

    Raises:
        ConfigError: a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatch(run.run_id, pattern) for run in runs):
            raise ConfigError(f"--only {pattern!r} fits no run; ids look like {runs[0].run_id}")
    return [run for run in runs if not patterns or any(fnmatch(run.run_id, one) for one in patterns)]


def _check_backend(
    kind: Literal["local", "ray"], *, address: str | None, slots: int | None, gpus_per_run: float | None
) -> None:
    """Refuse options without effect, before anything is written."""
    if kind == "ray" and slots is not None:
        raise ConfigError("slots has no effect on a Ray cluster: its CPUs and GPUs decide; drop --slots")
    if kind == "local" and (address is not None or gpus_per_run is not None):
        option = "address" if address is not None else "gpus_per_run"
        raise ConfigError(f"{option} has no effect on this machine's own processes; add --backend ray")


def _make_backend(
    experiment: Experiment,
    kind: Literal["local", "ray"],
    *,
    address: str | None,
    slots: int | None,
    threads: int | None,
    gpus_per_run: float | None,
    folders: Sequence[Path],
) -> Backend:
    from medvisionllama.experiments.local_backend import LocalBackend, choose_place

    if kind == "ray":
        from medvisionllama.experiments.ray_backend import RayBackend
        from medvisionllama.experiments.worker import command

        return RayBackend(
            experiment.path,
            address=address,
            cpus_per_run=threads or 1,
            gpus_per_run=gpus_per_run or 0.0,
            folders=folders,
            worker=command(experiment.data_root),
        )
    slots, threads, gpus = choose_place(slots=slots, threads=threads)
    return LocalBackend(experiment, slots=slots, threads=threads, gpus=gpus)
