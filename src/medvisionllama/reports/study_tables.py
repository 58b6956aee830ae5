"""The tables of a study: one per model and measure, arms by tasks and fractions; sizes and times by arm.

The page and the LaTeX files are both written from these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from medvisionllama.reports.study import METRICS, Metric, Study, source
from medvisionllama.reports.study_words import KEY, number, verdict

SIGNS = {"better": "▲", "worse": "▼", "open": ""}


@dataclass(frozen=True)
class Cell:
    """A mean over patients and runs, and where it stands in the CSV files."""

    mean: str
    sd: str
    """SD over runs; a dash for one run."""
    best: bool
    verdict: str
    """better or worse than the reference after Holm's correction, else open."""
    partial: bool
    """Without a run that another arm of this column has: splits differ in how hard they are."""
    source: str

    @property
    def sign(self) -> str:
        """Arrow up for better, down for worse."""
        return SIGNS[self.verdict]


@dataclass(frozen=True)
class MeasureTable:
    """Arms in rows, tasks and fractions in columns."""

    model: str
    metric: Metric
    name: str
    columns: list[tuple[str, float]]
    rows: list[tuple[str, list[Cell | None]]]

    @property
    def tasks(self) -> dict[str, int]:
        """Number of columns of each task."""
        counts: dict[str, int] = {}
        for task, _ in self.columns:
            counts[task] = counts.get(task, 0) + 1
        return counts

    def part(self, start: int, stop: int) -> "MeasureTable":
        """Some of the columns, for paper that is not as wide as a screen."""
        rows = [(arm, cells[start:stop]) for arm, cells in self.rows]
        return MeasureTable(self.model, self.metric, self.name, self.columns[start:stop], rows)


@dataclass(frozen=True)
class SizeRow:
    """An arm's size beside its Dice at the largest fraction, in columns of `size_columns`."""

    model: str
    arm: str
    variant_of: str
    trainable: str
    frozen: str
    gflops: str
    gate: str
    cells: list[Cell | None]
    source: str


def measure_tables(study: Study) -> list[MeasureTable]:
    """Tables by measure, then model."""
    tables = []
    verdicts = {
        tuple(row[column] for column in KEY): verdict(row, METRICS[row["metric"]])
        for row in study.comparisons.to_dict(orient="records")
    }
    for name in dict.fromkeys(study.summary["metric"]):
        for model in dict.fromkeys(study.summary["model"]):
            chosen = (study.summary["metric"] == name) & (study.summary["model"] == model)
            if chosen.any():
                tables.append(_measure_table(study, study.summary[chosen], model, name, verdicts))
    return tables


def _measure_table(
    study: Study, rows: pd.DataFrame, model: str, name: str, verdicts: Mapping[tuple[Any, ...], str]
) -> MeasureTable:
    metric = METRICS[name]
    repetitions = _repetitions(study, model)
    pairs = rows[["task", "fraction"]].drop_duplicates()
    tasks = list(dict.fromkeys(rows["task"]))
    columns = [
        (task, value) for task in tasks for value in sorted(pairs.loc[pairs["task"] == task, "fraction"])
    ]
    by_arm: dict[str, list[Cell | None]] = {
        arm: [None] * len(columns) for arm in study.arm_names if arm in set(rows["arm"])
    }
    for place, (task, fraction) in enumerate(columns):
        column = rows[(rows["task"] == task) & (rows["fraction"] == fraction)]
        done = {arm: repetitions.get((task, fraction, arm), frozenset()) for arm in column["arm"]}
        every = frozenset().union(*done.values())
        whole = column.loc[[done[arm] == every for arm in column["arm"]], "mean"]
        # As rounded, so that of two cells that show the same number both are bold or none.
        best = number(whole.min() if metric.lower_is_better else whole.max(), metric.decimals)
        for row in column[column["num_runs"] > 0].to_dict(orient="records"):
            partial = done[row["arm"]] != every
            by_arm[row["arm"]][place] = Cell(
                mean=number(row["mean"], metric.decimals),
                sd=number(row["seed_sd"], metric.decimals),
                best=not partial and len(column) > 1 and number(row["mean"], metric.decimals) == best,
                verdict=verdicts.get(tuple(row[key] for key in KEY), "open"),
                partial=partial,
                source=_cell_source(row, metric),
            )
    return MeasureTable(model, metric, name, columns, list(by_arm.items()))


def _repetitions(study: Study, model: str) -> dict[tuple[Any, ...], frozenset[tuple[Any, ...]]]:
    """Fold and seed of every run that is done, by task, fraction and arm."""
    done = study.runs[(study.runs["state"] == "done") & (study.runs["model"] == model)]
    return {
        key: frozenset(zip(group["fold"], group["seed"], strict=True))
        for key, group in done.groupby(["task", "fraction", "arm"])
    }


def _cell_source(row: Mapping[Any, Any], metric: Metric) -> str:
    """The key of the row, and the rest of what it holds."""
    value = {key: number(row[key], metric.decimals) for key in ("low", "high", "median", "q1", "q3")}
    return (
        f"{source('summary.csv', row, *KEY)}. 95 % interval over patients {value['low']} to {value['high']}, "
        f"median {value['median']} (quartiles {value['q1']} to {value['q3']}), "
        f"{int(row['num_patients'])} patients, runs: {int(row['num_runs'])}, "
        f"cases and classes with an empty mask: {number(row['num_empty'], 0)}"
    )


def size_columns(tables: list[MeasureTable]) -> list[tuple[str, float]]:
    """The largest fraction of each task."""
    largest: dict[str, float] = {}
    for table in tables:
        for task, fraction in table.columns:
            largest[task] = max(fraction, largest.get(task, fraction))
    return list(largest.items())


def size_rows(study: Study, arms: pd.DataFrame, tables: list[MeasureTable]) -> list[SizeRow]:
    """The ablation table: what is trained, what is frozen, what it computes, and what comes of it."""
    columns = size_columns(tables)
    by_model = {table.model: table for table in tables if table.name == "dice"}
    found = []
    for row in arms.to_dict(orient="records"):
        table = by_model.get(row["model"])
        cells = (
            dict(zip(table.columns, dict(table.rows)[row["arm"]], strict=True))
            if (table and row["arm"] in dict(table.rows))
            else {}
        )
        found.append(
            SizeRow(
                model=row["model"],
                arm=row["arm"],
                variant_of=row["variant_of"],
                trainable=_range(row, "trainable", _count),
                frozen=_range(row, "frozen", _count),
                gflops=_range(row, "gflops", lambda value: f"{value:.1f}"),
                gate=number(row["gate_rms"], 4),
                cells=[cells.get(column) for column in columns],
                source=source("arms.csv", row, "model", "arm"),
            )
        )
    return found


def _count(value: float) -> str:
    return f"{int(value):,}"


def _range(row: Mapping[Any, Any], column: str, words: Any) -> str:
    """A value, or the smallest and the largest where tasks differ."""
    low, high = row[column], row[f"{column}_max"]
    if pd.isna(low):
        return "–"
    return words(low) if words(low) == words(high) else f"{words(low)} to {words(high)}"
