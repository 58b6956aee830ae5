"""DICOM-SEG in: segments as one label volume, by highdicom."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medvisionllama._optional import require
from medvisionllama.data.formats.dicom_grid import MAX_SHARE_OF_STEP
from medvisionllama.data.formats.dicom_header import read_dataset, reading, reason_of
from medvisionllama.data.formats.header import Header, make_header
from medvisionllama.data.formats.itk import LPS_TO_RAS
from medvisionllama.data.volume import Volume
from medvisionllama.errors import DataError
from medvisionllama.types import AffineMatrix


def read_header(path: Path) -> Header:
    """Shape and place of the slices from the first to the last that a mask stores."""
    return read(path)[1]


def read(path: Path) -> tuple[np.ndarray, Header]:
    """Segment numbers `[1, x, y, z]` and header; without empty slices, so z may be shorter than the scan's.

    Raises:
        DataError: damaged, probabilities instead of a mask, or segments that overlap.
    """
    array, affine, _ = _labels(path)
    return array[None], make_header(path, array.shape, affine)


def read_classes(path: Path, classes: Mapping[int, str]) -> Volume:
    """Read a mask `[x, y, z]` with the values of `classes`, found by the segments' labels; only stored slices.

    Raises:
        DataError: as `read`, or a segment has no such name.
    """
    array, affine, labels = _labels(path)
    return Volume(_renamed(path, array, labels, classes), affine)


def referenced_series(path: Path) -> str:
    """Instance uid of the series that a mask refers to, or "" if it does not say."""
    with reading(path):
        found = read_dataset(path, ("ReferencedSeriesSequence",)).get("ReferencedSeriesSequence") or []
        return str(found[0].get("SeriesInstanceUID", "")) if found else ""


def segment_labels(path: Path) -> dict[int, str]:
    """Number and label of each segment in a mask."""
    mask = _open(path)
    with reading(path):
        return _names(mask)


def short_labels(classes: Mapping[int, str]) -> dict[int, str]:
    """What a segment can be called for each value: 64 characters, without a backslash, no two alike.

    A backslash separates values in DICOM and cannot be part of one.
    """
    labels: dict[int, str] = {}
    for value, name in classes.items():
        # Quotation marks would end a name in the table of labels that is written beside masks.
        label = " ".join(name.replace("\\", "/").replace('"', "'").split())[:64]
        if not label or label in labels.values():
            label = f"{label[: 60 - len(str(value))]} ({value})".strip()
        labels[value] = label
    return labels


def _renamed(path: Path, array: np.ndarray, labels: dict[int, str], classes: Mapping[int, str]) -> np.ndarray:
    values = {label: value for value, label in short_labels(classes).items()}
    table = np.zeros(max([0, *labels]) + 1, np.uint8 if max([0, *classes]) < 256 else np.uint16)
    for number, label in labels.items():
        if label not in values:
            raise DataError(
                f"{path}: segment {label} is none of {', '.join(values)}; rename it or add the class"
            )
        table[number] = values[label]
    return table[array]


def _open(path: Path) -> Any:
    seg = require("highdicom.seg", extra="dicom")
    with reading(path):
        return seg.segread(path)


def _names(mask: Any) -> dict[int, str]:
    """Number and label of each segment; 0 is the background, which LABELMAP describes like a segment."""
    labels = {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in mask.SegmentSequence}
    return {number: label for number, label in labels.items() if number}


def _labels(path: Path) -> tuple[np.ndarray, AffineMatrix, dict[int, str]]:
    """Segment numbers `[x, y, z]`, the matrix to RAS, and the segments' labels."""
    mask = _open(path)
    with reading(path):
        if str(mask.get("SegmentationType")) == "FRACTIONAL":
            raise DataError(
                f"{path} holds probabilities (FRACTIONAL); allowed: BINARY or LABELMAP, export it so"
            )
        labels = _names(mask)
        try:
            volume = mask.get_volume(combine_segments=True, rtol=MAX_SHARE_OF_STEP)
        except RuntimeError as error:
            # The failed reading still holds highdicom's tables, so open the file anew.
            raise _no_volume(path, error, _open(path)) from None
    # highdicom's axes are slice, row, column; ours are column, row, slice, stacked along the slices' normal.
    array = volume.array.transpose(2, 1, 0)
    affine = np.asarray(volume.affine)[:, [2, 1, 0, 3]]
    if np.linalg.det(affine[:3, :3]) < 0:
        array = array[:, :, ::-1]
        affine = affine @ np.array(
            [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, array.shape[2] - 1], [0, 0, 0, 1.0]]
        )
    return np.ascontiguousarray(array), LPS_TO_RAS @ affine, labels


def _no_volume(path: Path, error: RuntimeError, mask: Any) -> DataError:
    """Name the first two segments that share voxels, or repeat highdicom's reason."""
    if "overlap" not in str(error):
        return DataError(
            f"{path} is no regular volume ({reason_of(error)}); export it again on the grid of its scan"
        )
    labels = _names(mask)
    seen: np.ndarray | None = None
    for number in labels:
        own = (
            mask.get_volume(segment_numbers=[number], combine_segments=True, rtol=MAX_SHARE_OF_STEP).array > 0
        )
        seen = np.zeros(own.shape, np.uint16) if seen is None else seen
        both = own & (seen > 0)
        if both.any():
            other = int(seen[both][0])
            count = int((own & (seen == other)).sum())
            return DataError(
                f"{path}: segments {other} ({labels[other]}) and {number} ({labels[number]}) overlap in {count} voxels; allowed: one class per voxel, export them to files of their own"
            )
        seen[own] = number
    return DataError(
        f"{path}: segments overlap; allowed: one class per voxel, export them to files of their own"
    )
