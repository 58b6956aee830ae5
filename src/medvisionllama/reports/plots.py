"""Pictures as inline PNG: learning curves, measures by case, and masks over the scan in three planes."""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medvisionllama.colours import colour_of
from medvisionllama.data.volume import Volume
from medvisionllama.types import LabelArray

mpl.use("Agg")
# Names of classes and cases are anybody's: a dollar sign is no formula.
mpl.rcParams["text.parse_math"] = False

_NAMED = 10
_NAMES = ("right", "front", "up")


class Plane(NamedTuple):
    """A cut through a scan in RAS: its normal, and the axes that run across and up in the picture."""

    name: str
    normal: int
    across: int
    up: int

    def cut(self, array: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """The plane of `[x, y, z]` through a voxel."""
        picture: np.ndarray = np.take(array, centre[self.normal], axis=self.normal).T
        return picture


PLANES = (Plane("sagittal", 0, 1, 2), Plane("coronal", 1, 0, 2), Plane("axial", 2, 0, 1))


def curves(history: Sequence[dict[str, Any]]) -> str:
    """Training loss and, if there are validation cases, their Dice over the steps of a run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    names = list(history[0]["dice_per_class"])
    left, *right = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    steps = [record["step"] for record in history]
    left.plot(steps, [record["loss"] for record in history], marker="o", color="#555555")
    left.set(xlabel="step", ylabel="mean training loss")
    for axes in right:
        _draw_dice(axes, steps, history, names)
    return png(figure)


def _draw_dice(
    axes: Axes, steps: Sequence[int], history: Sequence[dict[str, Any]], names: Sequence[str]
) -> None:
    many = len(names) > _NAMED
    for index, name in enumerate(names):
        values = [record["dice_per_class"][name] for record in history]
        # More names than fit would squeeze the axes to nothing; then only the mean of the lines is named.
        label, look = (None, {"linewidth": 0.7}) if many else (name, {"marker": "o"})
        axes.plot(steps, values, label=label, color=colour_of(index), **look)
    if many:
        means = [np.mean(list(record["dice_per_class"].values())) for record in history]
        axes.plot(steps, means, marker="o", color="black", label=f"mean of {len(names)} classes")
    axes.set(xlabel="step", ylabel="validation Dice")
    axes.legend(frameon=False)


def dice_by_case(table: pd.DataFrame) -> str:
    """One dot per case and class, with a bar at the median."""
    names = list(table["class"].unique())
    figure = Figure(figsize=(9, 0.6 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for row, name in enumerate(names):
        values = table.loc[table["class"] == name, "dice"].to_numpy()
        axes.scatter(
            values,
            row + rng.uniform(-0.18, 0.18, len(values)),
            s=18,
            alpha=0.7,
            color=colour_of(row),
            linewidths=0,
        )
        axes.plot([np.median(values)] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2)
    axes.set(
        yticks=range(len(names)),
        yticklabels=names,
        xlabel="Dice of each case (bar: median)",
        ylim=(len(names) - 0.5, -0.5),
    )
    return png(figure)


def overlay(image: Volume, truth: LabelArray, predicted: LabelArray, classes: dict[int, str]) -> str:
    """The three planes that show most of the structure: true outline dashed, predicted outline solid.

    All arrays are in RAS; pixels keep the scan's proportions in millimetres.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    centre = fullest((truth > 0) | (predicted > 0))
    for axes, plane in zip(figure.subplots(1, 3), PLANES, strict=True):
        pixel = draw_scan(axes, image, plane, centre)
        for index, value in enumerate(classes):
            colour = colour_of(index)
            outline(axes, plane.cut(predicted, centre) == value, pixel, colour, "solid")
            outline(axes, plane.cut(truth, centre) == value, pixel, colour, "dashed")
        axes.set_title(plane.name, fontsize=10)
    return png(figure)


def fullest(marked: np.ndarray) -> np.ndarray:
    """For each axis of `[x, y, z]` the plane with most marked voxels; the middle one if none is marked.

    A plane through the middle of two kidneys would show neither.
    """
    if not marked.any():
        return np.array(marked.shape) // 2
    return np.array([np.count_nonzero(marked, axis=others).argmax() for others in ((1, 2), (0, 2), (0, 1))])


def draw_scan(axes: Any, image: Volume, plane: Plane, centre: np.ndarray) -> tuple[float, float]:
    """Draw one plane of a scan in grey, in millimetres; returns the edges of its pixels."""
    background = image.array[0]
    low, high = np.percentile(background, [1, 99.5])
    dx, dy = image.spacing_mm[plane.across], image.spacing_mm[plane.up]
    picture = plane.cut(background, centre)
    axes.imshow(
        picture,
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        origin="lower",
        extent=extent_of(picture, (dx, dy)),
        interpolation="nearest",
    )
    axes.set_xlabel(f"{_NAMES[plane.across]} →", fontsize=8)
    axes.set_ylabel(f"{_NAMES[plane.up]} →", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    return dx, dy


def extent_of(picture: np.ndarray, pixel: tuple[float, float]) -> tuple[float, float, float, float]:
    """Where a picture lies, in millimetres from its lower left corner."""
    return (0, picture.shape[1] * pixel[0], 0, picture.shape[0] * pixel[1])


def outline(axes: Any, mask: np.ndarray, pixel: tuple[float, float], colour: str, style: str) -> None:
    """Draw the border of a mask in a picture of `draw_scan`."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)
    x = (np.arange(padded.shape[1]) - 0.5) * pixel[0]
    y = (np.arange(padded.shape[0]) - 0.5) * pixel[1]
    axes.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=1.6, linestyles=style)


def png(figure: Figure) -> str:
    """A figure as an inline address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
