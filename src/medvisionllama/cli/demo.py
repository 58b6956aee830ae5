"""`medvisionllama demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder that gets one numbered folder per demo.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of training.")] = 1.25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of phantoms and training.")] = 0,
) -> None:
    """Do the whole job on artificial scans: train, predict, evaluate, report; about two minutes on a CPU.

    The last line printed is the path of the report.
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.cli._tables import print_summary

    report = api.demo(out=out, minutes=minutes, seed=seed, progress=TerminalProgress())
    print_summary(report.parent / "evaluation.csv")
    typer.echo(str(report))
