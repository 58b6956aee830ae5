"""Patients that a row leaves out: neither trained with nor validated on, so they test a run as well as others do.

Four test patients say little about 0.02; the two dozen left over by a fold of which four train say more.
"""

import math
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from medvisionllama.data.index import Case, Dataset
    from medvisionllama.progress import Progress
    from medvisionllama.run_dir import RunDir

MOST_PATIENTS = 24
"""Turned views take seconds a scan."""


def score_unused(run: "RunDir", progress: "Progress") -> pd.DataFrame:
    """Segment and measure them as `evaluate` does, removal of components included; empty if there are none."""
    from medvisionllama.config import read_config
    from medvisionllama.data.index import open_configured
    from medvisionllama.evaluation.evaluate import evaluate_files
    from medvisionllama.evaluation.evaluate_run import segment_cases
    from medvisionllama.inference.predictor import Predictor

    config, predictor = read_config(run.config), Predictor.from_run(run.path)
    dataset, plan = open_configured(config.data), predictor.plan
    cases = unused_cases(run, dataset)
    masks, declared = run.path / "predictions" / "unused", bool(dataset.classes)
    with progress.track("segmenting patients that were left out", len(cases)) as advance:
        pairs = segment_cases(predictor, cases, masks, predictor.cleaning, declared=declared, advance=advance)
    tolerance = config.inference.tolerance_mm
    return evaluate_files(
        pairs, plan.mask_classes, merged=plan.merged, tolerance_mm=tolerance, progress=progress
    )


def unused_cases(run: "RunDir", dataset: "Dataset") -> list["Case"]:
    """Cases of patients who are in no part of the run, not even without labels; evenly spread if they are many."""
    manifest = run.read_manifest()
    named = [name for part in manifest["cases"].values() for name in part]
    known = {dataset.patients[name] for name in named} | set(manifest["unlabelled"].values())
    left = sorted(set(dataset.patients.values()) - known)
    chosen = set(left[:: max(1, math.ceil(len(left) / MOST_PATIENTS))])
    return [case for case in dataset.cases if case.patient_id in chosen]
