"""One run of an experiment in a process of its own: train, evaluate, write done.json.

python -m medvisionllama.experiments.worker [--data ROOT] FOLDER RUN_ID

Exit codes: 0 done (perhaps long ago), 1 failed (the traceback is in failures.jsonl), 2 no such run, 3 another
process works on it, 130 interrupted with everything saved. SIGTERM saves and ends; so does the death of the parent
process, so that a launcher that was killed leaves nobody behind.
"""

import argparse
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from medvisionllama.training.interrupts import INTERRUPTED, sigterm_as_ctrl_c

COMMAND = ("-P", "-m", "medvisionllama.experiments.worker")
"""Arguments of Python, before the folder and the run's id."""
DONE, FAILED, UNKNOWN, TAKEN = 0, 1, 2, 3
CORES = "MEDVISIONLLAMA_CORES"
"""Environment variable that names the cores a worker is to stay on, as 0,1."""


def command(data_root: Path) -> tuple[str, ...]:
    """Arguments of Python for the workers of a launcher that has the datasets at `data_root`.

    The folder is shared with launchers that may have them elsewhere, so it cannot say where this one does.
    """
    return (*COMMAND, f"--data={data_root}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Work on one run and return the exit code."""
    parser = argparse.ArgumentParser(description="Work on one run of an experiment.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("run_id")
    parser.add_argument("--data", type=Path, help="folder under which the datasets lie")
    parser.add_argument("--wait", type=float, default=5.0, help="seconds to wait for another process's lock")
    given = parser.parse_args(arguments)
    _stay_on_cores(os.environ.get(CORES, ""))
    _end_with_parent()
    sigterm_as_ctrl_c()
    # Imported here: cores and threads must be chosen before PyTorch starts.
    from medvisionllama.experiments.store import RunFiles

    try:
        return _work(given.folder, given.run_id, given.data, given.wait)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the record of this run
        shown = traceback.format_exc()
        _say(shown)
        reason = " ".join(str(error).split()) or type(error).__name__
        files = RunFiles(given.folder / "runs" / given.run_id)
        files.add_failure(reason, shown, where=platform.node())
        return FAILED


def _work(folder: Path, run_id: str, data_root: Path | None, seconds_to_wait: float) -> int:
    from medvisionllama._files import lock_if_free
    from medvisionllama.experiments.matrix import expand
    from medvisionllama.experiments.store import Experiment

    experiment = Experiment.open(folder, data_root=data_root)
    run = next((run for run in expand(experiment.matrix) if run.run_id == run_id), None)
    if run is None:
        _say(f"{run_id} is no run of {folder} (any more)")
        return UNKNOWN
    with lock_if_free(experiment.files(run_id).lock, seconds=seconds_to_wait) as free:
        if not free:
            return TAKEN
        if experiment.is_done(run):
            return DONE
        # Tells failures of before from those of this attempt; where nothing is locked, there is no file yet.
        experiment.files(run_id).lock.touch()
        from medvisionllama.experiments.execute import execute
        from medvisionllama.progress import Lines

        return DONE if execute(experiment, run, progress=Lines(_say)) else INTERRUPTED


def _stay_on_cores(text: str) -> None:
    if text and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(number) for number in text.split(",")})


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
