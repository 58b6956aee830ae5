"""Tables of `medvisionllama experiment` on the terminal."""

from collections import Counter

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from medvisionllama.experiments.estimate import Estimate
from medvisionllama.experiments.store import STATES
from medvisionllama.experiments.verbs import Status


def print_plan(found: Estimate) -> None:
    """Print a row for each task, model and arm, then the sums."""
    table = _table("runs", "trainable", "frozen", "GFLOPs", "s/step", "hours")
    table.add_column("matched to", no_wrap=True)
    for row in found.rows:
        table.add_row(
            row.task,
            row.model,
            row.arm,
            str(row.runs),
            _millions(row.trainable),
            _millions(row.frozen),
            _number(row.gflops, ".2f"),
            _number(row.step_seconds, ".3g"),
            _number(row.hours, ".2f"),
            row.matched,
        )
    print_table(table)
    for problem in found.problems:
        typer.echo(f"not known: {problem}")
    typer.echo(
        "GFLOPs: forward pass of one crop, a multiply-add counted twice. Hours: one run after the other, by timing a "
        "step on noise here; augmentation and other programs come on top."
    )
    hours = "" if found.hours is None else f", about {found.hours:.1f} hours one after the other"
    but = f"; without {found.num_unknown} runs that are not known" if found.num_unknown else ""
    typer.echo(
        f"{found.num_runs} runs ({found.done} of them done){hours}, about {found.gigabytes:.1f} GB when done{but}"
    )


def status_table(found: Status) -> Table:
    """A row for each task, model and arm, a column for each state."""
    table = _table(*STATES)
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for run in found.runs:
        counts.setdefault((run.task, run.model, run.arm), Counter())[found.states[run.run_id]] += 1
    for names, by_state in counts.items():
        table.add_row(*names, *(str(by_state[state] or "") for state in STATES))
    return table


def status_words(found: Status) -> str:
    """The sums, the time left, and what failed last."""
    sums = ", ".join(f"{found.count(state)} {state}" for state in STATES if found.count(state))
    lines = [f"{len(found.runs)} runs: {sums}"]
    if (left := found.seconds_left()) is not None:
        lines.append(f"about {left / 3600:.1f} hours left at the pace of the finished runs")
    strangers = found.experiment.strangers(found.runs)
    if strangers:
        lines.append(
            f"{len(strangers)} folders belong to no run of the matrix (any more), as runs/{strangers[0]}; they are left alone"
        )
    failures = found.failures()
    lines += [f"failed: {run_id}: {error}" for run_id, error in list(failures.items())[:5]]
    if len(failures) > 5:
        lines.append(f"and {len(failures) - 5} more; all with --json")
    return "\n".join(lines)


def print_table(table: Table) -> None:
    """Print a table; into a file as wide as it is."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _table(*numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "model", "arm"):
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _millions(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:.2f} M"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
