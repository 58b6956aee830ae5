"""`medvisionllama data plan`."""

from typing import Annotated

import typer

from medvisionllama.cli._options import Data, Json, Preset


def plan(
    data: Data,
    preset: Preset = "small",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting of `train`; repeat as needed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what `train` would decide from the headers of these scans, and why.

    Test cases are left out, as in training. Numbers that need voxels, such as a CT channel's percentiles, are
    measured when training prepares the scans; the run's plan.json holds them.
    """
    from medvisionllama import api

    decided = api.plan(data, preset=preset, overrides=set_ or [])
    if as_json:
        typer.echo(decided.model_dump_json(indent=2))
        return
    for line in decided.lines:
        typer.echo(line)
