"""The rules behind a plan's grid: each takes sizes and spacings, and returns what follows from them.

Where they come from, and where they leave nnU-Net's: docs/decisions/0013-planning-rules.md.
"""

import math
from collections.abc import Sequence

import numpy as np

from medvisionllama.types import SpacingMm, Triple

Strides = tuple[Triple, Triple, Triple]
# An axis is halved only while its voxels are not much longer than the finest axis's: nnU-Net's rule (Isensee et
# al. 2021, Nature Methods, supplementary note on architecture), which keeps 10 mm slices apart.
_COARSER = 2.0
# nnU-Net's: an axis is thick if its voxels are three times as long, and its voxels three times as few.
_THICK = 3.0
# A planned crop shows at least this share of the median scan: half of it along each axis.
_SEEN = 1 / 8
# And this of one with thick slices, which has only two axes to be cut along. With less, a network that few hearts
# have taught takes bright tissue elsewhere for them.
_SEEN_THICK = 0.4
# Fewer voxels than this along an axis, after halving, are no axis to look along.
_FEWEST = 2


def thick_axis(spacing_mm: SpacingMm, shape: Sequence[float]) -> int | None:
    """The axis along which slices are thick and few, if there is one.

    >>> thick_axis((0.62, 0.62, 3.6), (320, 320, 20)), thick_axis((1.0, 1.0, 1.0), (240, 240, 155))
    (2, None)
    """
    worst = int(np.argmax(spacing_mm))
    others = [axis for axis in range(3) if axis != worst]
    longer = spacing_mm[worst] > _THICK * max(spacing_mm[axis] for axis in others)
    fewer = _THICK * shape[worst] < min(shape[axis] for axis in others)
    return worst if longer and fewer else None


def round_mm(length_mm: float) -> float:
    """Round to a tenth of a micron, but keep four digits of what is shorter: microscopes have voxels of nanometres.

    >>> round_mm(1.23456), round_mm(0.0000080001)
    (1.2346, 8e-06)
    """
    return round(length_mm, _places(length_mm, digits=4, at_least=4))


def median_or_thinner(spacings_mm: Sequence[SpacingMm], axis: int | None, percentile: float) -> SpacingMm:
    """Median spacing; a thick axis takes a percentile instead, but stays the longest."""
    median = [round_mm(float(value)) for value in np.median(spacings_mm, axis=0)]
    if axis is not None:
        wanted = round_mm(float(np.percentile([spacing[axis] for spacing in spacings_mm], percentile)))
        median[axis] = max(wanted, *(median[other] for other in range(3) if other != axis))
    x, y, z = median
    return (x, y, z)


def seen_share(axis: int | None) -> float:
    """Share of the median scan that a crop should show.

    Args:
        axis: the thick one, or None.
    """
    return _SEEN if axis is None else _SEEN_THICK


def raise_spacing(
    spacing_mm: SpacingMm, extent_mm: SpacingMm, max_voxels: int, coarsest_mm: float, *, share: float
) -> SpacingMm:
    """Make the finest axes coarser together, until a crop of `max_voxels` shows a share of the scan.

    No axis becomes coarser than `coarsest_mm`; one that is already stays as it is.

    >>> raise_spacing((0.8, 0.8, 2.5), (400.0, 400.0, 235.0), 131_072, 2.0, share=1 / 8)
    (2.0, 2.0, 2.5)
    """
    voxel_mm3 = math.prod(extent_mm) * share / max_voxels
    if math.prod(spacing_mm) >= voxel_mm3:
        return spacing_mm
    order = sorted(spacing_mm)
    level = 0.0
    for count in (1, 2, 3):
        level = (voxel_mm3 / math.prod(order[count:])) ** (1 / count)
        if count == 3 or level <= order[count]:
            break
    steps_per_mm = 10 ** _places(level, digits=2, at_least=2)
    level = min(math.ceil(level * steps_per_mm) / steps_per_mm, coarsest_mm)
    x, y, z = (max(edge, level) for edge in spacing_mm)
    return (x, y, z)


def plan_strides(spacing_mm: SpacingMm, shape: Sequence[float] = (math.inf,) * 3) -> Strides:
    """Halve each axis at each of three stages, but leave an axis alone while its voxels are much coarser.

    Args:
        shape: voxels of the median scan; an axis of few voxels is halved less, one of a single slice never.

    >>> plan_strides((1.5, 1.5, 10.0))
    ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    """
    stages = []
    current, left = list(spacing_mm), list(shape)
    for _ in range(3):
        # A flat axis has no say in what is fine: its voxels are as long as somebody wrote into the header.
        finest = min((edge for edge, size in zip(current, shape, strict=True) if size > 1), default=0.0)
        x, y, z = (
            2 if edge < _COARSER * finest and size >= 2 * _FEWEST else 1
            for edge, size in zip(current, left, strict=True)
        )
        stages.append((x, y, z))
        current = [edge * step for edge, step in zip(current, stages[-1], strict=True)]
        left = [size / step for size, step in zip(left, stages[-1], strict=True)]
    return (stages[0], stages[1], stages[2])


def total_stride(strides: Strides) -> Triple:
    """Voxels per token along each axis."""
    x, y, z = (math.prod(stage[axis] for stage in strides) for axis in range(3))
    return (x, y, z)


def plan_crop(extent_mm: SpacingMm, spacing_mm: SpacingMm, unit: Triple, max_voxels: int) -> Triple:
    """Cover the median scan, then shorten the physically longest axis until the crop fits the budget."""
    crop = [
        max(1, math.ceil(extent / size / step - 0.05)) * step
        for extent, size, step in zip(extent_mm, spacing_mm, unit, strict=True)
    ]
    while math.prod(crop) > max_voxels:
        lengths = [
            size * edge if size > step else 0.0
            for size, edge, step in zip(crop, spacing_mm, unit, strict=True)
        ]
        longest = lengths.index(max(lengths))
        if lengths[longest] == 0.0:
            break
        crop[longest] -= unit[longest]
    x, y, z = crop
    return (x, y, z)


def _places(length_mm: float, *, digits: int, at_least: int) -> int:
    """Decimal places that keep so many digits of a length."""
    return max(at_least, digits - 1 - math.floor(math.log10(length_mm)))
