"""What a run refuses before it trains, and what it tells the user to look at."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from medvisionllama._files import lock_if_free
from medvisionllama.config import Config
from medvisionllama.data.planning import read_plan
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir
from medvisionllama.training.prepare import PreparedData
from medvisionllama.training.processes import Processes


@contextmanager
def alone_in(run_dir: RunDir, processes: Processes) -> Iterator[None]:
    """Hold a run's folder for this run alone.

    Raises:
        CheckpointError: another one trains in it: a job that was started twice, a terminal that was forgotten.
    """
    with ExitStack() as stack:
        is_free = True
        if processes.is_main:
            # Some disks have no locks, and must not keep anybody from training.
            with suppress(OSError):
                is_free = stack.enter_context(lock_if_free(run_dir.lock, seconds=1.0))
        if processes.any(not is_free):
            raise CheckpointError(
                f"another process is training {run_dir.path}; wait for its end, stop it, or choose another --out"
            )
        yield


def check_still_unused(run_dir: RunDir, processes: Processes, drawn: Path | None = None) -> None:
    """Refuse a folder that another run has filled while the scans were prepared.

    Raises:
        CheckpointError: as `RunDir.check_unused`; its weights would be gone on with under this run's division.
    """
    taken = ""
    if processes.is_main:
        try:
            run_dir.check_unused(drawn)
        except CheckpointError as error:
            taken = str(error)
    if processes.any(bool(taken)):
        raise CheckpointError(taken or f"{run_dir.path} already holds a run")


def check_time_left(config: Config, seconds: float, progress: Progress) -> None:
    """Refuse to train if preparing the scans took all the time of a run; say so if it took a good part.

    Raises:
        ConfigError: nothing would have been learned.
    """
    limit = config.train.max_minutes
    if limit is None or seconds < 6 * limit:
        return
    words = f"preparing the scans took {seconds / 60:.2g} of the {limit:g} minutes of train.max_minutes"
    if seconds >= 60 * limit:
        raise ConfigError(
            f"{words}, so none is left for training; they are kept, so give the same command again, or a larger --max-minutes"
        )
    progress.say(f"{words}; they are kept for the next run")


def say_long_warmup(config: Config, total_steps: int | None, progress: Progress) -> None:
    """Say so if a run limited by epochs or steps ends before its learning rate is anywhere near what was set."""
    warmup = config.train.warmup_steps
    if total_steps is not None and warmup > total_steps / 3:
        progress.say(
            f"look at this: warm-up takes {warmup} of the {total_steps} steps of this run, so it hardly reaches its learning rate; train longer, or give --set train.warmup_steps={total_steps // 10}"
        )


def say_never_found(run_dir: RunDir, num_cases: int, progress: Progress) -> None:
    """Name the classes that the weights which are kept find in no validation case, which a mean Dice hides."""
    if names := run_dir.kept_record().get("never_found"):
        progress.say(
            f"look at this: in {run_dir.path}, {' and '.join(map(repr, names))} was found in none of the {num_cases} validation cases (or of those that have it); train longer, or begin again with another --set train.seed"
        )


def check_unchanged(run_dir: RunDir, data: PreparedData) -> None:
    """Raise CheckpointError if a run that is to go on would see other data than it began with."""
    run_dir.check_same_data(data.hashes)
    before = read_plan(run_dir).decisions.model_dump()
    now = data.plan.decisions.model_dump()
    changed = [name for name, value in now.items() if value != before[name]]
    if changed:
        raise CheckpointError(
            f"the scans, or our rules for them, changed since {run_dir.path} began: its plan differs in {', '.join(changed)}; start a new run"
        )
