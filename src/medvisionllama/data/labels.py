"""Names of classes; and labels that store only the part of a scan with segments, put onto the scan's own grid."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.itk import is_segmentation
from medvisionllama.data.volume import Volume, same_place, spacing_of, to_ras
from medvisionllama.errors import DataError
from medvisionllama.types import AffineMatrix, Triple

FOREGROUND = "foreground"
"""Name of all classes together, in tables and where they are merged."""
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_TOLERANCE_VOXELS = 0.1
_LARGEST_UNION = 64


def check_no_ignore(labels: Collection[str], where: Path) -> None:
    """Raise DataError if nnU-Net's names of labels hold the one for voxels that count nowhere."""
    if "ignore" in labels:
        raise DataError(
            f"{where}: the label 'ignore' is not supported; give those voxels a class, or leave the cases out"
        )


def check_class_names(classes: Mapping[int, str], where: Path) -> None:
    """Refuse names that tables could not tell apart.

    Args:
        classes: names by label value, without the background.
        where: what declares them.

    Raises:
        DataError: two classes of one name, one of several has the name of all together, or a name that a program
            of tables would run as a formula or a terminal would obey.
    """
    values: dict[str, int] = {}
    for value, name in classes.items():
        if name in values:
            raise DataError(
                f"{where}: the values {values[name]} and {value} are both called {name!r}; rename one"
            )
        values[name] = value
        if name.startswith(("=", "+", "-", "@")) or _CONTROLS.search(name):
            raise DataError(
                f"{where}: the class {name!r} begins as a formula does in a table, or holds signs that control a terminal; rename it"
            )
    if FOREGROUND in values and len(values) > 1:
        raise DataError(
            f"{where}: a class beside others is called {FOREGROUND!r}, as all of them together are; rename it"
        )


def may_be_cropped(path: ScanSource) -> bool:
    """True for files whose grid may be a part of their scan's.

    3D Slicer crops on request, and DICOM-SEG leaves out empty slices. A cropped NIfTI label is a mistake more
    often.
    """
    return isinstance(path, Path) and (is_segmentation(path) or path.suffix.lower() == ".dcm")


def whole_label(path: ScanSource, label: Volume, shape: Triple, affine: AffineMatrix) -> Volume:
    """Put a label `[x, y, z]` in RAS onto its scan's grid in RAS; voxels outside are 0.

    A label that is no part of that grid, or of a format that stores whole grids, stays as it is.
    """
    if not may_be_cropped(path) or label.shape == tuple(shape):
        return label
    start = offset_in(label.shape, label.affine, shape, affine)
    if start is None:
        return label
    return _placed(label, shape, affine, start)


def label_on_grid(path: ScanSource, label: Volume, shape: Triple, affine: AffineMatrix) -> Volume:
    """Turn a label `[x, y, z]` as its file has it to RAS, onto its image's grid in RAS.

    Raises:
        DataError: it is on another grid.
    """
    found = whole_label(path, to_ras(label), shape, affine)
    if found.shape != tuple(shape) or not same_place(affine, found.affine, shape):
        raise DataError(
            f"{path} is not on the grid of its image (shape {found.shape} and {tuple(shape)}, in RAS); correct it, or give the mask of this image"
        )
    return found


def _placed(label: Volume, shape: Triple, affine: AffineMatrix, start: Triple) -> Volume:
    whole = np.zeros(shape, label.array.dtype)
    x, y, z = (slice(first, first + size) for first, size in zip(start, label.shape, strict=True))
    whole[x, y, z] = label.array
    return Volume(whole, affine)


def on_one_grid(first: Volume, second: Volume) -> tuple[Volume, Volume]:
    """Put two labels in RAS onto the smallest grid that holds both; as they are, if their voxels do not meet."""
    turn = np.linalg.inv(first.affine) @ second.affine
    start = np.rint(turn[:3, 3]).astype(int)
    low = np.minimum(0, start)
    x, y, z = (np.maximum(first.shape, start + second.shape) - low).tolist()
    # Two crops of one scan lie near each other; far apart, the grid would be of any size.
    if x * y * z > _LARGEST_UNION * (first.array.size + second.array.size):
        return first, second
    affine = first.affine.copy()
    affine[:3, 3] = (first.affine @ [*low, 1])[:3]
    ours = offset_in(first.shape, first.affine, (x, y, z), affine)
    theirs = offset_in(second.shape, second.affine, (x, y, z), affine)
    if ours is None or theirs is None:
        return first, second
    return _placed(first, (x, y, z), affine, ours), _placed(second, (x, y, z), affine, theirs)


def offset_in(
    shape: Triple, affine: AffineMatrix, whole: Triple, whole_affine: AffineMatrix
) -> Triple | None:
    """First voxel of a grid inside another of the same voxels, or None if it is no part of it."""
    turn = np.linalg.inv(whole_affine) @ affine
    start = np.rint(turn[:3, 3]).astype(int)
    last = np.asarray(shape) - 1
    # Its first and its last voxel must both lie on voxels of the whole.
    ends = np.stack([turn @ [0, 0, 0, 1], turn @ [*last, 1]])[:, :3]
    apart = np.abs(ends - np.stack([start, start + last])).max()
    alike = np.allclose(spacing_of(affine), spacing_of(whole_affine), rtol=0.01)
    if apart > _TOLERANCE_VOXELS or not alike or (start < 0).any() or (start + shape > whole).any():
        return None
    x, y, z = start.tolist()
    return (x, y, z)
