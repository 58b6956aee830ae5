"""Progress on a terminal as bars; in a log file as a line now and then. Both on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from medvisionllama.progress import Advance, Lines


class TerminalProgress:
    """Draws what library functions report."""

    middle: tuple[ProgressColumn, ...] = (TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    """Between the bar and the time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, title: str, total: float) -> Iterator[Advance]:
        """Show one piece of work until it ends."""
        work = self._bar if self.console.is_terminal else Lines(self.say).track
        with work(title, total) as advance:
            yield advance

    @contextmanager
    def _bar(self, title: str, total: float) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *self.middle,
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total, note="")
            yield lambda done, note="": bars.update(task, completed=done, note=note)


class TransferProgress(TerminalProgress):
    """The same for work whose units are bytes."""

    middle = (DownloadColumn(), TransferSpeedColumn())
