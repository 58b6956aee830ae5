"""Scans in, checked. Every refusal names the file, what is wrong with it and what to do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medvisionllama.data.formats import SUFFIXES, ScanSource, format_of
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.data.formats.header import Header, channel_problem
from medvisionllama.data.volume import Volume
from medvisionllama.errors import DataError

LABEL_TOLERANCE = 0.01
"""A file that scales its values keeps whole numbers to about half its slope; a label that was interpolated has
voxels further off."""
__all__ = [
    "LABEL_TOLERANCE",
    "SUFFIXES",
    "Header",
    "ScanSource",
    "is_scan",
    "read_header",
    "read_image",
    "read_label",
    "read_voxels",
    "stem_of",
]


def stem_of(path: ScanSource) -> str:
    """File name without the suffixes of a scan; a folder's name; a series' own."""
    if isinstance(path, Series) or path.is_dir():
        return path.name
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_scan(path: Path) -> bool:
    """True for files we read; hidden files, such as macOS's `._` twins in MSD archives, are not scans."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_header(path: ScanSource) -> Header:
    """Read shape and placement only.

    Raises:
        DataError: the file is missing or is not a 3-D or 4-D image.
    """
    header: Header = format_of(path).read_header(path)
    return header


def read_voxels(path: ScanSource, content: bytes | None = None) -> Volume:
    """Read `[channel, x, y, z]` as stored, whatever the values: for those who look for what is wrong with them.

    Args:
        content: the file's bytes, where the caller has them already; formats that cannot use them read again.

    Raises:
        DataError: the file is missing, damaged, truncated, or is not a 3-D or 4-D image.
    """
    array, header = format_of(path).read(path, content)
    return Volume(array, header.affine)


def read_image(paths: tuple[ScanSource, ...], contents: Sequence[bytes | None] = ()) -> Volume:
    """Read one case's image as float32 `[channel, x, y, z]`.

    Args:
        paths: one file (3-D, or 4-D with channels last) or DICOM series, or one per channel.
        contents: the bytes of each file, as for `read_voxels`.

    Raises:
        DataError: unreadable or truncated, NaN or infinite voxels, or channels of different geometry.
    """
    channels: list[np.ndarray] = []
    first: Volume | None = None
    for path, content in zip(paths, contents or (None,) * len(paths), strict=True):
        volume = read_voxels(path, content)
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused below
            array = volume.array.astype(np.float32, order="C", copy=False)
        check_finite(path, array)
        first = first or volume
        if problem := channel_problem(path, volume, paths[0], first):
            raise DataError(problem)
        channels.append(array)
    assert first is not None, "a case has at least one image"
    array = channels[0] if len(channels) == 1 else np.concatenate(channels)
    return Volume(np.ascontiguousarray(array), first.affine)


def read_label(path: ScanSource, content: bytes | None = None) -> Volume:
    """Read a label as integers `[x, y, z]`; `content` as for `read_voxels`.

    Raises:
        DataError: unreadable or truncated, not 3-D, fractional or negative values.
    """
    volume = read_voxels(path, content)
    if len(volume.array) > 1:
        raise DataError(
            f"{path}: a label must be 3-D, this one has {len(volume.array)} channels; merge them to class numbers"
        )
    raw = volume.array[0]
    is_real = raw.dtype.kind == "f"
    if is_real:
        check_finite(path, raw[None])
        number, example = count_fractional(raw)
        if number:
            raise DataError(
                f"{path}: labels must be whole numbers, found {example:g}; resample the label with nearest neighbour"
            )
    low, high = (np.rint(end) if is_real else end for end in (raw.min(), raw.max()))
    if low < 0 or high > 65_535:
        raise DataError(f"{path}: labels must lie in 0..65535, found {low:g}..{high:g}")
    labels = np.empty(raw.shape, np.uint8 if high < 256 else np.uint16)
    if is_real:
        np.rint(raw, out=labels, casting="unsafe")
    else:
        labels[...] = raw
    return Volume(labels, volume.affine)


def count_fractional(values: np.ndarray) -> tuple[int, float | None]:
    """Number of values that are no whole numbers, and the first of them, plane by plane of the last axis.

    Real numbers take up to eight times a label's memory; three more copies of them would not fit beside it.
    """
    number, example = 0, None
    for plane in np.moveaxis(values, -1, 0) if values.ndim > 1 else [values]:
        apart = np.abs(np.rint(plane) - plane) > LABEL_TOLERANCE
        if found := int(np.count_nonzero(apart)):
            example = float(plane[apart][0]) if example is None else example
            number += found
    return number, example


def check_finite(path: object, array: np.ndarray) -> None:
    """Raise DataError if a voxel of `[channel, x, y, z]` is not a number."""
    if array.dtype.kind != "f":
        return
    # A sum is finite only if every term is: one pass and no array of flags for the scans that are well.
    if np.isfinite(array.sum(dtype=np.float64)):
        return
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(index) for index in np.argwhere(bad)[0][1:])
        count = int(bad.sum())
        raise DataError(
            f"{path}: {count} voxel{'s are' if count > 1 else ' is'} NaN or infinite, the first at {first}; repair the file or leave the case out"
        )
