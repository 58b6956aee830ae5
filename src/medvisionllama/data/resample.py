"""Change of voxel grid, for images and for labels.

Both align the outer faces of the first and last voxels (`align_corners=False`), so image, label and the
prediction on its way back move together.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from medvisionllama.types import ImageArray, LabelArray, SpacingMm, Triple

_SLAB_VOXELS = 1 << 19


def shape_at(shape: Triple, spacing_mm: SpacingMm, target_mm: SpacingMm) -> Triple:
    """Shape that covers the same extent at another spacing, at least one voxel an axis."""
    x, y, z = (
        max(1, round(size * old / new)) for size, old, new in zip(shape, spacing_mm, target_mm, strict=True)
    )
    return (x, y, z)


def resample_image(image: ImageArray, shape: Triple) -> ImageArray:
    """Interpolate `[channel, x, y, z]` linearly to another shape."""
    if image.shape[1:] == tuple(shape):
        return image
    tensor = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]
    return F.interpolate(tensor, size=tuple(shape), mode="trilinear", align_corners=False)[0].numpy()


def resample_label(label: LabelArray, shape: Triple) -> LabelArray:
    """Interpolate each class by itself and keep the strongest, so no class appears between two others.

    Of equal shares, as halving a grid has them along every border, voxels in turn go to the smaller and to the
    larger value: always to the smaller, each organ would lose half a voxel of the old grid all around.

    Only voxels whose eight neighbours differ are computed, and only for the neighbours' classes, slab by slab:
    neither time nor memory grows with the number of classes.
    """
    if label.shape == tuple(shape):
        return label
    x, y, z = (_Axis.between(old, new) for old, new in zip(label.shape, shape, strict=True))
    result = np.empty(shape, dtype=label.dtype)
    step = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        result[start : start + step] = _label_slab(label, x[start : start + step], y, z, start)
    return result


@dataclass(frozen=True)
class _Axis:
    """For each voxel of the new grid along one axis: its two neighbours in the old one, and their weights."""

    low: np.ndarray
    high: np.ndarray
    low_weight: np.ndarray
    high_weight: np.ndarray

    @classmethod
    def between(cls, old: int, new: int) -> Self:
        # As torch computes it for images, to the last bit: float32, with products that are not rounded before the
        # sum (fused multiply and add). An image and its label must agree on where the middle is.
        scale = np.float64(np.float32(old) / np.float32(new))
        centre = np.arange(new, dtype=np.float64) + 0.5
        place = (scale * centre - 0.5).astype(np.float32).clip(min=0)
        low = place.astype(np.int64)
        high_weight = place - low.astype(np.float32)
        return cls(low, np.minimum(low + 1, old - 1), np.float32(1) - high_weight, high_weight)

    def __getitem__(self, part: slice | np.ndarray) -> Self:
        return type(self)(self.low[part], self.high[part], self.low_weight[part], self.high_weight[part])

    def __len__(self) -> int:
        return len(self.low)

    def mix(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Weighted mean of the values at the two neighbours."""
        return (first.astype(np.float64) * self.low_weight + second * self.high_weight).astype(np.float32)


def _label_slab(label: LabelArray, x: _Axis, y: _Axis, z: _Axis, start: int) -> LabelArray:
    """The part of the new grid from `start` on along x."""
    shape = (len(x), len(y), len(z))
    corners = [
        label[along_x][:, along_y][:, :, along_z].ravel()
        for along_x in (x.low, x.high)
        for along_y in (y.low, y.high)
        for along_z in (z.low, z.high)
    ]
    result = corners[0].copy()
    mixed = np.zeros(len(result), dtype=bool)
    for corner in corners[1:]:
        mixed |= corner != result
    places = np.flatnonzero(mixed)
    at_x, at_y, at_z = np.unravel_index(places, shape)
    to_smaller = (start + at_x + at_y + at_z) % 2 == 0
    x, y, z = x[at_x], y[at_y], z[at_z]
    corners = [corner[places] for corner in corners]
    best = np.full(len(places), -1, dtype=np.float32)
    winner = np.zeros(len(places), dtype=label.dtype)
    for value in corners:
        found = [(corner == value).astype(np.float32) for corner in corners]
        rows = [z.mix(*found[first : first + 2]) for first in (0, 2, 4, 6)]
        share = x.mix(y.mix(*rows[:2]), y.mix(*rows[2:]))
        wins_tie = np.where(to_smaller, value < winner, value > winner)
        better = (share > best) | ((share == best) & wins_tie)
        best[better], winner[better] = share[better], value[better]
    result[places] = winner
    return result.reshape(shape)
