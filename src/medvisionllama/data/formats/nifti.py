"""NIfTI-1 and NIfTI-2, compressed or not, by nibabel."""

import gzip
import zlib
from pathlib import Path
from typing import IO, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from medvisionllama.data.formats.header import Header, make_header, unreadable
from medvisionllama.errors import DataError

SUFFIXES = (".nii.gz", ".nii")
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    OSError,
    ValueError,
    # numpy, asked for the voxels of a header that declares a few terabytes of them.
    OverflowError,
)


def read_header(path: Path) -> Header:
    """Shape and placement, from the first bytes of the file."""
    image = _open(path)
    return make_header(path, image.shape, np.asarray(image.affine, dtype=np.float64))


def read_voxels(path: Path) -> np.ndarray:
    """Voxels `[channel, x, y, z]`, as stored, or as floats where the header scales them."""
    image = _open(path)
    header = make_header(path, image.shape, np.asarray(image.affine, dtype=np.float64))
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path} stores {image.get_data_dtype()} voxels; allowed: integers and real numbers")
    try:
        array = _compressed(path, image) if path.name.endswith(".gz") else np.asarray(image.dataobj)
    except _UNREADABLE as error:
        raise unreadable(path, error) from None
    return np.moveaxis(array.reshape(*header.shape, header.num_channels), -1, 0)


def _compressed(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    # nibabel stops at the last voxel; gzip keeps its checksum behind it, so read to the end, once.
    with gzip.open(path) as file:
        stream = cast(IO[bytes], file)
        array: np.ndarray = np.asarray(type(image).from_stream(stream).dataobj)
        while stream.read(1 << 20):
            pass
    return array


def _open(path: Path) -> nib.Nifti1Image:
    try:
        image = nib.load(path)
    except _UNREADABLE as error:
        raise unreadable(path, error) from None
    if not isinstance(image, nib.Nifti1Image):
        raise DataError(f"{path} is a {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    return image
