"""Ctrl-C and SIGTERM as a flag that the loop reads between steps, and as an exception elsewhere.

Also what processes that train for another one share: how they end when they are asked to.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code of a process that was asked to end and has saved everything."""
SECONDS_TO_SAVE = 120.0
"""How long a process that is asked to end may take."""


def sigterm_as_ctrl_c() -> None:
    """Let SIGTERM raise KeyboardInterrupt, so that what was half written goes when a queue ends a job.

    Not in a process of a launcher, which may wait for the others where no exception reaches it.
    """
    if threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def wait_or_kill(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that were asked to end, and kill those that take longer than saving does."""
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def interruptible(*, echo_seconds: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag; the second one acts at once.

    Args:
        echo_seconds: how long further signals count as echoes of the first: a launcher passes on to its processes
            what the terminal has sent them already.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first = 0.0

    def on_signal(number: int, frame: object) -> None:
        nonlocal first
        if not flag.is_set():
            flag.set()
            first = time.monotonic()
            if echo_seconds:
                return
        elif time.monotonic() - first < echo_seconds:
            return
        for known, handler in previous.items():
            signal.signal(known, handler)
        if echo_seconds:
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield flag.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
