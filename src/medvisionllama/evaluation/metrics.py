"""Measures of one predicted mask against one true mask.

Surfaces are MONAI's. Empty masks follow one rule: both empty is perfect (Dice 1, NSD 1, HD95 0); one empty is as
wrong as can be (Dice 0, NSD 0, HD95 the diagonal of the scan). They are counted, so that nobody averages over them
unknowing.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from medvisionllama.types import MaskArray, SpacingMm


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
    predicted: MaskArray, truth: MaskArray, spacing_mm: SpacingMm, *, tolerance_mm: float
) -> Measures:
    """Compare two masks `[x, y, z]` on one grid."""
    overlap, a, b = int((predicted & truth).sum()), int(predicted.sum()), int(truth.sum())
    voxel_ml = math.prod(spacing_mm) / 1000
    nsd, hd95 = _surface(predicted, truth, spacing_mm, tolerance_mm)
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
    predicted: MaskArray, truth: MaskArray, spacing_mm: SpacingMm, tolerance_mm: float
) -> tuple[float, float]:
    if not predicted.any() or not truth.any():
        if not predicted.any() and not truth.any():
            return 1.0, 0.0
        return 0.0, float(np.linalg.norm(np.multiply(truth.shape, spacing_mm)))
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    # MONAI 1.6 warns of an argument that it passes itself.
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
    box = _bounding_box(predicted | truth)
    # A rim of background, so that a mask that ends at the box still has its outer surface there.
    a, b = (torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (predicted, truth))
    nsd = compute_surface_dice(a, b, [tolerance_mm], include_background=True, spacing=spacing_mm)
    hd95 = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing_mm)
    return float(nsd), float(hd95)


def _bounding_box(mask: MaskArray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)
