"""What turned views add: a run's scans that did not train, segmented with and without them.

python benchmarks/views.py RUN --out docs/experiments/views/acdc-20-minutes.csv
python benchmarks/views.py RUN --every 3      # every third scan

Dice of each class, as the network leaves it and with the largest component of all classes together alone, which is
what validation cases choose on hearts.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from medvisionllama import Predictor
from medvisionllama.config import read_config
from medvisionllama.data.index import open_configured
from medvisionllama.data.readers import read_label
from medvisionllama.data.volume import to_ras
from medvisionllama.evaluation.metrics import dice
from medvisionllama.evaluation.statistics import bootstrap_interval
from medvisionllama.inference.postprocess import remove_islands
from medvisionllama.run_dir import RunDir


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--every", type=int, default=1, help="take each so many-th scan")
    parser.add_argument("--out", type=Path, help="where to write the table of cases")
    arguments = parser.parse_args()
    table = compare(arguments.run, every=arguments.every)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.out, index=False)
    print(summarise(table).to_string(index=False))


def compare(run: Path, *, every: int = 1) -> pd.DataFrame:
    """One row for each scan, class, way to look and way to clean."""
    config, trained = read_config(RunDir(run).config), RunDir(run).read_manifest()["cases"]["train"]
    predictor = Predictor.from_run(run, device="cpu")
    looks = {
        name: looking(predictor, turn=turn) for name, turn in (("as it is", False), ("turned too", True))
    }
    dataset = open_configured(config.data, begun=True)
    known = {dataset.patients[case_id] for case_id in trained}
    cases = [case for case in dataset.cases if case.patient_id not in known][::every]
    rows = []
    for case in cases:
        assert case.label is not None, "datasets list labelled cases"
        truth = to_ras(read_label(case.label)).array
        for name, look in looks.items():
            started = time.perf_counter()
            mask = to_ras(look.predict(case.images, cleaned=False).mask)
            seconds = time.perf_counter() - started
            largest = remove_islands(mask.array, mask.spacing_mm, largest_foreground=True)
            rows += [
                {
                    "patient_id": case.patient_id,
                    "case_id": case.case_id,
                    "class": class_name,
                    "views": name,
                    "components": components,
                    "dice": round(dice(array == value, truth == value), 4),
                    "seconds": round(seconds, 2),
                }
                for components, array in (("all components", mask.array), ("largest", largest))
                for value, class_name in predictor.plan.mask_classes.items()
            ]
    return pd.DataFrame(rows)


def looking(predictor: Predictor, *, turn: bool) -> Predictor:
    """The same networks, with turned views or without."""
    members = []
    for member in predictor.members:
        inference = member.config.inference.model_copy(update={"turn": turn})
        members.append(replace(member, config=member.config.model_copy(update={"inference": inference})))
    return Predictor(members)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice over patients for each way to clean, and the paired difference that turned views make."""
    lines = []
    for components, part in table.groupby("components"):
        means = part.groupby(["views", "patient_id"])["dice"].mean().unstack(0)
        difference = means["turned too"] - means["as it is"]
        low, high = bootstrap_interval(difference.tolist(), difference.index.tolist())
        lines.append(
            {
                "components": components,
                "patients": len(means),
                "as_it_is": round(means["as it is"].mean(), 4),
                "turned_too": round(means["turned too"].mean(), 4),
                "difference": round(difference.mean(), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "median": round(float(np.median(difference)), 4),
                "better": int((difference > 0).sum()),
                "least": round(difference.min(), 4),
            }
        )
    return pd.DataFrame(lines)


if __name__ == "__main__":
    main()
