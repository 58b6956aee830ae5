"""`medvisionllama evaluate`."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medvisionllama.cli._options import Json, PatientPattern


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks; or a run folder, without LABELS.")],
    labels: Annotated[Path | None, typer.Argument(help="Folder of labels with the same file names.")] = None,
    split: Annotated[
        Literal["test", "validation"] | None, typer.Option(help="Which cases of a run; by default test.")
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            help=(
                "A further run of the same splits, another fold for example; the mean of the probabilities is "
                "measured. Repeatable. Its table is evaluation-SPLIT-with-NAMES.csv."
            )
        ),
    ] = None,
    block_removed: Annotated[
        bool,
        typer.Option(
            "--block-removed", help="Leave the frozen block out of a trained run; what does it lose?"
        ),
    ] = False,
    choose_cleaning: Annotated[
        bool,
        typer.Option(
            "--choose-cleaning",
            help=(
                "With --split validation: compare ways to remove stray components and keep the best in "
                "postprocessing.json if it gains more than 0.002 mean Dice and costs no class as much. `predict` "
                "and `evaluate` then use it, unless --largest, --all-components or --min-ml, or the run's settings "
                "inference.largest_foreground, largest_component and min_component_ml, say otherwise."
            ),
        ),
    ] = False,
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration",
            help=(
                "Write how far the probabilities of a run can be believed, before cleaning: calibration.json for "
                "--split validation, else calibration-SPLIT.json."
            ),
        ),
    ] = False,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="The masks know one foreground only (presets paper and reference)."),
    ] = False,
    tolerance_mm: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Distance within which NSD counts a surface as matched; by default 1, or a run's own setting.",
        ),
    ] = None,
    patient_pattern: PatientPattern = None,
    out: Annotated[Path | None, typer.Option(help="Write the table of cases here as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """Measure masks against labels, or a run on its own split: Dice, IoU, precision, recall, NSD, HD95.

    Examples:

    medvisionllama evaluate masks/ labels/ --out table.csv

    medvisionllama evaluate masks/ labels/ --patient-pattern '^(.{4})'

    medvisionllama evaluate runs/hip --split test

    medvisionllama evaluate runs/hip --split validation --choose-cleaning

    medvisionllama evaluate runs/fold0 --also runs/fold1 --also runs/fold2 --split test
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.cli._tables import print_choice, print_summary
    from medvisionllama.evaluation.evaluate import to_json
    from medvisionllama.evaluation.evaluate_run import Scored
    from medvisionllama.inference.cleaning import read_choice
    from medvisionllama.run_dir import RunDir

    table = api.evaluate(
        predictions,
        labels,
        split=split,
        also=also or [],
        block_removed=block_removed,
        choose_cleaning=choose_cleaning,
        calibration=calibration,
        merged=merged,
        tolerance_mm=tolerance_mm,
        patient_pattern=patient_pattern,
        out=out,
        progress=TerminalProgress(),
    )
    run_dir, split = RunDir(predictions), split or "test"
    choice = read_choice(run_dir) if choose_cleaning else None
    scored = Scored(run_dir, split, tuple(also or ()), block_removed)
    if as_json:
        more = {} if choice is None else {"cleaning": choice.model_dump(mode="json")}
        if calibration:
            more["calibration"] = json.loads(scored.calibration.read_text(encoding="utf-8"))
        typer.echo(to_json(table, more))
        return
    print_summary(table)
    if also:
        typer.echo(str(scored.table))
    if choice is not None:
        print_choice(choice, run_dir.postprocessing)
    if calibration:
        _show_calibration(json.loads(scored.calibration.read_text(encoding="utf-8")), scored.calibration)


def _show_calibration(facts: dict[str, Any], where: Path) -> None:
    if facts["ece"] is None:
        typer.echo(f"ECE and Brier score: no voxel of foreground, true or predicted ({where})")
        return
    typer.echo(
        f"ECE {facts['ece']:.4f} ({facts['num_bins']} bins, {facts['num_voxels']} voxels: {facts['voxels']})"
    )
    typer.echo(f"Brier score {facts['brier']:.4f} (0 to 2; {where})")
