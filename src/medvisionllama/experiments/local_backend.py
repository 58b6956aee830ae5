"""Workers as processes of this machine, one for each slot, each on cores or a GPU of its own."""

import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from medvisionllama._machine import available_cores
from medvisionllama.devices import thread_limits
from medvisionllama.experiments.launch import Ended
from medvisionllama.experiments.store import Experiment
from medvisionllama.experiments.worker import CORES, command
from medvisionllama.training.interrupts import wait_or_kill

_BYTES_PER_RUN = 4 * 2**30
_CGROUP = Path("/sys/fs/cgroup")
"""Where the system tells of the container (cgroups of version 2)."""


class LocalBackend:
    """Processes on this machine.

    Args:
        slots: workers at a time.
        threads: of each; a slot stays on as many cores of its own where there are enough.
        gpus: names of GPUs, as CUDA_VISIBLE_DEVICES takes them, that slots take turns in.
    """

    def __init__(
        self, experiment: Experiment, *, slots: int, threads: int, gpus: tuple[str, ...] = ()
    ) -> None:
        self.experiment = experiment
        self.num_slots = slots
        self.threads = threads
        self.gpus = gpus
        self._workers: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}

    def start(self, run_id: str) -> None:
        slot = next(slot for slot in range(self.num_slots) if slot not in self._workers)
        files = self.experiment.files(run_id)
        files.path.mkdir(parents=True, exist_ok=True)
        with files.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command(self.experiment.data_root), str(self.experiment.path), run_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._place(slot)},
                # Ctrl-C is for the launcher, which then asks its workers to end.
                start_new_session=True,
            )
        self._workers[slot] = (run_id, process)

    def wait(self, seconds: float) -> list[Ended]:
        deadline = time.monotonic() + seconds
        while True:
            ended = self._collect()
            if ended or time.monotonic() >= deadline:
                return ended
            time.sleep(0.05)

    def stop(self) -> None:
        for _, process in self._workers.values():
            process.send_signal(signal.SIGTERM)
        wait_or_kill(process for _, process in self._workers.values())
        self._workers.clear()

    def _collect(self) -> list[Ended]:
        over = {
            slot: Ended(run_id, process.returncode, platform.node())
            for slot, (run_id, process) in self._workers.items()
            if process.poll() is not None
        }
        for slot in over:
            del self._workers[slot]
        return list(over.values())

    def _place(self, slot: int) -> dict[str, str]:
        place = thread_limits(self.threads)
        cores = available_cores()
        # A launcher that leaves most cores to others (a second launcher, say) leaves the choice to the system too.
        if len(cores) < 2 * self.num_slots * self.threads <= 2 * len(cores):
            mine = cores[slot * self.threads : (slot + 1) * self.threads]
            place[CORES] = ",".join(map(str, mine))
        if self.gpus:
            place["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return place


def choose_place(*, slots: int | None, threads: int | None) -> tuple[int, int, tuple[str, ...]]:
    """Slots, threads of each and GPUs for this machine, as asked or as it has them.

    That is a slot for each GPU, and the cores shared out among the slots; else one thread, and as many slots as
    cores and memory allow. A network of our size gains little from a second thread, and two processes of one thread
    each do more steps.
    """
    import torch

    gpus = visible_gpus(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    cores = min(len(available_cores()), cpu_limit())
    if gpus:
        slots = slots or len(gpus)
        return slots, threads or max(1, cores // slots), gpus
    threads = threads or 1
    return slots or max(1, min(cores // threads, free_memory() // _BYTES_PER_RUN)), threads, ()


def cpu_limit(cgroup: Path = _CGROUP) -> int:
    """Cores that a container may use, at least one; as good as endless without a limit."""
    try:
        quota, period = (int(number) for number in (cgroup / "cpu.max").read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        # No container, or one without a limit, whose cpu.max begins with "max".
        return sys.maxsize
    return max(1, math.ceil(quota / period))


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that new processes may take: of the machine, or of a container that has a limit of its own."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (
            int((cgroup / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current")
        )
        # Files that were read count as used, and give way.
        files = re.search(
            r"^inactive_file (\d+)", (cgroup / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE
        )
    except (OSError, ValueError):
        # No container, or one without a limit, whose memory.max is "max".
        return free
    return min(free, max(0, limit - used + (int(files[1]) if files else 0)))


def visible_gpus(number: int, allotted: str | None) -> tuple[str, ...]:
    """Names of this process's GPUs: those it was allotted, which need not be the machine's first ones.

    >>> visible_gpus(2, "2,3"), visible_gpus(2, None)
    (('2', '3'), ('0', '1'))
    """
    names = [name.strip() for name in (allotted or "").split(",") if name.strip()]
    return tuple(names[:number]) if names else tuple(map(str, range(number)))
