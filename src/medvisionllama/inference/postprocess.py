"""Cleaning of masks: islands too small, or too far from where labels lie, to be meant."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medvisionllama.data.places import Place, Places
from medvisionllama.data.volume import Volume, from_ras, to_ras
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.types import LabelArray, MaskArray, SpacingMm

_TOUCHING = np.ones((3, 3, 3), dtype=bool)


def clean(mask: Volume, cleaning: Cleaning, places: Places | None = None) -> Volume:
    """Return a mask in any orientation without the components that `cleaning` removes.

    Args:
        places: of the run's labels, as for `remove_islands`.
    """
    if not cleaning.removes:
        return mask
    ras = to_ras(mask)
    array = remove_islands(
        ras.array,
        ras.spacing_mm,
        largest_foreground=cleaning.largest_foreground,
        largest_only=cleaning.largest_component,
        min_ml=cleaning.min_component_ml,
        voxel_ml=ras.voxel_ml,
        places=places,
    )
    return Volume(from_ras(array, mask.affine), mask.affine)


def remove_islands(
    mask: LabelArray,
    spacing_mm: SpacingMm,
    *,
    largest_foreground: bool = False,
    largest_only: bool = False,
    min_ml: float = 0.0,
    voxel_ml: float | None = None,
    places: Places | None = None,
) -> LabelArray:
    """Return a mask `[x, y, z]` without the components of a class that are too small; they become background.

    Voxels are connected by faces, edges and corners. With `places`, the largest component is that of most voxels
    when each counts 1 / (1 + d²), where d is its distance from the mean place of labels in twice their deviation.
    So of two of a size the one where labels lie is kept, and a speck there is none beside an organ elsewhere, as in
    a scan that shows more of the body than those of training.

    Args:
        largest_foreground: keep the largest component of all classes together; done first.
        largest_only: of each class, keep the largest component alone.
        min_ml: smallest volume of a component that stays, in millilitres.
        voxel_ml: volume of a voxel whose edges are not at right angles; by default the product of the edges.
        places: where training labels lie; the mask's axes must be those of RAS then.
    """
    if largest_foreground and mask.any():
        mask = _keep_main(mask, spacing_mm, places)
    if not largest_only and min_ml <= 0:
        return mask
    # A little less, so that rounding does not remove a component of just this volume.
    smallest = min_ml / (math.prod(spacing_mm) / 1000 if voxel_ml is None else voxel_ml) * (1 - 1e-6)
    result = mask.copy()
    for value, box in _boxes(mask):
        components, sizes = _components(mask[box] == value)
        keep = sizes >= smallest
        if largest_only:
            place = places.classes.get(value) if places else None
            weights = _weighed(components, sizes, place, spacing_mm, mask.shape, box)
            # The largest by place may be too small to stay: then it is the largest of those that are not.
            keep &= np.arange(len(sizes)) == np.where(keep, weights, -1).argmax()
        # Component 0 is everything else, which must not change.
        result[box][~np.concatenate([[True], keep])[components]] = 0
    return result


def component_volumes_ml(mask: LabelArray, voxel_ml: float) -> dict[int, list[float]]:
    """Volumes of the components of each class that a mask `[x, y, z]` has, in millilitres, largest first."""
    volumes = {}
    for value, box in _boxes(mask):
        _, sizes = _components(mask[box] == value)
        volumes[value] = sorted((sizes * voxel_ml).tolist(), reverse=True)
    return volumes


def _keep_main(mask: LabelArray, spacing_mm: SpacingMm, places: Places | None) -> LabelArray:
    """Return a mask of its largest component, of all classes together, alone."""
    inside = mask > 0
    (_, box), *_ = _boxes(inside.view(np.uint8))
    components, sizes = _components(inside[box])
    place = places.foreground if places else None
    weights = _weighed(components, sizes, place, spacing_mm, mask.shape, box)
    result = np.zeros_like(mask)
    result[box] = np.where(components == 1 + weights.argmax(), mask[box], 0)
    return result


def _components(inside: MaskArray) -> tuple[np.ndarray, np.ndarray]:
    """Components `[x, y, z]` numbered from 1, and the voxels of each."""
    components, number = ndimage.label(inside, structure=_TOUCHING)
    return components, np.bincount(components.ravel(), minlength=number + 1)[1:]


def _weighed(
    components: np.ndarray,
    sizes: np.ndarray,
    place: Place | None,
    spacing_mm: SpacingMm,
    shape: Sequence[int],
    box: tuple[slice, ...],
) -> np.ndarray:
    """Sizes of components numbered from 1, each voxel counted by how near it lies to a place, if one is known.

    Args:
        shape: of the whole mask, in which the components' array is a `box`.
    """
    if place is None or len(sizes) == 1:
        return sizes
    distances = place.distances((shape[0], shape[1], shape[2]), spacing_mm)
    x, y, z = (squared[part] for squared, part in zip(distances, box, strict=True))
    weighed = np.zeros(len(sizes) + 1)
    # Plane by plane: the weights of a whole CT would take gigabytes.
    for plane, squared in zip(components, x, strict=True):
        weights = 1 / (1 + squared + y[:, None] + z)
        weighed += np.bincount(plane.ravel(), weights=weights.ravel(), minlength=len(weighed))
    return weighed[1:]


def _boxes(mask: LabelArray) -> Sequence[tuple[int, tuple[slice, ...]]]:
    found = ndimage.find_objects(mask)
    return [(value, box) for value, box in enumerate(found, start=1) if box is not None]
