"""The process between a launcher and a Ray cluster, started by `RayBackend`.

It is a process of its own because Ray writes to the terminal, takes SIGTERM for itself, tries for minutes to reach
a cluster that does not answer, and aborts the process when the head of the cluster dies.

It reads from stdin its settings as a line of JSON, then the id of a run to start in each line; the end of stdin
ends all runs, with everything saved. To stdout it writes lines of JSON: {"joined": true}, {"slots": 4} once the
nodes are found fit and whenever it changes, {"ended": run_id, "exit_code": 0, "where": node}, {"say": text}, and
{"error": text} before it gives up.
"""

import fcntl
import json
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvisionllama.errors import ClusterError
from medvisionllama.experiments.ray_node import code_version, work
from medvisionllama.experiments.ray_nodes import Nodes
from medvisionllama.experiments.store import RunFiles
from medvisionllama.training.interrupts import INTERRUPTED

Tell = Callable[[dict[str, Any]], None]
_SECONDS_BETWEEN_LOOKS = 0.2
_LOOKS_BETWEEN_NODES = 10
_SECONDS_TO_STOP = 150.0
_LOSSES = 3
"""A run goes on elsewhere this often when its node is lost; after that it may be what the nodes die of."""
_PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MEDVISIONLLAMA_DATA", "MEDVISIONLLAMA_CACHE")


@dataclass(frozen=True)
class Settings:
    """What the launcher asks for."""

    folder: str
    token: str
    """File in it that nodes look for; the driver holds its lock."""
    address: str
    cpus_per_run: float
    gpus_per_run: float
    folders: list[str]
    cwd: str
    """The launcher's current folder, from which a matrix may name files."""
    worker: list[str]
    """Arguments of Python, before the folder and the run's id."""


@dataclass
class _Task:
    run_id: str
    node_id: str = ""


class Driver:
    """Runs as tasks of a cluster."""

    def __init__(self, settings: Settings, nodes: Nodes, tell: Tell) -> None:
        import ray

        self.settings = settings
        self.nodes = nodes
        self.tell = tell
        self._work = ray.remote(work)
        self._tasks: dict[Any, _Task] = {}
        self._losses: Counter[str] = Counter()
        self._slots = -1

    def serve(self, inbox: "queue.Queue[str | None]") -> None:
        """Start what the inbox names and tell what ends, until it holds None."""
        looks = 0
        while True:
            if looks % _LOOKS_BETWEEN_NODES == 0:
                for line in self.nodes.look():
                    self.tell({"say": line})
                self._tell_slots()
            looks += 1
            # Ray waits for tasks or we wait for messages, never both: so neither for long.
            with suppress(queue.Empty):
                message = inbox.get(timeout=0.0 if self._tasks else _SECONDS_BETWEEN_LOOKS)
                while message is not None:
                    self._start(message)
                    message = inbox.get_nowait()
                return
            self._collect(_SECONDS_BETWEEN_LOOKS)
            self._tell_slots()

    def stop(self) -> None:
        """Cancel all tasks, and wait until their runs have saved."""
        import ray

        for stream in self._tasks:
            ray.cancel(stream)
        deadline = time.monotonic() + _SECONDS_TO_STOP
        while self._tasks and time.monotonic() < deadline:
            self._collect(_SECONDS_BETWEEN_LOOKS)

    def _start(self, run_id: str) -> None:
        settings = self.settings
        options = self._work.options(
            num_cpus=settings.cpus_per_run,
            num_gpus=settings.gpus_per_run,
            # The launcher alone decides what is tried again.
            max_retries=0,
            num_returns="streaming",
            scheduling_strategy="SPREAD",
            label_selector=self.nodes.selector(),
        )
        stream = options.remote(
            [*settings.worker, settings.folder, run_id],
            str(self._files(run_id).log),
            cwd=settings.cwd,
            threads=max(1, int(settings.cpus_per_run)),
            uses_gpu=settings.gpus_per_run > 0,
            environment={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        )
        self._tasks[stream] = _Task(run_id)

    def _collect(self, seconds: float) -> None:
        import ray

        if not self._tasks:
            return
        ready, _ = ray.wait(list(self._tasks), num_returns=1, timeout=seconds, fetch_local=False)
        for stream in ready:
            task = self._tasks[stream]
            try:
                value = ray.get(next(stream))
            except (ray.exceptions.RayError, StopIteration) as error:
                self._end(stream, self._code_of(task, error))
                continue
            if task.node_id:
                self._end(stream, value)
            else:
                task.node_id = value

    def _end(self, stream: Any, exit_code: int | None) -> None:
        task = self._tasks.pop(stream)
        where = self.nodes.name(task.node_id)
        self.tell({"ended": task.run_id, "exit_code": exit_code, "where": where})

    def _code_of(self, task: _Task, error: Exception) -> int | None:
        """Exit code of a run whose task failed: interrupted if its node or Ray's process there was lost."""
        import ray

        if isinstance(error, ray.exceptions.TaskCancelledError):
            return INTERRUPTED
        if isinstance(error, ray.exceptions.NodeDiedError):
            self.nodes.lost(task.node_id)
        lines = str(error).strip().splitlines() or ["no reason given"]
        where = self.nodes.name(task.node_id) or "the cluster"
        if isinstance(error, ray.exceptions.RayTaskError):
            # Our own code failed on the node: no word of a run, and no use in repeating it for ever.
            self._note(task.run_id, f"could not run on {where}: {lines[-1]}")
            return None
        self._note(task.run_id, f"lost on {where}: {lines[0].partition('. ')[0]}")
        self._losses[task.run_id] += 1
        return INTERRUPTED if self._losses[task.run_id] <= _LOSSES else None

    def _note(self, run_id: str, line: str) -> None:
        log = self._files(run_id).log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def _tell_slots(self) -> None:
        if self.nodes.slots != self._slots:
            self._slots = self.nodes.slots
            self.tell({"slots": self._slots})

    def _files(self, run_id: str) -> RunFiles:
        return RunFiles(Path(self.settings.folder) / "runs" / run_id)


def connect(address: str) -> None:
    """Join a cluster that runs.

    Raises:
        ClusterError: there is none, or it is none that this machine and version can join.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if address == "auto":
            raise ClusterError(
                "no Ray cluster runs on this machine; start one with `ray start --head`, join one with `ray start --address HOST:PORT`, or give --address"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"cannot join the Ray cluster at {address} ({reason}); this machine must be one of its nodes: ray start --address {address}"
        ) from error


@contextmanager
def _token(path: Path) -> Iterator[None]:
    """Make a file and hold its lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def main() -> int:
    """Serve one launcher."""
    # What Ray prints, at whatever level, goes where stderr goes: to a file.
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        # The launcher may be gone; its runs still have to be ended.
        with suppress(BrokenPipeError):
            told.write(json.dumps(message) + "\n")

    # Unbuffered: a thread that waits in a buffered stdin would be in the way of the interpreter's end.
    lines = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    settings = Settings(**json.loads(lines.readline()))
    inbox: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            inbox.put(line.decode().strip())
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        connect(settings.address)
        tell({"joined": True})
        with _token(Path(settings.token)):
            nodes = Nodes(
                settings.cpus_per_run, settings.gpus_per_run, settings.token, settings.folders, code_version()
            )
            nodes.check()
            driver = Driver(settings, nodes, tell)
            try:
                driver.serve(inbox)
            finally:
                driver.stop()
    except ClusterError as error:
        tell({"error": str(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
