"""A scan in memory: an array, the matrix that places it in the patient, and nothing else.

Orientation changes only permute and mirror axes, so going to RAS and back is exact.
"""

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from medvisionllama.types import AffineMatrix, SpacingMm, Triple

RAS = axcodes2ornt(("R", "A", "S"))
# Cosine of the angle between two axes of a grid; 0.01 is about half a degree.
_SHEAR = 0.01


@dataclass(frozen=True)
class Volume:
    """An image `[channel, x, y, z]` or a label `[x, y, z]`, and its voxel-to-patient matrix in millimetres."""

    array: np.ndarray
    affine: AffineMatrix

    @property
    def shape(self) -> Triple:
        """Spatial shape."""
        x, y, z = self.array.shape[-3:]
        return (x, y, z)

    @property
    def spacing_mm(self) -> SpacingMm:
        """Edge lengths of a voxel along the array's axes."""
        return spacing_of(self.affine)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return voxel_ml(self.affine)


def spacing_of(affine: AffineMatrix) -> SpacingMm:
    """Edge lengths of a voxel, in millimetres."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).tolist()
    return (x, y, z)


def voxel_ml(affine: AffineMatrix) -> float:
    """Volume of a voxel in millilitres, of one whose edges are not at right angles too."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def shear_fault(affine: AffineMatrix) -> str:
    """Say by how much a grid's axes miss the right angle, and what to do; "" where they do not."""
    axes = affine[:3, :3] / np.array(spacing_of(affine))
    cosines = np.abs(axes.T @ axes)
    shear = max(cosines[0, 1], cosines[0, 2], cosines[1, 2])
    if shear <= _SHEAR:
        return ""
    degrees = 90 - np.degrees(np.arccos(shear))
    return f"its axes are {degrees:.1f} degrees off a right angle (gantry tilt?); resample it to a grid with right angles"


def same_place(affine: AffineMatrix, other: AffineMatrix, shape: Triple) -> bool:
    """True if two matrices place every voxel of a grid alike, to a tenth of a voxel."""
    return distance_at_corners(affine, other, shape) <= 0.1 * min(spacing_of(affine))


def distance_at_corners(affine: AffineMatrix, other: AffineMatrix, shape: Triple) -> float:
    """How far two matrices place the corner of a grid apart for which they differ most, in millimetres."""
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in shape), [1.0], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm((affine - other)[:3] @ corners, axis=0).max())


def to_ras(volume: Volume) -> Volume:
    """Permute and mirror the axes so that they run right, anterior, superior, as nearly as axes can."""
    transform = ornt_transform(io_orientation(volume.affine), RAS)
    affine = volume.affine @ inv_ornt_aff(transform, volume.shape)
    return Volume(_apply(volume.array, transform), affine)


def ras_grid(shape: Triple, affine: AffineMatrix) -> tuple[Triple, AffineMatrix]:
    """Shape and affine that `to_ras` gives a volume, without its voxels."""
    transform = ornt_transform(io_orientation(affine), RAS)
    order = np.argsort(transform[:, 0])
    x, y, z = (shape[axis] for axis in order)
    return (x, y, z), affine @ inv_ornt_aff(transform, shape)


def from_ras(array: np.ndarray, affine: AffineMatrix) -> np.ndarray:
    """Undo `to_ras`: bring `[..., x, y, z]` in RAS back to the axes of an image with this `affine`."""
    return _apply(array, ornt_transform(RAS, io_orientation(affine)))


def _apply(array: np.ndarray, transform: np.ndarray) -> np.ndarray:
    # nibabel turns the leading axes and leaves trailing ones alone; channels come first here, so move them.
    if array.ndim == 3:
        return _contiguous(apply_orientation(array, transform))
    turned = apply_orientation(np.moveaxis(array, 0, -1), transform)
    return _contiguous(np.moveaxis(turned, -1, 0))


def _contiguous(array: np.ndarray) -> np.ndarray:
    contiguous = np.ascontiguousarray(array)
    # A mirrored axis of length one passes for contiguous with its negative stride, which PyTorch refuses.
    return contiguous if min(contiguous.strides) >= 0 else contiguous.copy()
