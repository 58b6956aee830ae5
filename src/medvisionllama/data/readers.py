"""NIfTI in, checked. Every refusal names the file, what is wrong with it and what to do."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from medvisionllama.data.volume import Volume, spacing_of
from medvisionllama.errors import DataError
from medvisionllama.types import AffineMatrix, SpacingMm, Triple

SUFFIXES = (".nii.gz", ".nii")
_UNREADABLE = (ImageFileError, HeaderDataError, EOFError, gzip.BadGzipFile, zlib.error, OSError, ValueError)


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its voxels are read."""

    shape: Triple
    num_channels: int
    affine: AffineMatrix

    @property
    def spacing_mm(self) -> SpacingMm:
        return spacing_of(self.affine)


def stem_of(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_scan(path: Path) -> bool:
    """True for files we read; hidden files, such as macOS's `._` twins in MSD archives, are not scans."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def read_header(path: Path) -> Header:
    """Read shape and placement only.

    Raises:
        DataError: the file is missing or is not a 3-D or 4-D NIfTI image.
    """
    image = _open(path)
    return _header(path, image)


def read_image(paths: tuple[Path, ...]) -> Volume:
    """Read one case's image as float32 `[channel, x, y, z]`.

    Args:
        paths: one file (3-D, or 4-D with channels last), or one file per channel.

    Raises:
        DataError: unreadable or truncated, NaN or infinite voxels, or channels of different geometry.
    """
    channels, affine, shape = [], None, None
    for path in paths:
        image = _open(path)
        header = _header(path, image)
        array = _voxels(path, image, np.float32)
        array = np.moveaxis(array, -1, 0) if header.num_channels > 1 else array.reshape(1, *header.shape)
        _check_finite(path, array)
        if affine is None:
            affine, shape = header.affine, header.shape
        elif header.shape != shape or not np.allclose(affine, header.affine, atol=1e-3):
            raise DataError(
                f"{path}: its shape or affine differs from {paths[0].name}; resample the channels to one grid"
            )
        channels.append(array)
    assert affine is not None, "a case has at least one image"
    return Volume(np.ascontiguousarray(np.concatenate(channels)), affine)


def read_label(path: Path) -> Volume:
    """Read a label as integers `[x, y, z]`.

    Raises:
        DataError: unreadable or truncated, not 3-D, fractional or negative values.
    """
    image = _open(path)
    header = _header(path, image)
    if header.num_channels > 1:
        raise DataError(
            f"{path}: a label must be 3-D, this one has {header.num_channels} channels; merge them to class numbers"
        )
    raw = _voxels(path, image, np.float32).reshape(header.shape)
    _check_finite(path, raw[None])
    label = np.rint(raw)
    if not np.array_equal(label, raw):
        value = raw[label != raw][0]
        raise DataError(
            f"{path}: labels must be whole numbers, found {value:g}; resample the label with nearest neighbour"
        )
    if label.min() < 0 or label.max() > 65_535:
        raise DataError(f"{path}: labels must lie in 0..65535, found {label.min():g}..{label.max():g}")
    return Volume(label.astype(np.uint8 if label.max() < 256 else np.uint16), header.affine)


def _open(path: Path) -> nib.Nifti1Image:
    if not path.is_file():
        raise DataError(f"{path} does not exist; put the file there or remove the case from the dataset")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is not a scan we read; allowed: {', '.join(SUFFIXES)}")
    try:
        image = nib.load(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if not isinstance(image, nib.Nifti1Image):
        raise DataError(f"{path} is a {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    return image


def _header(path: Path, image: nib.Nifti1Image) -> Header:
    shape = tuple(int(size) for size in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(f"{path} has shape {shape}; allowed: 3-D, or 4-D with channels last")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(
            f"{path}: its affine matrix is not invertible; export the scan again with its geometry"
        )
    x, y, z, *channels = shape
    return Header((x, y, z), channels[0] if channels else 1, affine)


def _voxels(path: Path, image: nib.Nifti1Image, dtype: type) -> np.ndarray:
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path} stores {image.get_data_dtype()} voxels; allowed: integers and real numbers")
    try:
        _check_gzip(path)
        array: np.ndarray = np.asarray(image.dataobj, dtype=dtype)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _check_gzip(path: Path) -> None:
    """Read a compressed file to its end, where gzip keeps its checksum: nibabel stops at the last voxel."""
    if path.name.endswith(".gz"):
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass


def _check_finite(path: Path, array: np.ndarray) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(index) for index in np.argwhere(bad)[0][1:])
        count = int(bad.sum())
        raise DataError(
            f"{path}: {count} voxel{'s are' if count > 1 else ' is'} NaN or infinite, the first at {first}; repair the file or leave the case out"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(f"{path} is damaged or truncated ({reason}); copy it again from its source")
