"""Change of voxel grid, for images and for labels.

Both align the outer faces of the first and last voxels (`align_corners=False`), so image, label and the
prediction on its way back move together.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from medvisionllama.types import ImageArray, LabelArray, SpacingMm, Triple


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

    Classes are visited one at a time: memory holds two grids, however many classes there are.
    """
    if label.shape == tuple(shape):
        return label
    values: Sequence[int] = np.unique(label).tolist()
    best = torch.full(tuple(shape), -1.0)
    result = torch.zeros(tuple(shape), dtype=torch.int32)
    for value in values:
        mask = torch.from_numpy((label == value).astype(np.float32))[None, None]
        share = F.interpolate(mask, size=tuple(shape), mode="trilinear", align_corners=False)[0, 0]
        stronger = share > best
        result[stronger] = value
        best = torch.where(stronger, share, best)
    return result.numpy().astype(label.dtype)
