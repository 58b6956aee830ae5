"""`write_report`: a run's page, from what its folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medvisionllama._files import write_text
from medvisionllama.colours import colour_of
from medvisionllama.config import Config, load_config, read_config
from medvisionllama.data.index import Case, open_configured
from medvisionllama.data.labels import whole_label
from medvisionllama.data.planning import read_plan
from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.volume import to_ras
from medvisionllama.errors import ConfigError, DataError, command
from medvisionllama.evaluation.evaluate import mean_class_dice, mean_dice, read_table, summarise
from medvisionllama.evaluation.evaluate_run import out_of_date
from medvisionllama.reports import plots
from medvisionllama.reports.pages import render
from medvisionllama.run_dir import RunDir

_PRIVATE = {"data.path", "data.splits", "data.exclude", "unlabelled.scans", "train.start_from", "out"}


@dataclass(frozen=True)
class Picture:
    """A captioned overlay."""

    title: str
    caption: str
    source: str


def write_report(run: Path) -> Path:
    """Write report.html: summary, measures on the test cases, curves, overlays and settings.

    Needs a finished run; sections whose data are missing (no evaluation yet) are left out.
    """
    run_dir = RunDir(run)
    run_dir.check()
    config, plan = read_config(run_dir.config), read_plan(run_dir)
    manifest = run_dir.read_manifest()
    history = run_dir.read_history()
    table = read_table(run_dir.evaluation) if run_dir.evaluation.is_file() else None
    page = render(
        "report.html.j2",
        name=run_dir.path.resolve().name,
        manifest=manifest,
        plan=plan,
        config=config,
        changes=changed_settings(config),
        history=history,
        curves=plots.curves(history) if history else None,
        summary=None if table is None else summarise(table).to_dict(orient="records"),
        mean_dice=None if table is None else mean_dice(table),
        out_of_date="" if table is None else out_of_date(run_dir, config),
        again=command("evaluate", run_dir.path),
        cases=None if table is None else table.to_dict(orient="records"),
        dots=None if table is None else plots.dice_by_case(table),
        pictures=[] if table is None else _pictures(run_dir, config, table),
        colours=[colour_of(index) for index in range(len(plan.mask_classes))],
        kept=run_dir.kept_record().get("dice"),
        tolerance=config.inference.tolerance_mm if table is None else float(table["tolerance_mm"].iloc[0]),
        num_patients=0 if table is None else table["patient_id"].nunique(),
    )
    write_text(run_dir.report, page)
    return run_dir.report


def changed_settings(config: Config) -> dict[str, Any]:
    """Settings that differ from the preset's, but those that name folders and patients: a page is handed on."""
    try:
        preset = _flat(load_config(config.preset).model_dump(mode="json"))
    except ConfigError:
        preset = {}
    chosen = _flat(config.model_dump(mode="json"))
    source = Path(config.network.block.source)
    if source.is_absolute():
        chosen["network.block.source"] = source.name
    return {key: value for key, value in chosen.items() if preset.get(key) != value and key not in _PRIVATE}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _pictures(run_dir: RunDir, config: Config, table: pd.DataFrame) -> list[Picture]:
    """Overlays of the best, the median and the worst case, as far as their files are still where they were."""
    assert config.data.path is not None, "fit wrote it"
    try:
        cases = {case.case_id: case for case in open_configured(config.data, begun=True).cases}
    except DataError:
        return []
    ranked = mean_class_dice(table).sort_values(ascending=False)
    pictures = []
    for title, place in places_of(len(ranked)).items():
        case_id = str(ranked.index[place])
        mask = run_dir.path / "predictions" / "test" / f"{case_id}.nii.gz"
        if case_id not in cases or not mask.is_file():
            continue
        rows = table[table["case_id"] == case_id]
        caption = ", ".join(f"{row['class']} {row['dice']:.3f}" for row in rows.to_dict(orient="records"))
        pictures.append(Picture(title, f"{case_id}: Dice {caption}", _overlay(run_dir, cases[case_id], mask)))
    return pictures


def places_of(number: int) -> dict[str, int]:
    """Which of a number of ranked cases to show, by title; each once.

    >>> places_of(1), places_of(2), places_of(5)
    ({'the only case': 0}, {'better': 0, 'worse': 1}, {'best': 0, 'median': 2, 'worst': 4})
    """
    if number < 3:
        return [{}, {"the only case": 0}, {"better": 0, "worse": 1}][number]
    return {"best": 0, "median": number // 2, "worst": number - 1}


def _overlay(run_dir: RunDir, case: Case, mask: Path) -> str:
    assert case.label is not None, "datasets list labelled cases"
    plan = read_plan(run_dir)
    image = to_ras(read_image(case.images))
    truth = whole_label(case.label, to_ras(read_label(case.label)), image.shape, image.affine).array
    predicted = to_ras(read_label(mask)).array
    if plan.merged:
        truth = (truth > 0).astype(np.uint8)
    return plots.overlay(image, truth, predicted, plan.mask_classes)
