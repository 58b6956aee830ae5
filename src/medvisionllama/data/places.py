"""Where labels lie in their scans, in millimetres from the middle: what tells an organ from its like elsewhere."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from medvisionllama.types import SpacingMm, Triple

if TYPE_CHECKING:
    # The cache needs the plan, of which places are a part.
    from medvisionllama.data.cache import CachedCase

_SPREAD = 2.0
"""Deviations from the mean place at which a voxel counts half; with 1.5 trials chose the same components, with 3
worse ones (docs/decisions/0028)."""
_Moments = tuple[np.ndarray, np.ndarray]
"""Mean and mean square of positions."""


class Place(BaseModel):
    """Where labelled voxels lie: mean and deviation of their distances from the scan's middle, along RAS axes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_mm: SpacingMm
    std_mm: SpacingMm

    def distances(self, shape: Triple, spacing_mm: SpacingMm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squared distances from here along each axis of a scan in RAS; 1 is where a voxel counts half."""
        x, y, z = (
            ((_offsets(size) * edge - mean) / (_SPREAD * std)) ** 2
            for size, edge, mean, std in zip(shape, spacing_mm, self.mean_mm, self.std_mm, strict=True)
        )
        return x, y, z


class Places(BaseModel):
    """Places of all classes together, and of each by the value that a mask stores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    foreground: Place
    classes: dict[int, Place]


def fit_places(cases: Sequence["CachedCase"], *, merged: bool) -> Places | None:
    """Measure where the labels of the cases that train lie, each scan counted once; None if all labels are empty.

    Args:
        merged: masks have all classes as one.
    """
    found: dict[int, list[_Moments]] = defaultdict(list)
    together: list[_Moments] = []
    for case in cases:
        moments = _moments(case)
        if moments:
            voxels = [case.facts["class_voxels"][str(value)] for value in moments]
            together.append(_mean(list(moments.values()), voxels))
        for value, pair in moments.items():
            found[value].append(pair)
    if not together:
        return None
    foreground = _place(together)
    return Places(
        foreground=foreground,
        classes={1: foreground}
        if merged
        else {value: _place(pairs) for value, pairs in sorted(found.items())},
    )


def _moments(case: "CachedCase") -> dict[int, _Moments]:
    """Of each class in a case."""
    shape, rows = np.array(case.label.shape), np.asarray(case.centres)
    edges = np.multiply(case.native_label.shape, case.native_spacing_mm) / shape
    positions = (rows[:, 1:] - (shape - 1) / 2) * edges
    result = {}
    for value in np.unique(rows[:, 0]):
        own = positions[rows[:, 0] == value]
        # A voxel is no point: without its own width a class of one slice would have no deviation.
        result[int(value)] = (own.mean(axis=0), (own**2).mean(axis=0) + edges**2 / 12)
    return result


def _mean(pairs: Sequence[_Moments], weights: Sequence[float] | None = None) -> _Moments:
    first, second = (np.average([pair[index] for pair in pairs], axis=0, weights=weights) for index in (0, 1))
    return first, second


def _place(pairs: Sequence[_Moments]) -> Place:
    first, second = _mean(pairs)
    return Place(mean_mm=_rounded(first), std_mm=_rounded(np.sqrt(second - first**2)))


def _rounded(values: np.ndarray) -> SpacingMm:
    x, y, z = (float(f"{value:.4g}") for value in values)
    return x, y, z


def _offsets(size: int) -> np.ndarray:
    """Voxels of an axis, counted from its middle."""
    return np.arange(size) - (size - 1) / 2
