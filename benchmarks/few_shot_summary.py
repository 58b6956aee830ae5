"""The few-shot table in short: a line for each arm and machine."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd


def summarise(where: Path) -> pd.DataFrame:
    """A line for each arm and machine: mean over seeds, spread, paired difference from the arm without tokens.

    `where` is a row's folder, with a folder of cells for each machine: equal minutes on another machine are other
    steps, so machines are kept apart. Empty if no cell is there.
    """
    from medvisionllama.evaluation.evaluate import mean_class_dice, read_table
    from medvisionllama.evaluation.statistics import bootstrap_interval, patient_means

    paths = sorted(where.glob("*/*-s*.json"))
    if not paths:
        return pd.DataFrame()
    cells = [json.loads(path.read_text()) for path in paths]
    tables = {
        (machine_name(cell["hardware"]), cell["arm"], cell["seed"]): read_table(path.with_suffix(".csv"))
        for path, cell in zip(paths, cells, strict=True)
    }
    dice = {cell: mean_class_dice(table) for cell, table in tables.items()}
    # The unit is the patient: two scans of one heart are no two witnesses.
    patients = pd.concat(tables.values()).groupby("case_id")["patient_id"].first()
    lines = []
    for machine, arm in dict.fromkeys((machine, arm) for machine, arm, _ in tables):
        own = [cell for key, cell in zip(tables, cells, strict=True) if key[:2] == (machine, arm)]
        scores = pd.Series([cell["test_dice"] for cell in own])
        line = {
            "arm": arm,
            "seeds": len(own),
            "dice": round(scores.mean(), 4),
            "seed_sd": round(scores.std(), 4),
            "steps": round(sum(cell["steps"] for cell in own) / len(own)),
            "trainable": own[0]["trainable"],
            "cores_used": min(cell["mean_cores_used"] for cell in own),
            "machine": machine,
        }
        pairs = [
            dice[machine, arm, cell["seed"]] - dice[machine, "no-tokens", cell["seed"]]
            for cell in own
            if (machine, "no-tokens", cell["seed"]) in dice and arm != "no-tokens"
        ]
        if pairs:
            difference = pd.concat(pairs)
            values, groups = difference.tolist(), patients[difference.index].tolist()
            low, high = bootstrap_interval(values, groups)
            line |= {
                "minus_no_tokens": round(patient_means(values, groups).mean(), 4),
                "low": round(low, 4),
                "high": round(high, 4),
            }
        lines.append(line)
    return pd.DataFrame(lines).sort_values(["machine", "dice"], ascending=[True, False])


def machine_slug(hardware: dict[str, Any]) -> str:
    """A machine as a folder's name, such as `amd-epyc-avx512-2-threads`."""
    return re.sub("[^a-z0-9]+", "-", machine_name(hardware).lower().replace("(r)", "")).strip("-")


def machine_name(hardware: dict[str, Any]) -> str:
    """What minutes are spent on, such as `AMD EPYC, AVX512, 2 threads`, from what `machine_facts` says."""
    if hardware["gpu"]:
        return str(hardware["gpu"])
    return f"{hardware['processor']}, {hardware['instructions']}, {hardware['threads']} threads"
