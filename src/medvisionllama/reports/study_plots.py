"""Pictures of a study as inline PNG: learning curves, few-shot curves and mean ranks.

An arm has the same colour, marker and line in all of them, so that nothing hangs on colour alone.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medvisionllama.colours import colour_of
from medvisionllama.reports.plots import png
from medvisionllama.reports.study import Study, percent

_MARKERS = "osD^vPX*<>ph"
_LINES = ("solid", "dashed", "dashdot", "dotted")
_PANEL = (3.6, 2.9)


def look(study: Study, arm: str) -> dict[str, Any]:
    """How an arm is drawn."""
    place = study.arm_names.index(arm)
    return {
        "color": colour_of(place),
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _LINES[place % len(_LINES)],
        "markeredgecolor": "#1c2430",
        "markeredgewidth": 0.6,
        "markersize": 6,
        "label": arm[:30],
    }


def learning_curves(study: Study, task: str, model: str) -> str | None:
    """Validation Dice by step: mean and range over an arm's runs, a panel for each fraction.

    A mean is drawn only as far as all of the arm's runs got.
    """
    curves = study.curves
    curves = curves[(curves["task"] == task) & (curves["model"] == model)]
    done = set(study.state("done")["run_id"])
    fractions = sorted(set(curves["fraction"]))
    if not fractions:
        return None
    figure, panels = _panels(len(fractions))
    for axes, fraction in zip(panels, fractions, strict=True):
        chosen = curves[curves["fraction"] == fraction]
        for arm in study.arm_names:
            runs = chosen[chosen["arm"] == arm]
            if runs["run_id"].isin(done).any():
                runs = runs[runs["run_id"].isin(done)]
            if runs.empty:
                continue
            steps, values = _on_common_steps(runs)
            line = look(study, arm)
            axes.plot(steps, values.mean(axis=0), markevery=max(1, len(steps) // 8), **line)
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=line["color"], alpha=0.2, linewidth=0
            )
        axes.set(title=percent(fraction), xlabel="step")
    panels[0].set_ylabel("validation Dice")
    _legend(figure, panels)
    return png(figure)


def _on_common_steps(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Steps up to the shortest run's last one, and each run's Dice at them."""
    series = [group.sort_values("step") for _, group in runs.groupby("run_id")]
    first = max(group["step"].iloc[0] for group in series)
    last = min(group["step"].iloc[-1] for group in series)
    steps = np.array(sorted({step for step in runs["step"] if first <= step <= last} or {last}), dtype=float)
    return steps, np.array([np.interp(steps, group["step"], group["dice"]) for group in series])


def few_shot(study: Study, model: str) -> str | None:
    """Test Dice by the fraction of the training cases, with 95 % intervals over patients, a panel for each task."""
    rows = study.few_shot[study.few_shot["model"] == model]
    tasks = [
        task
        for task in dict.fromkeys(rows["task"])
        if rows.loc[rows["task"] == task, "fraction"].nunique() > 1
    ]
    if not tasks:
        return None
    figure, panels = _panels(len(tasks))
    arms = [arm for arm in study.arm_names if arm in set(rows["arm"])]
    for axes, task in zip(panels, tasks, strict=True):
        fractions = sorted(set(rows.loc[rows["task"] == task, "fraction"]))
        for place, arm in enumerate(arms):
            values = rows[(rows["task"] == task) & (rows["arm"] == arm)].sort_values("fraction")
            # Beside each other, so that intervals do not hide one another.
            shift = (place - (len(arms) - 1) / 2) * 0.4 / max(len(arms), 4)
            spots = np.array([fractions.index(value) for value in values["fraction"]]) + shift
            errors = [
                (values["mean"] - values["low"]).clip(lower=0).fillna(0),
                (values["high"] - values["mean"]).clip(lower=0).fillna(0),
            ]
            axes.errorbar(spots, values["mean"], yerr=errors, elinewidth=1, capsize=2, **look(study, arm))
        axes.set(title=task[:40], xticks=range(len(fractions)), xlabel="training cases")
        axes.set_xticklabels([percent(fraction) for fraction in fractions])
    panels[0].set_ylabel("test Dice")
    _legend(figure, panels)
    return png(figure)


def rank_diagram(study: Study) -> str | None:
    """Mean ranks on a line; arms under one bar are closer than the critical difference."""
    ranks, width = study.ranks, study.critical_difference
    if ranks is None or width is None or pd.isna(width) or len(ranks) < 2:
        return None
    ranks = ranks.sort_values("rank", kind="stable")
    names, values = list(ranks["arm"]), ranks["rank"].to_numpy(dtype=float)
    bars = cliques(list(values), width)
    half = (len(names) + 1) // 2
    depth = 0.35 * len(bars) + 0.4
    figure = Figure(figsize=(9, 1.3 + 0.3 * (len(bars) + half)), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    low, high = 1, max(len(names), int(np.ceil(values[-1])))
    axes.hlines(0, low, high, color="black")
    for tick in range(low, high + 1):
        axes.vlines(tick, 0, 0.12, color="black")
        axes.text(tick, 0.18, str(tick), ha="center", va="bottom")
    axes.plot([low, low + width], [1.0, 1.0], color="black", marker="|")
    axes.text(low + width / 2, 1.08, f"critical difference {width:.2f}", ha="center", va="bottom")
    for number, (start, stop) in enumerate(bars, start=1):
        axes.hlines(-0.35 * number, values[start] - 0.04, values[stop] + 0.04, color="black", linewidth=4)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        left = place < half
        row = place if left else len(names) - 1 - place
        height, edge = -depth - 0.4 * row, low - 0.15 if left else high + 0.15
        axes.plot([value, value, edge], [0, height, height], color="black", linewidth=0.8)
        text = f"{name[:30]} {value:.2f}"
        axes.text(
            edge, height, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center"
        )
    margin = 0.3 * (high - low)
    axes.set(xlim=(low - margin, high + margin), ylim=(-depth - 0.4 * half, 1.5))
    return png(figure)


def cliques(values: list[float], width: float) -> list[tuple[int, int]]:
    """First and last place of each longest run of sorted ranks that lie within `width`.

    >>> cliques([1.0, 1.5, 2.2, 4.0], 0.8)
    [(0, 1), (1, 2)]
    """
    found: list[tuple[int, int]] = []
    for start, value in enumerate(values):
        stop = max(place for place, other in enumerate(values) if other - value <= width)
        if stop > start and (not found or stop > found[-1][1]):
            found.append((start, stop))
    return found


def _panels(number: int) -> tuple[Figure, list[Any]]:
    """Up to three panels in a row, with one scale of Dice."""
    columns = min(3, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(max(5.0, _PANEL[0] * columns), _PANEL[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[number:]:
        axes.axis("off")
    for axes in grid[:number]:
        axes.grid(color="#dde2e8", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(grid[:number])


def _legend(figure: Figure, panels: list[Any]) -> None:
    """Name the arms below the panels, in as many columns as fit; the figure grows by the rows."""
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    # What is too wide is cut off. A letter of 10 points takes 0.09 inches, a line with the gaps around it 0.7.
    columns = max(1, min(4, int(figure.get_figwidth() / (0.09 * max(map(len, handles)) + 0.7))))
    rows = -(-len(handles) // columns)
    # A legend takes its height from the panels.
    figure.set_figheight(figure.get_figheight() + 0.28 + 0.22 * rows)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
