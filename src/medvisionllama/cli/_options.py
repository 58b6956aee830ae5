"""Options that several verbs share, with one wording."""

from pathlib import Path
from typing import Annotated

import typer

DATA_HELP = (
    "MSD folder, nnU-Net raw folder, or a folder with images/ and labels/ (.nii.gz, .nrrd, .mha; "
    "an image may be a folder of DICOM slices)."
)
Data = Annotated[Path, typer.Argument(help=DATA_HELP)]
PRESET_HELP = "small (default), large (one GPU), paper, reference, or a rival: unet, unet++, dynunet, segresnet, unetr, swin_unetr."
Preset = Annotated[str, typer.Option(help=PRESET_HELP)]
PatientPattern = Annotated[
    str | None, typer.Option(help="Regular expression whose first group is the patient in a case's name.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="A case or patient to leave out, as data.exclude does. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
