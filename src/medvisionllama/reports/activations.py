"""Pages of `explain`: maps of one scan over its picture, or means over several scans; both with the scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medvisionllama import __version__
from medvisionllama._files import write_text
from medvisionllama.colours import colour_of
from medvisionllama.data.labels import FOREGROUND
from medvisionllama.evaluation.explain.job import Explained
from medvisionllama.evaluation.explain.targets import PREDICTION
from medvisionllama.evaluation.pointing import peak
from medvisionllama.inference.activations import MapName
from medvisionllama.reports import plots
from medvisionllama.reports.pages import render

TITLES = {
    "encoder": "Encoder",
    "vd1": "VD1, the way into the block",
    "block": "Language-model block",
    "vd2": "VD2, the way back",
    "mlp": "MLP insert",
    "decoder": "Decoder",
}
KIND_TITLES = {"norm": "token norm", "attention": "attention received (1 = an even share)"}


@dataclass(frozen=True)
class Heading:
    """What both pages say first."""

    run: str
    networks: dict[str, str]
    """What each network of the table is, in words."""
    notes: Sequence[str]


@dataclass(frozen=True)
class MapPicture:
    """A map of every network that has it, in three planes."""

    stage: str
    kind: str
    source: str


def write_case_page(explained: Explained, heading: Heading, path: Path) -> None:
    """Write the page of one scan."""
    names = list(dict.fromkeys(name for maps in explained.maps.values() for name in maps))
    loud = warnings_on(explained)
    classes = [(name, colour_of(index)) for index, name in enumerate(explained.classes.values())]
    _write(
        path,
        heading,
        title=explained.scan.case_id,
        loud=loud,
        classes=classes,
        pictures=[
            MapPicture(TITLES[name.stage], KIND_TITLES[name.kind], _picture(explained, name))
            for name in _in_order(names)
        ],
        table=explained.table,
        summary=None,
        links=[],
    )


def write_summary_page(
    table: pd.DataFrame,
    summary: pd.DataFrame,
    heading: Heading,
    path: Path,
    *,
    title: str,
    loud: Sequence[str] = (),
) -> None:
    """Write the page of several scans, whose own pages lie in folders of their names beside it."""
    cases = list(table["case_id"].unique())
    _write(
        path,
        heading,
        title=f"{title}: {len(cases)} scans of {table['patient_id'].nunique()} patients",
        loud=loud,
        classes=[],
        pictures=[],
        table=table,
        summary=summary,
        links=cases,
    )


def warnings_on(explained: Explained) -> list[str]:
    """What must not be overlooked about one scan."""
    lines = []
    scan = explained.scan
    if scan.truth == PREDICTION:
        lines.append(
            f"{scan.case_id}: no true mask is known, so the maps are scored against the run's own prediction: high scores then say that maps and prediction agree, not that either is right. Give the mask with --label."
        )
    trained = scan.part == "train" or scan.trained_here or scan.trained_before
    if scan.part == "train":
        lines.append(f"{scan.case_id} is a training case of this run: the network has seen its mask.")
    elif scan.trained_here:
        lines.append(
            f"{scan.case_id}: a case or patient of this name trained this run, so the network may have seen its mask."
        )
    elif scan.trained_before:
        lines.append(
            f"{scan.case_id}: a case or patient of this name trained the run that this one began with, so the network may have seen its mask."
        )
    if scan.trained_other and not trained:
        lines.append(
            f"{scan.case_id}: the other run was trained on a patient of this name and this run was not, so the two cannot be compared here; take runs of one split."
        )
    if not explained.truth.any():
        lines.append(f"{scan.case_id}: the mask is empty, so there is nothing to point at and no score.")
    return lines


def main_class(table: pd.DataFrame) -> str:
    """The class that stands for all: the merged foreground, or the only one."""
    names = list(table["class"].unique())
    return FOREGROUND if FOREGROUND in names else str(names[0])


def _write(
    path: Path, heading: Heading, *, table: pd.DataFrame, summary: pd.DataFrame | None, **content: Any
) -> None:
    source = table if summary is None else summary
    page = render(
        "explain.html.j2",
        heading=heading,
        version=__version__,
        main=main_class(table),
        by_class={name: _rows(source[source["class"] == name]) for name in source["class"].unique()},
        networks=list(source["network"].unique()),
        over_cases=summary is not None,
        **content,
    )
    write_text(path, page)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per map, with the scores of each network side by side; None for what is not a number."""
    records = json.loads(table.to_json(orient="records"))
    rows: dict[MapName, dict[str, Any]] = {}
    for record in records:
        rows.setdefault(MapName(record["stage"], record["kind"]), {})[record["network"]] = record
    return [
        {"stage": TITLES[name.stage], "kind": name.kind, "by_network": rows[name]} for name in _in_order(rows)
    ]


def _in_order(names: Any) -> list[MapName]:
    stages = list(TITLES)
    return sorted(names, key=lambda name: (stages.index(name.stage), name.kind != "norm"))


def _picture(explained: Explained, name: MapName) -> str:
    """A row of three planes for each network that has the map; its maximum is marked, wherever it lies along."""
    shown = {network: maps[name] for network, maps in explained.maps.items() if name in maps}
    # Fixed margins: a layout that is solved for each of many figures takes longer than the networks.
    figure = Figure(figsize=(10, 3.3 * len(shown)))
    margins = {"left": 0.05, "right": 0.94, "bottom": 0.12 / len(shown), "top": 1 - 0.1 / len(shown)}
    ratios = {"width_ratios": [1, 1, 1, 0.04], "hspace": 0.25, "wspace": 0.12, **margins}
    grid = figure.subplots(len(shown), 4, squeeze=False, gridspec_kw=ratios)
    centre = plots.fullest(explained.truth > 0)
    for row, (network, values) in zip(grid, shown.items(), strict=True):
        # A few tokens of huge norm would leave the rest of the map in one colour.
        low, high = (float(value) for value in np.percentile(values, [1, 99.5]))
        highest = peak(values)
        for axes, plane in zip(row[:3], plots.PLANES, strict=True):
            pixel = plots.draw_scan(axes, explained.image, plane, centre)
            cut = plane.cut(values, centre)
            drawn = axes.imshow(
                cut,
                cmap="magma",
                alpha=0.6,
                vmin=low,
                vmax=max(high, low + 1e-9),
                origin="lower",
                extent=plots.extent_of(cut, pixel),
                interpolation="nearest",
            )
            for index, value in enumerate(explained.classes):
                plots.outline(
                    axes, plane.cut(explained.truth, centre) == value, pixel, colour_of(index), "solid"
                )
            axes.plot(
                (highest[plane.across] + 0.5) * pixel[0],
                (highest[plane.up] + 0.5) * pixel[1],
                marker="P",
                markersize=9,
                markerfacecolor="white",
                markeredgecolor="black",
            )
            axes.set_title(plane.name, fontsize=9)
        row[0].set_ylabel(f"{network}\n{row[0].get_ylabel()}", fontsize=9)
        figure.colorbar(drawn, cax=row[3], extend="both")
    return plots.png(figure)
