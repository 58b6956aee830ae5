"""Cleaning of masks: islands too small to be meant."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medvisionllama.config import InferenceConfig
from medvisionllama.data.volume import Volume
from medvisionllama.types import LabelArray, SpacingMm

_TOUCHING = np.ones((3, 3, 3), dtype=bool)


def clean(mask: Volume, settings: InferenceConfig) -> Volume:
    """Remove the components that a run's settings do not want."""
    array = remove_islands(
        mask.array,
        mask.spacing_mm,
        largest_foreground=settings.largest_foreground,
        largest_only=settings.largest_component,
        min_ml=settings.min_component_ml,
    )
    return Volume(array, mask.affine)


def remove_islands(
    mask: LabelArray,
    spacing_mm: SpacingMm,
    *,
    largest_foreground: bool = False,
    largest_only: bool = False,
    min_ml: float = 0.0,
) -> LabelArray:
    """Return a mask `[x, y, z]` without the components of a class that are too small; they become background.

    Voxels are connected by faces, edges and corners.

    Args:
        largest_foreground: keep the largest component of all classes together; done first.
        largest_only: of each class, keep the largest component alone.
        min_ml: smallest volume of a component that stays, in millilitres.
    """
    if largest_foreground and mask.any():
        components, _ = ndimage.label(mask > 0, structure=_TOUCHING)
        sizes = np.bincount(components.ravel())
        mask = np.where(components == 1 + sizes[1:].argmax(), mask, 0)
    if not largest_only and min_ml <= 0:
        return mask
    # A little less, so that rounding does not remove a component of just this volume.
    smallest = min_ml * 1000 / float(np.prod(spacing_mm)) * (1 - 1e-6)
    result = mask.copy()
    for value, box in _boxes(mask):
        components, number = ndimage.label(mask[box] == value, structure=_TOUCHING)
        sizes = np.bincount(components.ravel(), minlength=number + 1)[1:]
        keep = sizes >= smallest
        if largest_only:
            keep &= np.arange(number) == sizes.argmax()
        # Component 0 is everything else, which must not change.
        result[box][~np.concatenate([[True], keep])[components]] = 0
    return result


def component_volumes_ml(mask: LabelArray, spacing_mm: SpacingMm) -> dict[int, list[float]]:
    """Volumes of the components of each class that a mask `[x, y, z]` has, in millilitres, largest first."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volumes = {}
    for value, box in _boxes(mask):
        components, number = ndimage.label(mask[box] == value, structure=_TOUCHING)
        sizes = np.bincount(components.ravel(), minlength=number + 1)[1:]
        volumes[value] = sorted((sizes * voxel_ml).tolist(), reverse=True)
    return volumes


def _boxes(mask: LabelArray) -> Sequence[tuple[int, tuple[slice, ...]]]:
    found = ndimage.find_objects(mask)
    return [(value, box) for value, box in enumerate(found, start=1) if box is not None]
