"""How long work tells how far it is, without the library printing anything.

Library code calls `progress.track(...)`; the command line passes an implementation that draws bars.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


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

    def __init__(self, write: Callable[[str], None], *, seconds_between: float = 20.0) -> None:
        self.say = write
        self.seconds_between = seconds_between

    @contextmanager
    def track(self, title: str, total: float) -> Iterator[Advance]:
        started = spoken = time.monotonic()

        def advance(done: float, note: str = "") -> None:
            nonlocal spoken
            if time.monotonic() - spoken < self.seconds_between:
                return
            spoken = time.monotonic()
            left = (spoken - started) * (total - done) / max(done, 1e-9)
            self.say(f"{title}: {done / total:.0%}, about {left / 60:.1f} min left  {note}")

        yield advance
        self.say(f"{title}: done in {time.monotonic() - started:.0f} s")
