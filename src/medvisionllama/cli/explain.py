"""`medvisionllama explain`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medvisionllama.cli._options import Json

if TYPE_CHECKING:
    import pandas as pd

    from medvisionllama.reports.explanation import Explanation


def explain(
    run: Annotated[Path, typer.Argument(help="Run folder that `train` made.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE]...", help="Scans to explain, as for `predict`; or give --split."),
    ] = None,
    split: Annotated[
        Literal["test", "validation"] | None, typer.Option(help="Explain all cases of a split of the run.")
    ] = None,
    label: Annotated[
        Path | None,
        typer.Option(
            help="The image's mask; by default the dataset's, if it is one of the run's cases, else the prediction."
        ),
    ] = None,
    control: Annotated[
        Literal["random", "none"],
        typer.Option(help="Set the same network around a random block beside it."),
    ] = "random",
    against: Annotated[
        Path | None, typer.Option(help="Another run of the task to set beside it, around a random block say.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for maps and page; default explain/CASE, or explain/SPLIT, in the run."),
    ] = None,
    maps: Annotated[bool, typer.Option("--maps/--no-maps", help="Write the maps as NIfTI.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an explanation that is already there.")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    as_json: Json = False,
) -> None:
    """Map token norms and attention after each stage of a trained network, and score them against the mask.

    Scores: does the map's maximum lie inside the mask, and how much of the map does. A random block in the same
    network is scored beside it.

    Examples:

    medvisionllama explain runs/hip scan1.nii.gz --label mask1.nii.gz

    medvisionllama explain runs/hip --split test --against runs/hip-random
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress

    try:
        found = api.explain(
            run,
            images or [],
            split=split,
            label=label,
            control=control,
            against=against,
            out=out,
            maps=maps,
            overwrite=overwrite,
            device=device,
            progress=TerminalProgress(),
        )
    except KeyboardInterrupt:
        typer.echo("stopped; files that are there are whole; start again with --overwrite", err=True)
        raise typer.Exit(130) from None
    for line in found.warnings:
        typer.echo(f"look at this: {line}", err=True)
    if as_json:
        typer.echo(_to_json(found))
        return
    _print_scores(found)
    typer.echo(f"page: {found.page}")


def _to_json(found: "Explanation") -> str:
    def records(table: "pd.DataFrame") -> object:
        # pandas writes what is not a number as null, which JSON has.
        return json.loads(table.to_json(orient="records"))

    return json.dumps(
        {
            "page": str(found.page),
            "warnings": found.warnings,
            "notes": found.notes,
            "summary": None if found.summary is None else records(found.summary),
            "scores": records(found.table),
        },
        indent=2,
    )


def _print_scores(found: "Explanation") -> None:
    """Print the scores of the foreground, one row per map and network."""
    from rich.console import Console
    from rich.table import Table

    from medvisionllama.reports.activations import main_class

    rows = found.table if found.summary is None else found.summary
    name = main_class(rows)
    shown = Table(
        title=f"{name}: AUC 0.5 and energy ratio 1 mean that a map does not know it", title_justify="left"
    )
    for column in ("map after", "kind", "network", "AUC", "energy ratio", "hit", "hit within a token"):
        shown.add_column(column, justify="left" if column in {"map after", "kind", "network"} else "right")
    for row in rows[rows["class"] == name].to_dict(orient="records"):
        numbers = (f"{row[key]:.3f}" for key in ("auc", "energy_ratio", "hit", "hit_near"))
        shown.add_row(row["stage"], row["kind"], row["network"], *numbers)
    Console().print(shown)
