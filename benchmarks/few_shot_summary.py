"""The few-shot table in short: a line for each arm and machine.

python benchmarks/few_shot_summary.py benchmarks/results/few_shot/acdc-4-20min      # writes its summary.csv
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def summarise(where: Path) -> pd.DataFrame:
    """A line for each arm and machine: mean over seeds, spread, paired differences.

    On the test patients from the arm without tokens and from `block`, which is the preset as it is; on those that
    the row left out, who are more, from `block`.

    `where` is a row's folder, with a folder of cells for each machine: equal minutes on another machine are other
    steps, so machines are kept apart. Empty if no cell is there.
    """
    from medvisionllama.evaluation.evaluate import mean_class_dice, read_table

    paths = sorted(where.glob("*/*-s*.json"))
    if not paths:
        return pd.DataFrame()
    cells = [json.loads(path.read_text()) for path in paths]
    tables = {
        (machine_name(cell["hardware"]), cell["arm"], cell["seed"]): read_table(path.with_suffix(".csv"))
        for path, cell in zip(paths, cells, strict=True)
    }
    unused = {
        key: read_table(unused_table(path))
        for key, path in zip(tables, paths, strict=True)
        if unused_table(path).is_file()
    }
    # The unit is the patient: two scans of one heart are no two witnesses.
    patients = (
        pd.concat([*tables.values(), *unused.values()]).groupby("case_id")["patient_id"].first().to_dict()
    )
    tested = {key: mean_class_dice(table) for key, table in tables.items()}
    left_out = {key: mean_class_dice(table) for key, table in unused.items()}
    lines = []
    for machine, arm in dict.fromkeys((machine, arm) for machine, arm, _ in tables):
        own = [cell for key, cell in zip(tables, cells, strict=True) if key[:2] == (machine, arm)]
        dice = pd.Series([cell["test_dice"] for cell in own])
        line = {
            "arm": arm,
            "seeds": len(own),
            "dice": round(dice.mean(), 4),
            "seed_sd": round(dice.std(), 4),
            "steps": round(sum(cell["steps"] for cell in own) / len(own)),
            "trainable": own[0]["trainable"],
            # Cells of before have none.
            "unused": round(pd.Series([cell.get("unused_dice") for cell in own], dtype=float).mean(), 4),
            "cores_used": min(cell["mean_cores_used"] for cell in own),
            # Lines of other revisions are of other presets, it may be.
            "trained_at": " ".join(sorted({name for cell in own for name in revisions(cell)})),
            "machine": machine,
        }
        line |= difference(tested, patients, machine, arm, "no-tokens")
        for part, scores in (("test", tested), ("unused", left_out)):
            minus_preset = difference(scores, patients, machine, arm, "block")
            line |= {f"{part}_{key}": value for key, value in minus_preset.items()}
        lines.append(line)
    return pd.DataFrame(lines).sort_values(["machine", "dice"], ascending=[True, False])


Scores = dict[tuple[str, str, int], pd.Series]
"""Dice of the cases of each machine, arm and seed."""


def difference(
    scores: Scores, patients: Mapping[Any, str], machine: str, arm: str, reference: str
) -> dict[str, float | str]:
    """An arm's Dice minus the reference's on the same cases: mean over patients, of several seeds mean of theirs.

    The interval is over patients; one who comes in several seeds is drawn with all of them. How much trainings vary
    is not in it: `by_seed` has the seeds' own differences.

    Raises:
        SystemExit: both were scored on other scans, so one of them was trained on another division.
    """
    pairs = []
    for (where, name, seed), dice in sorted(scores.items(), key=lambda item: item[0]):
        if (where, name) != (machine, arm) or (machine, reference, seed) not in scores or arm == reference:
            continue
        other = scores[machine, reference, seed]
        pairs.append(by_patient(dice, other, patients, f"{arm} and {reference} of seed {seed}"))
    if not pairs:
        return {}
    low, high = mean_of_seeds_interval(pairs)
    by_seed = [round(float(pair.mean()), 4) for pair in pairs]
    name = f"minus_{reference.replace('-', '_')}"
    mean = sum(pair.mean() for pair in pairs) / len(pairs)
    return {
        name: round(mean, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "by_seed": " ".join(map(str, by_seed)),
    }


def by_patient(dice: pd.Series, other: pd.Series, patients: Mapping[Any, str], pair: str) -> pd.Series:
    """Difference of two arms' Dice on the same cases, as each patient's mean.

    Raises:
        SystemExit: the two that `pair` names were scored on other scans.
    """
    if set(dice.index) != set(other.index):
        raise SystemExit(
            f"{pair} were not scored on the same scans; keep cells of another dataset in another --results"
        )
    return (dice - other).groupby(patients).mean()


def mean_of_seeds_interval(by_patient: Sequence[pd.Series]) -> tuple[float, float]:
    """95 % bootstrap interval (BCa) of the mean of the seeds' means; patients are drawn with all their seeds.

    Args:
        by_patient: of each seed, a number for each of its patients.
    """
    from scipy.stats import bootstrap

    from medvisionllama.evaluation.statistics import bootstrap_interval

    if len(by_patient) == 1:
        return bootstrap_interval(by_patient[0].tolist(), by_patient[0].index.tolist())
    table = pd.concat(by_patient, axis=1).to_numpy()
    if len(table) < 2:
        return float("nan"), float("nan")
    if np.nanmax(table) == np.nanmin(table):
        return float(np.nanmax(table)), float(np.nanmax(table))

    def mean_of_means(drawn: np.ndarray) -> float:
        numbers = (~np.isnan(table[drawn])).sum(axis=0)
        # Of few patients a draw may have none of a seed.
        return float((np.nansum(table[drawn], axis=0)[numbers > 0] / numbers[numbers > 0]).mean())

    result = bootstrap(
        (np.arange(len(table)),),
        mean_of_means,
        n_resamples=9999,
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def revisions(cell: dict[str, Any]) -> list[str]:
    """Revisions of the code that a cell was trained at; cells of before do not say."""
    return [name[:7] if name else "unknown" for name in cell.get("trained_at", [])]


def unused_table(cell: Path) -> Path:
    """Where a cell's table of the patients lies that its row leaves out."""
    return cell.with_name(f"{cell.stem}-unused.csv")


def machine_slug(hardware: dict[str, Any]) -> str:
    """A machine as a folder's name, such as `amd-epyc-avx512-2-threads`."""
    return re.sub("[^a-z0-9]+", "-", machine_name(hardware).lower().replace("(r)", "")).strip("-")


def machine_name(hardware: dict[str, Any]) -> str:
    """What minutes are spent on, such as `AMD EPYC, AVX512, 2 threads`, from what `machine_facts` says."""
    if hardware["gpu"]:
        return str(hardware["gpu"])
    return f"{hardware['processor']}, {hardware['instructions']}, {hardware['threads']} threads"


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        summarise(folder).to_csv(folder / "summary.csv", index=False)
