"""Running what is left of an experiment: a queue, a backend that starts workers, and retries.

Whether a run is done is read from its folder, never remembered: so finished runs are skipped, launchers can share a
folder, and any of them may be killed.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from medvisionllama._files import is_locked
from medvisionllama.experiments.matrix import PlannedRun
from medvisionllama.experiments.store import Experiment
from medvisionllama.experiments.worker import DONE, FAILED, TAKEN, UNKNOWN
from medvisionllama.progress import Advance, Progress
from medvisionllama.training.interrupts import INTERRUPTED, interruptible

_SECONDS_BETWEEN_LOOKS = 1.0
_LOOKS_BETWEEN_ASKING = 5
"""A run that another launcher holds is asked for again after so many looks."""


@dataclass(frozen=True)
class Ended:
    """A worker that is over."""

    run_id: str
    exit_code: int | None
    """As `worker.py` lists them; None or negative if it was killed."""
    where: str = ""
    """Host or node it ran on."""


class Backend(Protocol):
    """Starts workers somewhere."""

    @property
    def num_slots(self) -> int:
        """Workers at a time; a cluster may grow or shrink."""

    def start(self, run_id: str) -> None:
        """Begin a run."""

    def wait(self, seconds: float) -> list[Ended]:
        """Return the workers that ended, after at most so many seconds."""

    def stop(self) -> None:
        """Ask all workers to save and end, and wait until they have."""


@dataclass
class Outcome:
    """What a launch did."""

    done: int = 0
    """Runs finished, by this launcher or another, since it began."""
    skipped: int = 0
    """Runs that were finished before."""
    dropped: int = 0
    """Runs that the matrix, changed meanwhile, does not hold any more."""
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False
    folder: str = ""
    """Of the experiment."""


def launch(
    experiment: Experiment,
    runs: Sequence[PlannedRun],
    backend: Backend,
    *,
    retries: int = 1,
    progress: Progress,
) -> Outcome:
    """Work until every run is done or has failed `retries` times more than once; Ctrl-C stops with all saved.

    A run that another launcher works on is left to it, and taken over if that launcher dies.
    """
    states = experiment.states(runs)
    todo = {run.run_id: run for run in runs if states[run.run_id] != "done"}
    outcome = Outcome(skipped=len(runs) - len(todo), folder=str(experiment.path))
    # What was done before took no time of this launch, and must not shorten the time left.
    with interruptible() as stopped, progress.track("runs", max(1, len(todo))) as advance:
        _Launch(experiment, todo, backend, retries, progress, advance, outcome).work(stopped)
    return outcome


@dataclass
class _Launch:
    """State of one call of `launch`."""

    experiment: Experiment
    runs: dict[str, PlannedRun]
    """Those that were not done when it began."""
    backend: Backend
    retries: int
    progress: Progress
    advance: Advance
    outcome: Outcome
    active: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    """Runs that another launcher holds."""
    failures: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.todo = deque(self.runs)

    def work(self, stopped: Callable[[], bool]) -> None:
        looks = 0
        try:
            while (self.todo or self.active or self.elsewhere) and not stopped():
                while self.todo and len(self.active) < self.backend.num_slots:
                    run_id = self.todo.popleft()
                    self.backend.start(run_id)
                    self.active.add(run_id)
                for ended in self.backend.wait(_SECONDS_BETWEEN_LOOKS):
                    self.active.discard(ended.run_id)
                    self._settle(ended)
                looks += 1
                if looks % _LOOKS_BETWEEN_ASKING == 0:
                    self._ask_for_taken()
        finally:
            # Also when the launcher itself fails: nobody is left behind.
            self.backend.stop()
        self.outcome.interrupted = stopped()

    def _settle(self, ended: Ended) -> None:
        run_id = ended.run_id
        if ended.exit_code == DONE:
            self.outcome.done += 1
            self._tell(f"{run_id}: done{self._dice(run_id)}")
        elif ended.exit_code == TAKEN:
            self.elsewhere.add(run_id)
        elif ended.exit_code == INTERRUPTED:
            self.todo.append(run_id)
        elif ended.exit_code == UNKNOWN:
            self.outcome.dropped += 1
            self._tell(f"{run_id}: left out, since the matrix changed and does not hold it any more")
        else:
            self._fail(ended)

    def _fail(self, ended: Ended) -> None:
        run_id, files = ended.run_id, self.experiment.files(ended.run_id)
        if ended.exit_code != FAILED:
            # A process that was killed could not write down why.
            code = ended.exit_code
            how = "lost" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            files.add_failure(
                f"the worker ended without a word ({how}); see {files.log}", "", where=ended.where
            )
        self.failures[run_id] += 1
        failures = files.read_failures()
        reason = failures[-1]["error"] if failures else "unknown"
        if self.failures[run_id] <= self.retries:
            self.todo.append(run_id)
            self.progress.say(f"{run_id}: failed, will be tried again: {reason}")
        else:
            self.outcome.failed.append(run_id)
            self._tell(f"{run_id}: failed: {reason}")

    def _ask_for_taken(self) -> None:
        """See what became of the runs that another launcher holds."""
        for run_id in sorted(self.elsewhere):
            if self.experiment.is_done(self.runs[run_id]):
                self.outcome.done += 1
                self._tell(f"{run_id}: done by another launcher{self._dice(run_id)}")
            elif is_locked(self.experiment.files(run_id).lock):
                continue
            else:
                self.todo.append(run_id)
            self.elsewhere.discard(run_id)

    def _tell(self, line: str) -> None:
        self.progress.say(line)
        outcome = self.outcome
        note = f"{len(outcome.failed)} failed" if outcome.failed else ""
        self.advance(outcome.done + outcome.dropped + len(outcome.failed), note)

    def _dice(self, run_id: str) -> str:
        facts = self.experiment.files(run_id).read_done() or {}
        return "".join(f", test Dice {dice:.4f} ({arm})" for arm, dice in facts.get("test_dice", {}).items())
