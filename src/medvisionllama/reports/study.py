"""`Study`: what the page of a study is made of, as plain tables, and the two tables that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from medvisionllama.evaluation.comparison import Family
from medvisionllama.evaluation.repetitions import KEYS, LOWER_IS_BETTER, of_classes, patient_values

RUN = ("task", "model", "fraction", "fold", "seed")
"""Columns that say which training a row is about, whatever the arm."""


@dataclass(frozen=True)
class Metric:
    """How a measure is named, rounded and judged."""

    title: str
    decimals: int
    lower_is_better: bool

    def sign(self, difference: float) -> int:
        """1 where a difference is for the better, -1 where for the worse, 0 for none."""
        better = (difference > 0) - (difference < 0)
        return -better if self.lower_is_better else better


METRICS = {
    name: Metric(title, decimals, lower_is_better=name in LOWER_IS_BETTER)
    for name, title, decimals in (("dice", "Dice", 3), ("nsd", "NSD", 3), ("hd95_mm", "HD95, mm", 2))
}


@dataclass(frozen=True)
class Study:
    """Runs, what they measured and how the arms compare; the columns are those of the CSV files."""

    name: str
    about: str
    """What it is for, in a few sentences."""
    matrix: str
    """The matrix as YAML."""
    reference: str
    """The arm that the others are compared with."""
    runs: pd.DataFrame
    cases: pd.DataFrame
    curves: pd.DataFrame
    comparisons: pd.DataFrame
    summary: pd.DataFrame
    """One row per task, model, arm, fraction and metric: mean, low, high, seed_sd, num_patients, ..."""
    few_shot: pd.DataFrame
    """The same, by Dice, over the runs whose folds and seeds every arm has at each of its fractions."""
    arms: Mapping[str, str]
    """What each arm is, in one line; their order is the order on the page."""
    family: Family = "report"
    """The comparisons that Holm's correction took together."""
    ranks: pd.DataFrame | None = None
    critical_difference: float | None = None
    notes: Sequence[str] = ()
    compute: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    """Where the page of a run is, from the study's own page, by run_id."""

    @property
    def tolerance_words(self) -> str:
        """Within what NSD counts a surface as met: `1 mm`, or `A 1 mm, B 3 mm`; empty if unknown."""
        if "tolerance_mm" not in self.cases:
            return ""
        by_task = self.cases.groupby("task")["tolerance_mm"].first()
        if by_task.nunique() == 1:
            return f"{by_task.iloc[0]:g} mm"
        return ", ".join(f"{task} {tolerance:g} mm" for task, tolerance in by_task.items())

    def rule_of(self, metric: str) -> str:
        """What must be said beside a measure, as a sentence; mostly nothing."""
        if metric == "nsd" and self.tolerance_words:
            return f"Tolerance: {self.tolerance_words}."
        if metric == "hd95_mm":
            return "A class in one of both masks alone counts as the diagonal of the scan."
        return ""

    @property
    def arm_names(self) -> list[str]:
        """Every arm in the order of `arms`, then those that only the tables know."""
        return list(dict.fromkeys([*self.arms, *self.runs["arm"], *self.summary["arm"]]))

    @property
    def family_words(self) -> str:
        """Over which comparisons Holm's correction went."""
        words = "over all comparisons of a measure"
        return f"{words} within a task" if self.family == "task" else words

    @property
    def headline_arm(self) -> str | None:
        """The arm whose comparisons are told first: the first that is compared with the reference, if any is."""
        compared = set(self.comparisons["arm"])
        return next((arm for arm in self.arm_names if arm in compared), None)

    @property
    def trainings(self) -> pd.DataFrame:
        """The runs without further evaluations of their weights."""
        return self.runs[self.runs["variant_of"].fillna("") == ""]

    def state(self, name: str) -> pd.DataFrame:
        """Runs that are done, failed, planned, ..."""
        return self.trainings[self.trainings["state"] == name]


