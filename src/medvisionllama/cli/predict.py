"""`medvisionllama predict`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medvisionllama.cli._options import Json


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder that `train` made.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help="Scans (.nii, .nii.gz, .nrrd, .mha), DICOM series, and folders of them."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    also: Annotated[
        list[Path] | None,
        typer.Option(help="A further run, another fold for example; probabilities are averaged. Repeatable."),
    ] = None,
    mask_format: Annotated[
        Literal["auto", "nifti", "nrrd", "mha", "dicom"],
        typer.Option(
            "--format",
            help="Kind of the mask files; auto is each scan's own: DICOM-SEG for DICOM, .seg.nrrd for NRRD.",
        ),
    ] = "auto",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probability of every class too.")
    ] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Write a map of doubt too: 0 certain, 1 undecided.")
    ] = False,
    largest: Annotated[
        bool | None,
        typer.Option(
            "--largest/--all-components",
            help=(
                "Keep the largest component of each class alone. Without this and --min-ml, the run's settings "
                "inference.* decide if they remove anything, else what `evaluate --choose-cleaning` chose "
                "(postprocessing.json), else nothing is removed; with --also, those of the first run."
            ),
            show_default=False,
        ),
    ] = None,
    min_ml: Annotated[
        float | None, typer.Option(min=0, help="Remove components smaller than so many millilitres.")
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Look at each scan once, not mirrored and turned as well: a third or quarter of the time.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace masks that are there, but for DICOM masks of another series; with --resume, only those that these networks did not make.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help=(
                "Go on: leave out scans of which these networks made the mask already, also of what is "
                "printed. Other masks are refused, or with --overwrite replaced."
            ),
        ),
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    as_json: Json = False,
) -> None:
    """Segment scans: one mask per scan, of the same name, on the scan's own grid.

    DICOM series are found in the folders given and below them; their masks are DICOM-SEG files that refer to them.

    Headers are looked at first. A scan whose voxels then cannot be read does not stop the others; exit code 2.

    What was interrupted goes on with the same command and --resume added; one with --overwrite keeps it.

    Examples:

    medvisionllama predict runs/hip scan1.nii.gz folder/ --out masks/

    medvisionllama predict runs/hip study/ --out masks/ --format nifti
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress

    records: list[dict[str, Any]] = []
    stopped = False
    try:
        api.predict(
            run,
            inputs,
            out=out,
            also=also or [],
            mask_format=mask_format,
            probabilities=probabilities,
            uncertainty=uncertainty,
            largest=largest,
            min_ml=min_ml,
            fast=fast,
            overwrite=overwrite,
            resume=resume,
            keep_going=True,
            device=device,
            progress=TerminalProgress(),
            on_record=records.append,
        )
    except KeyboardInterrupt:
        stopped = True
    except Exception:
        # A disk that is full, say: the masks before it are there, and so are their volumes and warnings.
        if records:
            _show_all(records, as_json=as_json)
        raise
    failed = _show_all(records, as_json=as_json)
    if stopped:
        typer.echo(
            "stopped; masks that are there are whole; go on with the same command and --resume", err=True
        )
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(2)


def _show_all(records: list[dict[str, Any]], *, as_json: bool) -> bool:
    """Print what was done, and say whether a scan failed."""
    if as_json:
        typer.echo(json.dumps(records, indent=2))
    else:
        for record in records:
            _show(record)
    failed = [record["error"] for record in records if "error" in record]
    for error in failed:
        typer.echo(f"medvisionllama: {error}", err=True)
    return bool(failed)


def _show(record: dict[str, Any]) -> None:
    if "error" in record:
        return
    found = {name: volume for name, volume in record["volumes_ml"].items() if volume}
    volumes = ", ".join(f"{name} {_digits(volume)} ml" for name, volume in found.items())
    typer.echo(f"{record['mask']}: {volumes or 'empty'}")
    for line in record["warnings"]:
        typer.echo(f"  {line}")


def _digits(volume: float) -> str:
    """A volume to four digits; a large one to whole millilitres, since nobody reads 1.235e+04."""
    return f"{volume:.4g}" if volume < 1000 else f"{volume:.0f}"
