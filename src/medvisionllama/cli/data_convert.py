"""`medvisionllama data convert`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medvisionllama.cli._options import Data


def convert(
    source: Data,
    out: Annotated[Path, typer.Argument(help="New folder; for nnU-Net named as Dataset004_Hippocampus.")],
    to: Annotated[Literal["msd", "nnunet", "plain"], typer.Option(help="Layout to write.")],
    symlink: Annotated[
        bool, typer.Option("--symlink", help="Symbolic links to unchanged files (not for msd).")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copies; by default hard links where the disk allows.")
    ] = False,
    renumber: Annotated[
        bool,
        typer.Option(
            "--renumber", help="For nnU-Net: number label values 1, 2, 3, ... where they have gaps."
        ),
    ] = False,
) -> None:
    """Write a dataset in another layout, with the same cases, voxels, geometry and names.

    MSD keeps the channels of a case in one 4-D file, nnU-Net in one file each; they are split and put together.
    NRRD, MetaImage and DICOM become .nii.gz. Hard links share their content with the source: change neither in
    place.

    Example: medvisionllama data convert Task04_Hippocampus nnUNet_raw/Dataset004_Hippocampus --to nnunet
    """
    from medvisionllama.api import convert as run
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.errors import DataError

    if symlink and copy:
        raise DataError("--symlink and --copy exclude each other; give one of them, or none for hard links")
    transfer: Literal["link", "symlink", "copy"] = "symlink" if symlink else "copy" if copy else "link"
    typer.echo(run(source, out, to=to, transfer=transfer, renumber=renumber, progress=TerminalProgress()))
