"""Patients that a row leaves out: neither trained with nor validated on, so they test a run as well as others do.

Four test patients say little about 0.02; the two dozen left over by a fold of which four train say more.

python benchmarks/few_shot_unused.py "small=runs/a" "DynUNet=runs/b" --out trials/acdc-split0.csv

scores trainings of one split, the first against the others: a line of `--out` for each scan and class, beside it
`-validation.csv` with the course of each training.
"""

import argparse
import math
from pathlib import Path
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
    dataset, plan = open_configured(config.data, begun=True), predictor.plan
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


def main() -> None:
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.evaluation.evaluate import mean_class_dice
    from medvisionllama.evaluation.statistics import bootstrap_interval, patient_means
    from medvisionllama.run_dir import RunDir

    arguments = parse()
    tables, courses, means = [], [], {}
    for name, _, folder in (text.partition("=") for text in arguments.runs):
        run = RunDir(Path(folder))
        table = score_unused(run, TerminalProgress())
        means[name] = mean_class_dice(table)
        classes = table[table["class"] != "foreground"]
        tables.append(classes.assign(trial=name)[["trial", "patient_id", "case_id", "class", "dice"]])
        course = pd.DataFrame(run.read_history())[["step", "seconds", "loss", "dice"]]
        courses.append(course.assign(trial=name)[["trial", *course.columns]].round(4))
    scores, where = pd.concat(tables), arguments.out
    where.parent.mkdir(parents=True, exist_ok=True)
    scores.round(4).to_csv(where, index=False)
    pd.concat(courses).to_csv(where.with_name(f"{where.stem}-validation.csv"), index=False)
    patients = scores.groupby("case_id")["patient_id"].first()
    (first, reference), *others = means.items()
    groups = patients[reference.index].tolist()
    print(f"{first}: {patient_means(reference.tolist(), groups).mean():.4f}")
    for name, dice in others:
        values = (reference - dice[reference.index]).tolist()
        by_patient = patient_means(values, groups)
        low, high = bootstrap_interval(values, groups)
        print(
            f"{name}: {patient_means(dice[reference.index].tolist(), groups).mean():.4f}; {first} minus it "
            f"{by_patient.mean():+.4f} ({low:.4f} to {high:.4f}), ahead in {(by_patient > 0).sum()} of {len(by_patient)}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=RUN", help="what a training is called, and its folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the table, a .csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
