"""Members of an ensemble: networks of one run that train side by side, each in a process of its own.

The run's own folder is the first member; the others lie in `members/2` and so on, and are runs like any other but
for the seed. On a CPU they share the cores: two networks in one thread each take a third more steps than one in two
threads. A further member's process is told what to train on its standard input, and ends, saved, when that closes:
so whatever ends the first one, nobody is left behind.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import torch

from medvisionllama.config import Config, read_config
from medvisionllama.devices import thread_limits
from medvisionllama.errors import ConfigError, OtherProcessError
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir
from medvisionllama.training.interrupts import INTERRUPTED, interruptible, wait_or_kill
from medvisionllama.training.processes import LAUNCHED

# -P: a random.py in the folder one stands in is not Python's.
_COMMAND = ("-P", "-m", "medvisionllama.training.member_process")


@dataclass(frozen=True)
class OtherMember:
    """A further member, and the process that trains it."""

    run_dir: RunDir
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    reading: threading.Lock = field(default_factory=threading.Lock)
    """Whoever waits for all and whoever watches may both ask why it failed."""

    def end(self) -> None:
        """Ask it to save and end, if it has not ended."""
        assert self.process.stdin is not None, "opened as a pipe"
        self.process.stdin.close()

    @property
    def number(self) -> int:
        """From 2 on, as its folder is called."""
        return int(self.run_dir.path.name)

    @property
    def has_failed(self) -> bool:
        return self.process.poll() not in {None, 0, INTERRUPTED}

    def last_words(self) -> str:
        """Why it failed: the last line that it wrote, or what ended it."""
        if (code := self.process.returncode) is not None and code < 0:
            # What it wrote before, a warning perhaps, is not the reason.
            return f"it was ended by {signal.Signals(-code).name}, as when memory runs out; --members 1 needs half of it"
        with self.reading:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


class OtherMembers:
    """The further members of a run; none if it has one network."""

    def __init__(self, progress: Progress) -> None:
        self.members: list[OtherMember] = []
        self._progress = progress
        self._stopping = threading.Event()

    def add(self, member: OtherMember) -> None:
        """Take a member in; if it fails, that is said at once, rather than when the first has trained."""
        self.members.append(member)
        threading.Thread(target=self._tell_if_it_fails, args=(member,), daemon=True).start()

    def finish(self) -> bool:
        """Wait until all have ended; return False if they were interrupted, with everything saved.

        Raises:
            OtherProcessError: one of them failed.
        """
        if self.members and self._num_ended() < len(self.members):
            with (
                interruptible() as interrupted,
                self._progress.track("other members", len(self.members)) as advance,
            ):
                while (ended := self._num_ended()) < len(self.members) and not interrupted():
                    advance(ended)
                    time.sleep(0.1)
        self.stop()
        for member in self.members:
            if member.has_failed:
                raise OtherProcessError(
                    f"{member.run_dir.path} failed: {member.last_words()} (the other networks are kept; go on with --resume, or without it with --resume --members {member.number - 1})"
                )
        return all(member.process.returncode == 0 for member in self.members)

    def stop(self) -> None:
        """Ask all that still train to save and end, and wait for them."""
        self._stopping.set()
        for member in self.members:
            member.end()
        wait_or_kill(member.process for member in self.members)

    def _tell_if_it_fails(self, member: OtherMember) -> None:
        member.process.wait()
        if member.has_failed and not self._stopping.is_set():
            self._progress.say(f"{member.run_dir.path} failed: {member.last_words()} (the others train on)")

    def _num_ended(self) -> int:
        return sum(member.process.poll() is not None for member in self.members)


@contextmanager
def others_beside(
    config: Config, *, resume: bool, started: float, progress: Progress
) -> Iterator[OtherMembers]:
    """Train a run's further members while the caller trains the first one, all on their share of the threads.

    Args:
        started: when the run began, as `time.monotonic` counts; the minutes of a run hold for all members.
    """
    num = config.train.members
    if num == 1:
        yield OtherMembers(progress)
        return
    before = torch.get_num_threads()
    threads = max(1, before // num)
    # Of a run that goes on, a member that is only begun now has its minutes before it.
    age = 0.0 if resume else time.monotonic() - started
    others = OtherMembers(progress)
    torch.set_num_threads(threads)
    try:
        for number in range(2, num + 1):
            others.add(_start(member_config(config, number), resume=resume, age=age, threads=threads))
        yield others
    finally:
        others.stop()
        for member in others.members:
            member.errors.close()
        torch.set_num_threads(before)


def member_config(config: Config, number: int) -> Config:
    """Configuration of a further member: the run's own, with a seed and a folder of its own.

    It obeys the run's own splits file. Drawn anew, splits would be others if the dataset has changed since, and a
    member that joins later would train with what tests the run.
    """
    assert config.out is not None, "checked by the caller"
    # Not the next seeds, which may be those of other runs that this one is compared with.
    seed = int(np.random.SeedSequence((config.train.seed, number)).generate_state(1)[0])
    start = config.train.start_from
    # Networks that were others before stay others; a run of one gives all of them the same. One that goes on has
    # its weights, and the earlier run may be gone.
    if start is not None and (before := RunDir(start)).config.is_file():
        start = before.member(number).path if number <= read_config(before.config).train.members else start
    train = config.train.model_copy(update={"members": 1, "seed": seed, "start_from": start})
    run_dir = RunDir(config.out)
    data = config.data.model_copy(update={"splits": run_dir.splits})
    return config.model_copy(update={"train": train, "data": data, "out": run_dir.member(number).path})


def check_members(num_members: int, num_processes: int) -> None:
    """Raise ConfigError if a launcher has started several processes for a run of several members."""
    if num_members > 1 and num_processes > 1:
        raise ConfigError(
            f"train.members={num_members} starts processes of its own and cannot share the {num_processes} of a launcher; give --members 1, or leave the launcher out"
        )


def _without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the meeting place of a launcher's job of one process, which that process has taken."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHED and not name.startswith("TORCHELASTIC_")
    }


def _start(config: Config, *, resume: bool, age: float, threads: int) -> OtherMember:
    assert config.out is not None, "member_config gave one"
    run_dir = RunDir(config.out)
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
    process = subprocess.Popen(
        [sys.executable, *_COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**_without_launcher(os.environ), **thread_limits(threads)},
        # Ctrl-C is for the first member, which then lets the others go.
        start_new_session=True,
    )
    request = {
        "config": config.model_dump(mode="json"),
        "resume": resume and run_dir.config.is_file(),
        # The clocks of two processes need not count from the same moment, that of the day does.
        "began": time.time() - age,
    }
    assert process.stdin is not None, "opened as a pipe"
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    return OtherMember(run_dir, process, errors)
