"""The folder of an experiment: which runs are done, and which run right now, by files and locks alone.

matrix.yaml             the matrix
experiment.json         where the last launcher had the datasets; each tells its own workers
runs/<id>/              a run folder, as `train` makes it, and:
    lock                held by the process that works on the run; the system frees it however that process ends
    log.txt             what the run said
    trained.json        written when training is over, so that it is not repeated for a further evaluation
    failures.jsonl      one line per failure, with its traceback
    done.json           written last, with the facts of the report
results/                what `experiment report` writes

There is no database and no server: several launchers may share a folder, and killing any process at any moment
leaves a folder that says the truth.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medvisionllama._files import (
    append_json,
    is_locked,
    locked,
    read_json_lines,
    user_cache,
    with_home,
    write_json,
    write_text,
)
from medvisionllama.errors import CheckpointError, ConfigError, DataError, command
from medvisionllama.experiments.matrix import Matrix, PlannedRun, expand, read_matrix, variant_name

State = Literal["planned", "running", "interrupted", "failed", "done"]
STATES: tuple[State, ...] = ("done", "running", "interrupted", "failed", "planned")


class RunFiles:
    """Paths beside those of `RunDir` in the folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.lock = path / "lock"
        self.log = path / "log.txt"
        self.failures = path / "failures.jsonl"
        self.trained = path / "trained.json"
        self.done = path / "done.json"

    def read_done(self) -> dict[str, Any] | None:
        """Facts of a finished run; None if it is not finished."""
        try:
            facts: dict[str, Any] = json.loads(self.done.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise CheckpointError(
                f"{self.done} is damaged; delete it, and `experiment run` evaluates the run again"
            ) from None
        return facts

    def read_failures(self) -> list[dict[str, Any]]:
        """Failures so far; a line cut short by a kill is dropped."""
        try:
            return read_json_lines(self.failures)
        except OSError:
            return []

    def add_failure(self, error: str, traceback: str, *, where: str) -> None:
        """Record why an attempt ended."""
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "where": where,
            "error": error,
            "traceback": traceback,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        append_json(self.failures, record)


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder, its matrix and the root of its datasets."""

    path: Path
    matrix: Matrix
    data_root: Path

    @classmethod
    def create(cls, path: Path, matrix_file: Path, *, data_root: Path | None) -> "Experiment":
        """Make the folder, or open it and take the matrix as it is now.

        Runs whose settings the matrix no longer holds keep their folders; they are in no table.

        Raises:
            ConfigError: the matrix cannot be used, or the folder is that of another experiment.
        """
        matrix = read_matrix(matrix_file)
        # Workers read the file that is about to be replaced: it must be one that they can use.
        expand(matrix)
        root = _root(path, data_root)
        source = matrix_file.read_text(encoding="utf-8")
        kept = path / "matrix.yaml"
        if not kept.is_file() or kept.read_text(encoding="utf-8") != source:
            _check_same_name(kept, matrix, matrix_file)
            write_text(kept, source)
        # The current folder is a guess, and must not outlive a better one.
        told = data_root is not None or bool(os.environ.get("MEDVISIONLLAMA_DATA"))
        if told and _read_facts(path).get("data_root") != str(root):
            write_json(path / "experiment.json", {"data_root": str(root)})
        return cls(path, matrix, root)

    @classmethod
    def look(
        cls, matrix_file: Path, *, out: Path | str | None = None, data_root: Path | None = None
    ) -> "Experiment":
        """Name the folder that `create` would make, and write nothing.

        Args:
            matrix_file: or the folder itself.
            out: by default experiments/NAME.

        Raises:
            ConfigError: a matrix that cannot be used, a folder and another one as `out`, or another experiment's.
        """
        out = None if out is None else with_home(out)
        if matrix_file.is_dir():
            if out is not None and out.resolve() != matrix_file.resolve():
                raise ConfigError(
                    f"{matrix_file} is an experiment's folder already; give its matrix file to use {out}"
                )
            return cls.open(matrix_file, data_root=data_root)
        matrix = read_matrix(matrix_file)
        folder = Path("experiments") / matrix.name if out is None else out
        _check_same_name(folder / "matrix.yaml", matrix, matrix_file)
        return cls(folder, matrix, _root(folder, data_root))

    @classmethod
    def open(cls, path: Path, *, data_root: Path | None = None) -> "Experiment":
        """Open a folder made by `create`."""
        kept = path / "matrix.yaml"
        if not kept.is_file():
            raise CheckpointError(
                f"{path} holds no experiment (no matrix.yaml); begin one with: {command('experiment run', 'MATRIX.yaml', '--out', path)}"
            )
        return cls(path, read_matrix(kept), _root(path, data_root))

    @property
    def results(self) -> Path:
        return self.path / "results"

    def files(self, run_id: str) -> RunFiles:
        """The folder of one run."""
        return RunFiles(self.path / "runs" / run_id)

    def data_of(self, run: PlannedRun) -> Path:
        """The dataset of a run; phantoms are made on first use.

        Raises:
            DataError: no such folder.
        """
        if run.scans.phantoms is not None:
            return phantom_folder(run.scans.phantoms)
        assert run.scans.data is not None, "the matrix checked it"
        folder = self.data_root / run.scans.data
        if not folder.is_dir():
            raise DataError(
                f"task {run.task}: {folder} does not exist; say where the datasets are with --data ROOT or MEDVISIONLLAMA_DATA"
            )
        return folder

    def states(self, runs: Sequence[PlannedRun]) -> dict[str, State]:
        """State of every run, from one look at the folder."""
        present = _names(self.path / "runs")
        return {run.run_id: self._state(run) if run.run_id in present else "planned" for run in runs}

    def is_done(self, run: PlannedRun) -> bool:
        """Whether a run is trained and evaluated, in every way that the matrix asks for by now."""
        facts = self.files(run.run_id).read_done()
        return facts is not None and {variant_name(run.arm, one) for one in run.also} <= set(
            facts["test_dice"]
        )

    def strangers(self, runs: Iterable[PlannedRun]) -> list[str]:
        """Folders of runs that the matrix does not hold (any more)."""
        return sorted(_names(self.path / "runs") - {run.run_id for run in runs})

    def _state(self, run: PlannedRun) -> State:
        files = self.files(run.run_id)
        names = _names(files.path)
        if "done.json" in names and (not run.also or self.is_done(run)):
            return "done"
        if "lock" in names and is_locked(files.lock):
            return "running"
        # A worker that went on after a failure has taken the lock since.
        if "failures.jsonl" in names and not _is_older(files.failures, files.lock):
            return "failed"
        return "interrupted" if "config.yaml" in names else "planned"


def _root(folder: Path, given: Path | None) -> Path:
    """Where datasets lie: as given, MEDVISIONLLAMA_DATA, as before, or the current folder."""
    # What is remembered may be another machine's place, so it comes after what this one says.
    told = os.environ.get("MEDVISIONLLAMA_DATA") or _read_facts(folder).get("data_root")
    root = given or Path(told or Path.cwd())
    return with_home(root).resolve()


def _check_same_name(kept: Path, matrix: Matrix, matrix_file: Path) -> None:
    """Raise ConfigError if a folder's matrix has another name, so that it is no earlier state of this one."""
    before = matrix.name
    # One that is not there, or cannot be read any more, is no other experiment's.
    with suppress(ConfigError):
        before = read_matrix(kept).name
    if before != matrix.name:
        raise ConfigError(
            f"{kept.parent} holds the experiment {before!r}, and {matrix_file} is {matrix.name!r}; give another folder with --out, or write name: {before} in the matrix to go on there"
        )


def phantom_folder(number: int) -> Path:
    """A dataset of artificial scans in the user's cache, made if it is not there."""
    from medvisionllama.data.phantom import write_phantoms

    folder = user_cache() / "phantoms" / str(number)
    if not (folder / "dataset.json").is_file():
        with locked(folder.with_suffix(".lock")):
            if not (folder / "dataset.json").is_file():
                write_phantoms(folder, num_cases=number)
    return folder


def _is_older(path: Path, other: Path) -> bool:
    """Whether a file was changed before another one; not if either is missing."""
    try:
        return path.stat().st_mtime_ns < other.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - ten thousand paths cost more than their names
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads((path / "experiment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
