"""`medvisionllama data`: what is in a dataset and how it is divided."""

import json
from pathlib import Path
from typing import Annotated

import typer

from medvisionllama.cli import data_check, data_convert, data_download, data_plan
from medvisionllama.cli._options import Data, Exclude, Json, PatientPattern

app = typer.Typer(help="Look at a dataset: what is in it, how it is divided.", no_args_is_help=True)
app.command("check")(data_check.check)
app.command("download")(data_download.download)
app.command("convert")(data_convert.convert)
app.command("plan")(data_plan.plan)


@app.command()
def fingerprint(data: Data, as_json: Json = False) -> None:
    """Show shapes, spacings, channels and classes, and the plan that follows from them."""
    from medvisionllama import api

    facts = api.fingerprint(data)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    reasons = facts.pop("reasons")
    for key, value in {**facts, **{f"why {key}": reason for key, reason in reasons.items()}}.items():
        typer.echo(f"{key.replace('_', ' '):20} {value}")


@app.command()
def split(
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the splits file; without, they are shown alone.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draw; 0 by default.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Splits file of fewer patients, as a run's own: all stay where they are, the new ones are added.",
            metavar="SPLITS",
        ),
    ] = None,
    patient_pattern: PatientPattern = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Divide the patients into test and five folds, and write them with a hash.

    medvisionllama data split Task04_Hippocampus

    medvisionllama data split Task04_Hippocampus --out splits.json
    """
    from medvisionllama import api
    from medvisionllama.data.splits import patients_of

    splits = api.split(
        data, out=out, seed=seed, keep=keep, patient_pattern=patient_pattern, exclude=exclude or ()
    )
    if as_json:
        typer.echo(json.dumps(splits.to_json(), indent=2))
        return
    number = len(patients_of(splits))
    typer.echo(
        f"{number} patients: {len(splits.test)} to test, {len(splits.folds)} folds over the rest; {out or 'give --out to write them'}"
    )
    if out is None:
        typer.echo(f"test: {', '.join(splits.test)}")
        for place, fold in enumerate(splits.folds):
            typer.echo(f"fold {place} validates: {', '.join(fold.validation)}")
