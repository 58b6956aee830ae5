"""Draw the few-shot table: `small` minus its strongest rival, a dot for each patient.

python benchmarks/few_shot_figure.py benchmarks/results/few_shot --out docs/images/few_shot.png

Each line is a training of both on one machine. Only rows of a preset's table are drawn, those at the minutes of
today; a rival that we had built too weak has a name of its own and is not in it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from few_shot_summary import by_patient, machine_name, mean_of_seeds_interval, unused_table
from medvisionllama.evaluation.evaluate import mean_class_dice, read_table

OURS, RIVAL = "block", "dynunet-16-one-network"
ROWS = {
    "acdc-4-20min": "4 hearts (ACDC)",
    "sunnybrook-5-20min": "5 hearts (Sunnybrook)",
    "hippocampus-14-20min": "14 hippocampi",
    "hippocampus-all-30min": "144 hippocampi, 30 min",
}
REACH = 0.1  # of the axis; of patients beyond it the numbers are written, behind an arrow
_OURS_AHEAD, _RIVAL_AHEAD, _MEAN = "#0b6e99", "#b5541c", "#1c2430"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder with a folder for each row")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    arguments = parser.parse_args()
    if not (trainings := pairs(arguments.results)):
        raise SystemExit(f"no cells of {OURS} and {RIVAL} on one machine in {arguments.results}")
    draw(trainings).savefig(arguments.out, dpi=150)


def pairs(results: Path) -> list[tuple[str, dict[str, pd.Series]]]:
    """Of each training of both arms on one machine its name, and each part's difference by patient.

    Parts are `left out` and `test`; one in which the row scores nobody is missing.
    """
    found = []
    for row, name in ROWS.items():
        for ours in sorted((results / row).glob(f"*/{OURS}-s*.json"), key=lambda path: (path.stem, path)):
            rival = ours.with_name(ours.name.replace(OURS, RIVAL, 1))
            if not rival.is_file():
                continue
            cell = json.loads(ours.read_text())
            tables = {
                "left out": (unused_table(ours), unused_table(rival)),
                "test": (ours.with_suffix(".csv"), rival.with_suffix(".csv")),
            }
            parts = {part: difference(*both) for part, both in tables.items() if all(map(Path.is_file, both))}
            machine = machine_name(cell["hardware"]).replace("(R)", "").replace(" Processor", "")
            found.append((f"{name}, seed {cell['seed']}\n{machine}", parts))
    return found


def difference(ours: Path, rival: Path) -> pd.Series:
    """Mean class Dice of the first table's scans minus the second's, by patient."""
    table = read_table(ours)
    patients = table.groupby("case_id")["patient_id"].first().to_dict()
    other = mean_class_dice(read_table(rival))
    return by_patient(mean_class_dice(table), other, patients, f"{ours} and {rival}")


def draw(trainings: list[tuple[str, dict[str, pd.Series]]]) -> Figure:
    """A panel for patients left out and one for those of the test split, a line for each training."""
    figure = Figure(figsize=(9, 0.8 + 0.52 * len(trainings)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, ("left out", "test"), strict=True):
        for place, (_, parts) in enumerate(trainings):
            if part in parts:
                _line(axes, place, parts[part])
        axes.axvline(0, color=_MEAN, linewidth=0.8)
        axes.set_title(
            "patients left out" if part == "left out" else "patients of the test split", fontsize=10
        )
        axes.set(xlim=(-REACH, REACH), xticks=np.linspace(-REACH, REACH, 5))
        axes.set_xlabel("← DynUNet ahead    Dice    small ahead →", fontsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelsize=8)
    panels[0].set_yticks(range(len(trainings)), [name for name, _ in trainings], fontsize=8)
    panels[0].invert_yaxis()
    return figure


def _line(axes: Axes, place: int, differences: pd.Series) -> None:
    """One training: its patients, their mean and its 95 % interval."""
    values = differences.to_numpy()
    # Sorted and spread by turns, so that the picture is the same each time it is made.
    offsets = np.resize([0.0, 0.12, -0.12, 0.24, -0.24], len(values))
    order = np.argsort(values, kind="stable")
    colours = np.select([values[order] > 0, values[order] < 0], [_OURS_AHEAD, _RIVAL_AHEAD], _MEAN)
    inside = abs(values[order]) <= REACH
    axes.scatter(
        values[order][inside], place + offsets[inside], c=colours[inside], s=12, alpha=0.75, linewidths=0
    )
    for side, beyond in ((1, values > REACH), (-1, values < -REACH)):
        if beyond.any():
            numbers = ", ".join(f"{value:+.2f}" for value in sorted(values[beyond]))
            axes.annotate(
                f"{numbers} →" if side > 0 else f"← {numbers}",
                (side * REACH, place - 0.36),
                ha="right" if side > 0 else "left",
                va="center",
                fontsize=8,
                color=_OURS_AHEAD if side > 0 else _RIVAL_AHEAD,
            )
    low, high = mean_of_seeds_interval([differences])
    axes.plot([low, high], [place, place], color=_MEAN, linewidth=2, solid_capstyle="butt")
    axes.plot(values.mean(), place, marker="D", color=_MEAN, markersize=5)


if __name__ == "__main__":
    main()
