"""Measures of one predicted mask against one true mask.

Surfaces are edge voxels, as MONAI's are by default, and their measures equal its; of a single slice they are the
edge of an area, as MONAI's are where it is given as an image. Empty masks follow one rule: both
empty is perfect (Dice 1, NSD 1, HD95 0); one empty is as wrong as can be (Dice 0, NSD 0, HD95 the diagonal of the
scan). They are counted, so that nobody averages over them unknowing. On a sheared grid distances are those of the
patient, which edge lengths alone do not tell.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvisionllama.types import MaskArray, SpacingMm

Axes = NDArray[np.float64]
"""What a step of each index is in mm, a column each `[3, 3]`; only of grids whose axes miss the right angle."""


@dataclass(frozen=True)
class Measures:
    """One case and class."""

    dice: float
    iou: float
    precision: float
    recall: float
    nsd: float
    """Share of both surfaces within `tolerance_mm` of the other."""
    hd95_mm: float
    """95th percentile of the distance between surfaces; the larger direction."""
    volume_ml: float
    predicted_ml: float
    empty: str
    """`both`, `truth`, `prediction` or nothing: which masks are empty."""


def dice(predicted: MaskArray, truth: MaskArray) -> float:
    """Overlap 2|A∩B| / (|A|+|B|); 1 if both are empty."""
    total = int(predicted.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2 * int((predicted & truth).sum()) / total


def measure(
    predicted: MaskArray,
    truth: MaskArray,
    spacing_mm: SpacingMm,
    *,
    tolerance_mm: float,
    voxel_ml: float | None = None,
    axes: Axes | None = None,
) -> Measures:
    """Compare two masks `[x, y, z]` on one grid.

    Args:
        voxel_ml: volume of a voxel whose edges are not at right angles; by default the product of the edges.
        axes: of a sheared grid.
    """
    overlap, a, b = int((predicted & truth).sum()), int(predicted.sum()), int(truth.sum())
    voxel_ml = math.prod(spacing_mm) / 1000 if voxel_ml is None else voxel_ml
    nsd, hd95 = _surface(predicted, truth, spacing_mm, axes, tolerance_mm)
    return Measures(
        dice=dice(predicted, truth),
        iou=_ratio(overlap, a + b - overlap, empty=1.0),
        precision=_ratio(overlap, a, empty=1.0 if b == 0 else 0.0),
        recall=_ratio(overlap, b, empty=1.0 if a == 0 else 0.0),
        nsd=nsd,
        hd95_mm=hd95,
        volume_ml=b * voxel_ml,
        predicted_ml=a * voxel_ml,
        empty={(True, True): "both", (False, True): "truth", (True, False): "prediction"}.get(
            (a == 0, b == 0), ""
        ),
    )


def _ratio(part: int, whole: int, *, empty: float) -> float:
    return part / whole if whole else empty


def _surface(
    predicted: MaskArray, truth: MaskArray, spacing_mm: SpacingMm, axes: Axes | None, tolerance_mm: float
) -> tuple[float, float]:
    from scipy.ndimage import find_objects

    if not predicted.any() or not truth.any():
        if not predicted.any() and not truth.any():
            return 1.0, 0.0
        return 0.0, _diagonal(truth.shape, spacing_mm, axes)
    (box,) = find_objects((predicted | truth).view(np.uint8))
    neighbours = _neighbours(truth.shape)
    a, b = (_edge_points(mask[box], neighbours, spacing_mm, axes) for mask in (predicted, truth))
    there, back = _distances(a, b), _distances(b, a)
    # In single precision a distance of exactly the tolerance counts, however its root was rounded.
    within = sum(int((distances <= np.float32(tolerance_mm)).sum()) for distances in (there, back))
    hd95 = max(float(np.percentile(distances, 95)) for distances in (there, back))
    return within / (len(there) + len(back)), hd95


def _diagonal(shape: tuple[int, ...], spacing_mm: SpacingMm, axes: Axes | None) -> float:
    """The longest way through a scan, in mm."""
    if axes is None:
        return float(np.linalg.norm(np.multiply(shape, spacing_mm)))
    # The four diagonals of a slanted box differ.
    ways = np.multiply(shape, [[1, 1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]]) @ axes.T
    return float(np.linalg.norm(ways, axis=1).max())


def _neighbours(shape: tuple[int, ...]) -> MaskArray:
    """A voxel and those it touches by a face, `[3, 3, 3]`; along an axis of one voxel there are none."""
    from scipy.ndimage import generate_binary_structure

    neighbours: MaskArray = generate_binary_structure(len(shape), 1)
    for axis, size in enumerate(shape):
        if size == 1:
            np.moveaxis(neighbours, axis, 0)[[0, 2]] = False
    return neighbours


def _edge_points(
    mask: MaskArray, neighbours: MaskArray, spacing_mm: SpacingMm, axes: Axes | None
) -> NDArray[np.float64]:
    """Centres `[n, 3]` in mm of the voxels that touch one outside the mask, or the end of the scan."""
    from scipy.ndimage import binary_erosion

    edge = mask & ~binary_erosion(mask, neighbours)
    points = np.argwhere(edge).astype(np.float64)
    return points * np.asarray(spacing_mm) if axes is None else points @ axes.T


def _distances(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float32]:
    """From each point to the nearest of the others."""
    from scipy.spatial import KDTree

    return np.asarray(KDTree(others).query(points)[0], dtype=np.float32)
