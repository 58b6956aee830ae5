"""How long work tells how far it is, without the library printing anything.

Library code calls `progress.track(...)`; the command line passes an implementation that draws bars.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 20.0


class Advance(Protocol):
    """Reports the state of one piece of work."""

    def __call__(self, done: float, note: str = "") -> None:
        """Say that `done` of the total is finished, with a short note to show beside the bar."""


class Progress(Protocol):
    """Shows the state of long work."""

    def track(self, title: str, total: float) -> AbstractContextManager[Advance]:
        """Open a piece of work of `total` units."""

    def say(self, line: str) -> None:
        """Show one line that stays."""


class Silent:
    """Shows nothing; the default of every library function."""

    @contextmanager
    def track(self, title: str, total: float) -> Iterator[Advance]:
        def advance(done: float, note: str = "") -> None:
            """Nobody looks."""

        yield advance

    def say(self, line: str) -> None:
        """Nobody listens."""


class Lines:
    """Writes a line now and then: for log files.

    Args:
        write: takes a line without its end.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.say = write

    @contextmanager
    def track(self, title: str, total: float) -> Iterator[Advance]:
        started = spoken = time.monotonic()
        first: tuple[float, float] | None = None

        def advance(done: float, note: str = "") -> None:
            nonlocal spoken, first
            # What a run had done before it went on took no time here.
            first = first or (time.monotonic(), done)
            if time.monotonic() - spoken < _SECONDS_BETWEEN_LINES:
                return
            spoken = time.monotonic()
            since, before = first
            line = f"{title}: {done / total:.0%}"
            if done > before:
                left = (spoken - since) * (total - done) / (done - before)
                line += f", about {left / 60:.1f} min left"
            self.say(f"{line}  {note}")

        yield advance
        self.say(f"{title}: done in {time.monotonic() - started:.0f} s")
