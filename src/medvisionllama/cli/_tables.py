"""Tables on the terminal."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medvisionllama.evaluation.evaluate import mean_dice, read_table, summarise
from medvisionllama.inference.cleaning import Choice


def print_choice(choice: Choice, where: Path) -> None:
    """Print what each way to clean masks scored, and which was taken."""
    shown = Table(title=f"mean class Dice over {choice.num_cases} validation cases", title_justify="left")
    shown.add_column("cleaning")
    for name in ("all", *choice.candidates[0].dice_per_class):
        shown.add_column(escape(name), justify="right")
    for candidate in choice.candidates:
        scores = (candidate.dice, *candidate.dice_per_class.values())
        shown.add_row(candidate.words, *(f"{score:.4f}" for score in scores))
    console = Console()
    console.print(shown)
    console.print(f"chosen: {choice.words} ({where})", soft_wrap=True, markup=False, highlight=False)


def _interval(row: dict[Any, Any]) -> str:
    """Of the mean; one patient has none."""
    return "one patient" if math.isnan(row["dice_low"]) else f"{row['dice_low']:.3f}–{row['dice_high']:.3f}"


def print_summary(source: Path | pd.DataFrame) -> None:
    """Print each class's mean, interval, median and quartiles."""
    table = source if isinstance(source, pd.DataFrame) else read_table(source)
    shown = Table(
        title=f"{table['case_id'].nunique()} cases, mean class Dice {mean_dice(table):.3f}",
        title_justify="left",
    )
    for name in ("class", "Dice mean (95 % interval)", "median (quartiles)", "NSD", "HD95 mm", "empty"):
        shown.add_column(name, justify="left" if name == "class" else "right")
    for row in summarise(table).to_dict(orient="records"):
        shown.add_row(
            escape(str(row["class"])),
            f"{row['dice_mean']:.3f} ({_interval(row)})",
            f"{row['dice_median']:.3f} ({row['dice_q1']:.3f}–{row['dice_q3']:.3f})",
            f"{row['nsd_median']:.3f}",
            f"{row['hd95_mm_median']:.2f}",
            str(row["empty"]),
        )
    Console().print(shown)
