"""`medvisionllama data`: what is in a dataset and how it is divided."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from medvisionllama.cli import data_check, data_convert, data_download, data_plan
from medvisionllama.cli._options import Json

app = typer.Typer(help="Look at a dataset: what is in it, how it is divided.", no_args_is_help=True)
app.command("check")(data_check.check)
app.command("download")(data_download.download)
app.command("convert")(data_convert.convert)
app.command("plan")(data_plan.plan)
Data = Annotated[
    Path, typer.Argument(help="MSD folder, nnU-Net raw folder, or a folder with images/ and labels/.")
]


@app.command()
def fingerprint(data: Data, as_json: Json = False) -> None:
    """Show shapes, spacings, channels and classes, and the plan that follows from them."""
    from medvisionllama.config import DataConfig
    from medvisionllama.data.fingerprint import fingerprint as read
    from medvisionllama.data.index import open_dataset
    from medvisionllama.data.planning import make_plan

    dataset = open_dataset(data)
    found = read(dataset)
    decided = make_plan(dataset, found, DataConfig(), flip=True, patch_size=None)
    shapes = list(found.shapes.values())
    facts: dict[str, Any] = {
        "name": dataset.name,
        "cases": len(dataset.cases),
        "patients": len(set(dataset.patients.values())),
        "channels": list(dataset.channels),
        "classes": {str(value): name for value, name in dataset.classes.items()},
        "shape_min": [min(shape[axis] for shape in shapes) for axis in range(3)],
        "shape_max": [max(shape[axis] for shape in shapes) for axis in range(3)],
        "spacings_mm": {
            " × ".join(f"{edge:g}" for edge in spacing): count
            for spacing, count in Counter(found.spacings_mm.values()).most_common(5)
        },
        "planned_spacing_mm": list(decided.spacing_mm),
        "planned_crop": list(decided.crop_size),
        "planned_strides": [list(stride) for stride in decided.strides],
        "mirrored_axes": list(decided.flip_axes),
        "reasons": decided.reasons,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    reasons = facts.pop("reasons")
    for key, value in {**facts, **{f"why {key}": reason for key, reason in reasons.items()}}.items():
        typer.echo(f"{key.replace('_', ' '):20} {value}")


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="Where to write the splits file.")],
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    patient_pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose first group is the patient in a case's name.")
    ] = None,
) -> None:
    """Divide the patients into test and five folds, and write them with a hash."""
    from medvisionllama.data.index import open_dataset
    from medvisionllama.data.splits import make_splits, write_splits

    dataset = open_dataset(data, patient_pattern=patient_pattern)
    splits = make_splits(dataset.patients, seed=seed)
    write_splits(splits, out)
    typer.echo(
        f"{len(dataset.cases)} cases of {len(set(dataset.patients.values()))} patients: {len(splits.test)} patients to test, {len(splits.folds)} folds over the rest; {out}"
    )