_NUMBERS = (
    *("steps", "seconds", "evaluation_seconds", "validation_dice", "test_dice"),
    *("trainable", "frozen", "gflops", "gate_rms", "attempts", "train_cases", "test_cases"),
)
_NEEDED = {
    "runs": (
        *("run_id", *RUN, "arm", "state", "splits_sha256", "data_sha256", *_NUMBERS),
        *("error", "machine", "variant_of"),
    ),
    "cases": ("run_id", *RUN, "arm", "case_id", "patient_id", "class", "dice"),
    "curves": ("run_id", *RUN, "arm", "step", "dice"),
    "comparisons": ("task", "model", "fraction", "metric", "arm", "seed_p"),
    "summary": ("task", "model", "fraction", "metric", "arm", "mean", "num_runs", "num_empty"),
    "few_shot": ("task", "model", "fraction", "metric", "arm", "mean", "num_runs"),
}


def whole(study: Study) -> Study:
    """The same with every column that the page reads, and numbers where a run that is not done has none."""
    frames: dict[str, Any] = {}
    for name, columns in _NEEDED.items():
        frame: pd.DataFrame = getattr(study, name)
        frames[name] = frame.reindex(columns=[*frame.columns, *(key for key in columns if key not in frame)])
    runs = frames["runs"]
    frames["runs"] = runs.assign(**{name: pd.to_numeric(runs[name], errors="coerce") for name in _NUMBERS})
    return replace(study, **frames)


def percent(fraction: float) -> str:
    """A fraction of the training cases in words.

    >>> percent(0.1), percent(0.125), percent(1.0)
    ('10 %', '12.5 %', '100 %')
    """
    return f"{100 * fraction:.4g} %"


def source(table: str, row: Mapping[Any, Any], *columns: str) -> str:
    """Where a number comes from: the file and the values that pick its row.

    >>> source("runs.csv", {"task": "liver", "fold": 0}, "task", "fold")
    'runs.csv: task=liver, fold=0'
    """
    return f"{table}: " + ", ".join(f"{column}={row[column]}" for column in columns)


def patients_table(study: Study) -> pd.DataFrame:
    """Mean class Dice of each patient in an arm and in the reference, over the runs that both have.

    `run_id` is one of the arm's runs that measured the patient, to look at.
    """
    cases = of_classes(study.cases.assign(dice=pd.to_numeric(study.cases["dice"])))
    by_patient = patient_values(cases, ["dice"]).reset_index()
    by_patient = by_patient.merge(cases[[*KEYS, "run_id"]].drop_duplicates(), on=KEYS)
    is_reference = by_patient["arm"] == study.reference
    other = (
        by_patient[is_reference].drop(columns=["arm", "run_id"]).rename(columns={"dice": "reference_dice"})
    )
    pairs = by_patient[~is_reference].merge(other, on=[*RUN, "patient_id"])
    table = pairs.groupby(["task", "model", "fraction", "arm", "patient_id"], as_index=False, sort=False).agg(
        num_runs=("dice", "size"),
        dice=("dice", "mean"),
        reference_dice=("reference_dice", "mean"),
        run_id=("run_id", "first"),
    )
    table["difference"] = table["dice"] - table["reference_dice"]
    return table


def arms_table(study: Study) -> pd.DataFrame:
    """One row per model and arm: how many runs, how large the network is, how long it took.

    Sizes can differ between tasks (classes, channels), so there is a smallest and a largest one.
    """
    rows = []
    for (model, arm), group in study.runs.groupby(["model", "arm"], sort=False):
        row: dict[str, Any] = {
            "model": model,
            "arm": arm,
            "variant_of": next((name for name in group["variant_of"].dropna() if name), ""),
            "planned": len(group),
            "done": int((group["state"] == "done").sum()),
            "failed": int((group["state"] == "failed").sum()),
        }
        for column in ("trainable", "frozen", "gflops"):
            row |= {column: group[column].min(), f"{column}_max": group[column].max()}
        row["gate_rms"] = group["gate_rms"].mean()
        row["training_hours"] = group["seconds"].sum() / 3600
        row["evaluation_hours"] = group["evaluation_seconds"].sum() / 3600
        rows.append(row)
    order = {arm: place for place, arm in enumerate(study.arm_names)}
    table = pd.DataFrame(rows, columns=None if rows else ["model", "arm"])
    return table.sort_values(
        ["model", "arm"], key=lambda column: column.map(order) if column.name == "arm" else column
    )
