"""`medvisionllama evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medvisionllama.cli._options import Json


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks; or a run folder, without LABELS.")],
    labels: Annotated[Path | None, typer.Argument(help="Folder of labels with the same file names.")] = None,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Which cases of a run.")] = "test",
    block_removed: Annotated[
        bool,
        typer.Option(
            "--block-removed", help="Leave the frozen block out of a trained run; what does it lose?"
        ),
    ] = False,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="The masks know one foreground only (presets paper and reference)."),
    ] = False,
    tolerance_mm: Annotated[
        float | None,
        typer.Option(min=0.0, help="Distance within which NSD counts a surface as matched; default 1."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table of cases here as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """Measure masks against labels, or a run on its own split: Dice, IoU, precision, recall, NSD, HD95.

    Examples: medvisionllama evaluate masks/ labels/ --out table.csv; medvisionllama evaluate runs/hip --split test
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.cli._tables import print_summary
    from medvisionllama.evaluation.evaluate import to_json

    table = api.evaluate(
        predictions,
        labels,
        split=split,
        block_removed=block_removed,
        merged=merged,
        tolerance_mm=tolerance_mm,
        out=out,
        progress=TerminalProgress(),
    )
    if as_json:
        typer.echo(to_json(table))
    else:
        print_summary(table)
