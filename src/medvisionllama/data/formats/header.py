"""What a file says of itself before its voxels are read, checked the same way for every format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvisionllama.data.volume import Volume, same_place, spacing_of
from medvisionllama.errors import DataError
from medvisionllama.types import AffineMatrix, SpacingMm, Triple


@dataclass(frozen=True)
class Header:
    """Shape and place of a scan; `affine` leads from voxels to RAS millimetres."""

    shape: Triple
    num_channels: int
    affine: AffineMatrix

    @property
    def spacing_mm(self) -> SpacingMm:
        return spacing_of(self.affine)


def make_header(path: Path, sizes: Sequence[int], affine: AffineMatrix) -> Header:
    """Check sizes `x, y, z[, channel]`, or `x, y, z, 1, channel` as ITK has them, and affine.

    Raises:
        DataError: not 3-D or 4-D, or an affine that places nothing.
    """
    shape = tuple(int(size) for size in sizes)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:
        # NIfTI's fourth axis is time, so that components of a voxel are the fifth.
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(f"{path} has shape {shape}; allowed: 3-D, or 4-D with channels last")
    edges = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    # Against the volume of a box with these edges: voxels may be of any size, but must not be flat.
    if not np.isfinite(affine).all() or not edges.all() or abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-6:
        raise DataError(
            f"{path}: its affine matrix is not invertible; export the scan again with its geometry"
        )
    x, y, z, *channels = shape
    return Header((x, y, z), channels[0] if channels else 1, affine)


def channel_problem(path: object, grid: Header | Volume, first_path: Any, first: Header | Volume) -> str:
    """Why a channel cannot be stacked on the first, as stored; "" if it can. Paths have a `name`."""
    if grid.shape == first.shape and same_place(first.affine, grid.affine, first.shape):
        return ""
    return f"{path}: its shape or affine differs from {first_path.name}; resample the channels to one grid"


def unreadable(path: Path, error: Exception) -> DataError:
    """The error of a file that its library could not read."""
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(f"{path} is damaged or truncated ({reason}); copy it again from its source")


def why_unreadable(path: object, error: DataError | OSError) -> str:
    """One file that may not be read, or a disk that is gone, must not keep the others from being read."""
    if isinstance(error, OSError):
        return f"{path} cannot be read ({error.strerror or error}); check its permissions and its disk"
    return str(error)


def too_large(what: object) -> DataError:
    """The error of what memory is too small for; damaged headers may declare anything."""
    return DataError(
        f"{what} does not fit into memory; is its header right? Crop it, or use a machine with more"
    )
