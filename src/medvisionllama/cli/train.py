"""`medvisionllama train`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medvisionllama.cli._options import DATA_HELP, PRESET_HELP, Json
from medvisionllama.errors import command


def train(
    data: Annotated[
        Path | None,
        typer.Argument(help=DATA_HELP),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            help="Which fold validates, 0 to 4; or all: train on every labelled case, as the last run before use.",
            metavar="FOLD",
        ),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the training patients to use, e.g. 0.1.")
    ] = None,
    cases: Annotated[
        int | None, typer.Option(min=1, help="Number of training cases to use, in whole patients.")
    ] = None,
    unlabelled: Annotated[
        str | None,
        typer.Option(
            help="Folder of scans without labels to learn from too; or unused: those that --cases leaves out.",
            metavar="SCANS",
        ),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Earlier run, on this dataset or another, to begin with the weights of, where they fit.",
            metavar="RUN",
        ),
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop training after so many minutes.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many passes over the training cases.")
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(min=1, help="Networks to train side by side in the same minutes; their mean predicts."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeat as needed."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out after an interruption, by its own settings."
        ),
    ] = False,
    test: Annotated[bool, typer.Option("--test/--no-test", help="Open the test cases at the end.")] = True,
    help_settings: Annotated[
        bool, typer.Option("--help-settings", help="List every setting and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train on labelled scans, score the test cases once, and write a report.

    Patients are divided by seed into test (10 %) and five folds, so equal commands see equal splits whatever the
    model; with --fold all everyone trains, and nobody is left to score the run. What headers tell is checked first;
    `data check` reads the voxels too, and finds scans that are there twice. Stop with Ctrl-C at any time; --resume
    goes on where it stopped.

    Example: medvisionllama train Task04_Hippocampus --preset small --out runs/hip
    """
    if help_settings:
        from medvisionllama.config.settings_help import settings_help

        typer.echo(settings_help(preset or "small"))
        return
    if data is None or out is None:
        raise typer.BadParameter("give DATA, the dataset's folder, and --out, the run folder to make")
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.cli._tables import print_summary
    from medvisionllama.evaluation.evaluate import read_table, to_json
    from medvisionllama.run_dir import RunDir

    result = api.train(
        data,
        out=out,
        preset=preset,
        fold=fold,  # type: ignore[arg-type] # a text, which the settings read and check
        fraction=fraction,
        cases=cases,
        unlabelled=unlabelled,
        start_from=start_from,
        max_minutes=max_minutes,
        epochs=epochs,
        members=members,
        overrides=set_ or [],
        resume=resume,
        test=test,
        progress=TerminalProgress(),
    )
    if not result.is_main:
        return
    run_dir = RunDir(result.path)
    if not result.finished:
        # Also where test cases are to stay unopened, which the run itself does not know.
        again = command("train", data, "--out", out, "--resume", *([] if test else ["--no-test"]))
        typer.echo(f"stopped at step {result.steps}; go on with: {again}", err=True)
        raise typer.Exit(130)
    # A run on all labelled cases has no test.
    scored = test and run_dir.evaluation.is_file()
    if as_json:
        facts = {**asdict(result), "path": str(result.path)}
        if scored:
            scores = to_json(read_table(run_dir.evaluation), {})
            facts["test"] = {key: value for key, value in json.loads(scores).items() if key != "cases"}
        typer.echo(json.dumps(facts))
        return
    if scored:
        print_summary(run_dir.evaluation)
    typer.echo(str(run_dir.report))
