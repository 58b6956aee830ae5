"""Equal minutes, equal split: the `small` preset with the block, without it, and without any token.

python benchmarks/hippocampus.py --minutes 30
"""

import argparse
import json
import os
from pathlib import Path

import pandas as pd

from few_shot_cell import INTERRUPTED
from medvisionllama import api
from medvisionllama.cli._progress import TerminalProgress
from medvisionllama.evaluation.evaluate import mean_class_dice, read_table
from medvisionllama.evaluation.statistics import bootstrap_interval
from medvisionllama.run_dir import RunDir

ARMS: dict[str, dict[str, object]] = {
    "block": {},
    "no-block": {"network.insert": "none"},
    "no-tokens": {"network.tokens": False},
}
RESULTS = Path(__file__).parent / "results" / "hippocampus"


def main() -> None:
    arguments = parse()
    tables = {}
    for arm, overrides in ARMS.items():
        run = RunDir(arguments.runs / f"hippocampus-{arm}")
        if not run.evaluation.is_file():
            trained = api.train(
                arguments.data, out=run.path, max_minutes=arguments.minutes, members=1, overrides=overrides, test=False,
                resume=run.config.is_file(), progress=TerminalProgress(),
            )  # fmt: skip
            if not trained.finished:
                raise SystemExit(INTERRUPTED)
            api.evaluate(run.path, progress=TerminalProgress())
        tables[arm] = read_table(run.evaluation)
        RESULTS.mkdir(parents=True, exist_ok=True)
        tables[arm].to_csv(RESULTS / f"{arm}.csv", index=False)
    summary = [summarise(arm, table, tables["block"], arguments.runs) for arm, table in tables.items()]
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(pd.DataFrame(summary).drop(columns="machine").to_string(index=False))


def summarise(arm: str, table: pd.DataFrame, reference: pd.DataFrame, runs: Path) -> dict[str, object]:
    """Mean class Dice with its interval over patients, and the paired difference from the arm with the block."""
    run = RunDir(runs / f"hippocampus-{arm}")
    manifest, history = json.loads(run.manifest.read_text()), run.read_history()
    dice, base = mean_class_dice(table), mean_class_dice(reference)
    difference = dice - base
    classes = table[table["class"] != "foreground"]
    low, high = bootstrap_interval(dice.tolist(), dice.index.tolist())
    return {
        "arm": arm,
        "dice": round(dice.mean(), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        **{f"dice_{name}": round(group["dice"].mean(), 4) for name, group in classes.groupby("class")},
        "nsd_1mm": round(classes["nsd"].mean(), 4),
        "hd95_mm": round(classes["hd95_mm"].mean(), 3),
        "minus_block": round(difference.mean(), 4),
        "minus_block_interval": [
            round(value, 4) for value in bootstrap_interval(difference.tolist(), dice.index.tolist())
        ],
        "test_cases": len(dice),
        "validation_dice": round(max(record["dice"] for record in history), 4),
        "steps": history[-1]["step"],
        "minutes": round(history[-1]["seconds"] / 60, 2),
        "gate_rms": history[-1].get("gate_rms"),
        "trainable": manifest["network"]["trainable_parameters"],
        "frozen": manifest["network"]["frozen_parameters"],
        "split": manifest["splits_sha256"][:12],
        "machine": {**manifest["hardware"], "precision": manifest.get("precision")},
    }


def parse() -> argparse.Namespace:
    default = Path(os.environ.get("MEDVISIONLLAMA_DATA", "../shared/data")) / "Task04_Hippocampus"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--minutes", type=float, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
