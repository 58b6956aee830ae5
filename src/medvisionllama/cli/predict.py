"""`medvisionllama predict`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from medvisionllama.cli._options import Json


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder that `train` made.")],
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help=".nii or .nii.gz files, and folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace masks that are already there.")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    as_json: Json = False,
) -> None:
    """Segment scans: one mask per scan, of the same name, on the scan's own grid.

    Example: medvisionllama predict runs/hip scan1.nii.gz folder/ --out masks/
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress

    records = api.predict(
        run, inputs, out=out, overwrite=overwrite, device=device, progress=TerminalProgress()
    )
    if as_json:
        typer.echo(json.dumps(records, indent=2))
        return
    for record in records:
        volumes = (
            ", ".join(f"{name} {volume:.3f} ml" for name, volume in record["volumes_ml"].items())
            or "nothing found"
        )
        typer.echo(f"{record['mask']}: {volumes}")
