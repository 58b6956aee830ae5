"""`medvisionllama experiment`: many runs that answer one question."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from medvisionllama.cli._options import Json
from medvisionllama.errors import command

app = typer.Typer(
    help="Compare arms on equal splits: plan a matrix of runs, run it, watch it, report it with statistics.",
    no_args_is_help=True,
)
Matrix = Annotated[
    Path, typer.Argument(help="Matrix file (see configs/matrix/), or the folder of an experiment.")
]
Out = Annotated[Path | None, typer.Option(help="Folder of the experiment; by default experiments/NAME.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder under which the datasets lie; by default MEDVISIONLLAMA_DATA, or as before."),
]

_SECONDS_BETWEEN_LOOKS = 3
_SECONDS_TO_BEGIN_AGAIN = 60
"""A failed run may be about to be tried again: its worker has to start, perhaps on another machine."""


@app.command()
def plan(
    matrix: Matrix,
    data: DataRoot = None,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Train each kind of network for a second, to tell hours."),
    ] = True,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a run, for the probe.")] = 1,
    as_json: Json = False,
) -> None:
    """Show what a matrix will cost: arms, sizes, runs, hours, disk. No run is started.

    Example: medvisionllama experiment plan configs/matrix/claims.yaml --data DATA
    """
    from medvisionllama.cli._experiment_tables import print_plan
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.experiments import verbs

    found = verbs.plan(matrix, data=data, probe=probe, threads=threads, progress=TerminalProgress())
    if as_json:
        sums = {"hours": found.hours, "gigabytes": found.gigabytes, "unknown_runs": found.num_unknown}
        typer.echo(json.dumps({**asdict(found), **sums}, indent=2))
        return
    print_plan(found)
    if found.prepared_gigabytes:
        typer.echo(f"plus about {found.prepared_gigabytes:.1f} GB of prepared scans in the cache")


@app.command()
def run(
    matrix: Matrix,
    out: Out = None,
    data: DataRoot = None,
    backend: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes of this machine, or nodes of a Ray cluster.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster, as HOST:6379.")] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs at a time; by default one for each GPU, or as many as cores and memory allow."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of each run: by default 1; with GPUs of this machine, the cores shared out among the slots. "
            "On a Ray cluster also the CPUs that a run asks for.",
        ),
    ] = None,
    gpus_per_run: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="GPUs of a Ray cluster that a run takes, by default none; 0.5 lets two share one."
        ),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed run is tried again.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Pattern of run ids, as '*-small-*'. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train and evaluate every run that is not done yet.

    Stop with Ctrl-C at any time; the same command goes on. A run that fails is recorded and stops nothing. Several
    launchers, on several machines with a shared folder, may work on one experiment.

    Example: medvisionllama experiment run configs/matrix/claims.yaml --data DATA --slots 2
    """
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.experiments import verbs

    outcome = verbs.run(
        matrix,
        out=out,
        data=data,
        backend=backend,
        address=address,
        slots=slots,
        threads=threads,
        gpus_per_run=gpus_per_run,
        retries=retries,
        only=only or (),
        progress=TerminalProgress(),
    )
    if as_json:
        typer.echo(json.dumps(asdict(outcome)))
    else:
        dropped = f", {outcome.dropped} left out as the matrix changed" if outcome.dropped else ""
        typer.echo(
            f"{outcome.done} done now, {outcome.skipped} before, {len(outcome.failed)} failed{dropped}; "
            f"see: {command('experiment report', outcome.folder)}"
        )
    if outcome.interrupted:
        typer.echo("stopped with everything saved; the same command goes on", err=True)
        raise typer.Exit(130)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def status(
    matrix: Matrix,
    out: Out = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until all is done.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how many runs of each arm are done, running, interrupted, failed or still to come.

    Example: medvisionllama experiment status experiments/claims --watch
    """
    if watch and as_json:
        raise typer.BadParameter("--watch shows a table again and again; drop it or --json")
    from medvisionllama.cli._experiment_tables import print_table, status_table, status_words
    from medvisionllama.experiments import verbs

    found = verbs.status(matrix, out=out)
    if as_json:
        typer.echo(json.dumps({"states": found.states, "failures": found.failures()}, indent=2))
        return
    if not watch:
        print_table(status_table(found))
        typer.echo(status_words(found))
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def shown() -> Group:
        # As it is: an error may have brackets, which rich would take for markup. Words first: a screen that is too
        # low loses what is below.
        return Group(Text(status_words(found)), status_table(found))

    with Live(shown(), auto_refresh=False) as live:
        seconds_over = 0
        while found.count("done") < len(found.runs) and seconds_over < _SECONDS_TO_BEGIN_AGAIN:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            found = verbs.status(matrix, out=out)
            is_over = found.count("done") + found.count("failed") == len(found.runs)
            seconds_over = seconds_over + _SECONDS_BETWEEN_LOOKS if is_over else 0
            live.update(shown(), refresh=True)


@app.command()
def report(
    matrix: Matrix,
    out: Out = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Arm to compare with; by default the matrix's. Goes to results/against-ARM."),
    ] = None,
    family: Annotated[
        Literal["report", "task"],
        typer.Option(
            help="Comparisons that Holm's correction takes together: all of a measure, or each task's (goes to "
            "results/by-task)."
        ),
    ] = "report",
    pages: Annotated[
        bool,
        typer.Option("--pages/--no-pages", help="Write the page of each run too, which the dots link to."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Write the page of an experiment with its tables as CSV and LaTeX; prints the page's path last.

    Example: medvisionllama experiment report experiments/claims
    """
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.experiments import verbs

    written = verbs.report(
        matrix, out=out, reference=reference, family=family, pages=pages, progress=TerminalProgress()
    )
    if as_json:
        typer.echo(json.dumps({"page": str(written), "folder": str(written.parent)}))
        return
    typer.echo(str(written))
