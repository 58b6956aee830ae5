"""Coordinates of the pictures that a page draws itself, since their dots can be pointed at and followed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import quote

import pandas as pd

from medvisionllama.reports.study import METRICS, Study, percent, source
from medvisionllama.reports.study_words import KEY, MARGIN, number, p_words, signed, verdict

WIDTH, HEIGHT = 280, 22
SIDE, EDGE = 260, 34
# Beyond this a page is slow; the rest is in patients.csv.
MAX_DOTS = 10_000


@dataclass(frozen=True)
class ForestRow:
    """A comparison with its place on the shared scale; None where it is not on it."""

    row: Mapping[Any, Any]
    arm: str
    where: str
    values: dict[str, str]
    verdict: str
    left: float | None
    right: float | None
    middle: float | None
    cut_left: bool
    cut_right: bool
    source: str


@dataclass(frozen=True)
class Forest:
    """Differences from the reference of one model by one measure."""

    model: str
    title: str
    lower_is_better: bool
    rows: list[ForestRow]
    zero: float
    ticks: list[tuple[float, str]]
    margin: tuple[float, float] | None


def forests(study: Study) -> list[Forest]:
    """One for each measure and model; arms in the order of the page, the study's own arm first."""
    table = study.comparisons
    names = sorted(study.arm_names, key=lambda arm: arm != study.headline_arm)
    found = []
    for name in dict.fromkeys(table["metric"]):
        for model in dict.fromkeys(table["model"]):
            rows = table[(table["metric"] == name) & (table["model"] == model)].to_dict(orient="records")
            if rows:
                found.append(_forest(name, model, sorted(rows, key=lambda row: names.index(row["arm"]))))
    return found


def _forest(name: str, model: str, rows: list[dict[Any, Any]]) -> Forest:
    metric = METRICS[name]
    reach = _reach(rows, MARGIN if name == "dice" else 0.0)

    def place(value: float) -> float:
        return round(WIDTH / 2 + value / reach * (WIDTH / 2 - 8), 1)

    def held(value: float) -> float | None:
        return None if pd.isna(value) else place(min(max(value, -reach), reach))

    drawn = [
        ForestRow(
            row=row,
            arm=row["arm"],
            where=f"{row['task']}, {percent(row['fraction'])}",
            values={
                **{
                    key: number(row[key], metric.decimals)
                    for key in ("mean", "reference_mean", "low", "high", "seed_sd")
                },
                "difference": signed(row["difference"], metric.decimals),
                "p": p_words(row["p"]),
                "p_holm": p_words(row["p_holm"]),
                "seed_p": p_words(row["seed_p"]),
                "effect": number(row["effect"], 2),
                "dz": number(row["dz"], 2),
                "needed": "–" if not _finite(row["patients_needed"]) else f"{int(row['patients_needed'])}",
                "tally": f"{int(row['wins'])} / {int(row['ties'])} / {int(row['losses'])}",
            },
            verdict=verdict(row, metric),
            left=held(row["low"]),
            right=held(row["high"]),
            middle=held(row["difference"]) if abs(row["difference"]) <= reach else None,
            cut_left=row["low"] < -reach,
            cut_right=row["high"] > reach,
            source=source("comparisons.csv", row, *KEY),
        )
        for row in rows
    ]
    step = _step(reach)
    steps = range(-int(reach / step), int(reach / step) + 1)
    return Forest(
        model=model,
        title=metric.title,
        lower_is_better=metric.lower_is_better,
        rows=drawn,
        zero=place(0),
        ticks=[(place(step * count), f"{step * count:g}") for count in steps],
        margin=(place(-MARGIN), place(MARGIN)) if name == "dice" else None,
    )


def _reach(rows: list[dict[Any, Any]], least: float) -> float:
    """Half the width of the scale: what most intervals need, so that one wide one does not flatten the others."""
    ends = sorted(
        max(abs(value) for value in (row["low"], row["high"], row["difference"]) if _finite(value))
        for row in rows
        if _finite(row["difference"])
    )
    if not ends:
        return least or 1.0
    usual = ends[len(ends) // 2]
    return max(min(ends[-1], 4 * usual), 1.5 * least, 1e-6) * 1.02


def _step(reach: float) -> float:
    """Distance of ticks: 1, 2 or 5 times a power of ten, two or three on each side."""
    power = 10.0 ** math.floor(math.log10(reach))
    return next((power * part for part in (0.2, 0.5, 1.0) if reach / (power * part) <= 3), power * 2)


def _finite(value: Any) -> bool:
    return not pd.isna(value) and math.isfinite(value)


@dataclass(frozen=True)
class Dot:
    """A patient: where it lies, what it says, what it leads to."""

    x: float
    y: float
    better: bool
    title: str
    link: str | None


@dataclass(frozen=True)
class Scatter:
    """Patients of one comparison, the reference to the right, the arm up."""

    arm: str
    where: str
    dots: list[Dot]
    ticks: list[tuple[float, str]]
    source: str


def scatters(study: Study, patients: pd.DataFrame) -> list[Scatter]:
    """One for each comparison by Dice; those of the study's own arm first."""
    names = sorted(study.arm_names, key=lambda arm: arm != study.headline_arm)
    found, dots = [], 0
    keys = ["arm", "model", "task", "fraction"]
    for key, group in sorted(
        patients.groupby(keys, sort=False), key=lambda item: names.index(str(item[0][0]))
    ):
        dots += len(group)
        if dots > MAX_DOTS:
            break
        found.append(_scatter(study, dict(zip(keys, key, strict=True)), group))
    return found


def _scatter(study: Study, key: dict[str, Any], group: pd.DataFrame) -> Scatter:
    lowest = min(group["dice"].min(), group["reference_dice"].min())
    bottom = min(math.floor(lowest * 10) / 10, 0.9)

    def place(value: float) -> float:
        return round((value - bottom) / (1 - bottom) * SIDE, 1)

    rows = study.runs[(study.runs["arm"] == key["arm"]) & (study.runs["variant_of"].fillna("") != "")]
    is_training = rows.empty
    dots = [
        Dot(
            x=place(row["reference_dice"]),
            y=SIDE - place(row["dice"]),
            better=row["difference"] > 0,
            title=(
                f"{row['patient_id']}: {row['arm']} {number(row['dice'], 3)}, {study.reference} "
                f"{number(row['reference_dice'], 3)}, difference {signed(row['difference'], 3)}, "
                f"runs: {row['num_runs']}"
            ),
            # A run's page shows the masks of the whole network, not those of a further evaluation.
            link=link_of(study, row["run_id"]) if is_training else None,
        )
        for row in group.to_dict(orient="records")
    ]
    middle = round((bottom + 1) / 2, 2)
    return Scatter(
        arm=key["arm"],
        where=f"{key['task']}, {key['model']}, {percent(key['fraction'])}",
        dots=dots,
        ticks=[(place(value), f"{value:g}") for value in (bottom, middle, 1.0)],
        source=source("patients.csv", key, "task", "model", "fraction", "arm"),
    )


def link_of(study: Study, run_id: str) -> str | None:
    """The way to a run's own page; quoted, so that a name with odd characters stays a path."""
    path = study.links.get(run_id)
    return quote(path) if path else None


def by_arm(found: list[Any]) -> list[tuple[str, list[Any]]]:
    """Pictures or rows of each arm, in their order."""
    return [(arm, list(group)) for arm, group in groupby(found, key=lambda item: item.arm)]
