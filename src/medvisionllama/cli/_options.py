"""Options that several verbs share, with one wording."""

from pathlib import Path
from typing import Annotated

import typer

DATA_HELP = (
    "MSD folder, nnU-Net raw folder, or a folder with images/ and labels/ (.nii.gz, .nrrd, .mha; "
    "an image may be a folder of DICOM slices)."
)
Data = Annotated[Path, typer.Argument(help=DATA_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
