"""How long work tells how far it is, without the library printing anything.

Library code calls `progress.track(...)`; the command line passes an implementation that draws bars.
"""

from collections.abc import Iterator
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
