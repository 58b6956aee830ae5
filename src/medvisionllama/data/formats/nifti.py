"""NIfTI-1 and NIfTI-2, compressed or not, by nibabel."""

import gzip
import io
import math
import zlib
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from medvisionllama.data.formats.header import Header, make_header, too_large, unreadable
from medvisionllama.errors import DataError
from medvisionllama.types import AffineMatrix

SUFFIXES = (".nii.gz", ".nii")
_METRE, _MICRON = 1, 3  # NIfTI's codes; 2 are millimetres, 0 is not known
_PIECE = 1 << 18
_LONGEST = 32_767  # voxels along an axis that NIfTI-1 can count
# First number of the header, and its length in bytes.
_KINDS = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
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
    return _header(path, _open(path))


def read(path: Path, content: bytes | None = None) -> tuple[np.ndarray, Header]:
    """Voxels `[channel, x, y, z]`, as stored or as floats where the header scales them, and the header.

    Args:
        content: the file's bytes, where the caller has them already.
    """
    packed = path.name.lower().endswith(".gz")
    try:
        if content is None and packed:
            content = path.read_bytes()
        found = None if content is None else _unpack(path, content, packed=packed)
        if found is None:
            # A plain file is mapped; and nibabel's words for what is no NIfTI are better than ours.
            image = _open(path)
            header = _header(path, image)
            _check_type(path, image.get_data_dtype())
            array = np.asarray(image.dataobj)
        else:
            array, header = found
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    array = np.moveaxis(array.reshape(*header.shape, header.num_channels, order="F"), -1, 0)
    # Bytes cannot be written to; a copy is due anyway, unless the array happens to lie in our order.
    return (array.copy() if array.flags.c_contiguous else array), header


def _unpack(path: Path, content: bytes, *, packed: bool) -> tuple[np.ndarray, Header] | None:
    """Voxels and header, or None for what does not begin like NIfTI."""
    source = gzip.GzipFile(fileobj=io.BytesIO(content)) if packed else io.BytesIO(content)
    # No more than the header: the voxels after it are not to be joined to what was read of them before.
    head = source.read(min(_KINDS))
    sizes = [int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")]
    size = next((size for size in sizes if size in _KINDS), 0)
    head += source.read(max(0, size - len(head)))
    if not size or len(head) < size:
        return None
    raw = _KINDS[size].header_class(head[:size])
    shape, dtype = raw.get_data_shape(), raw.get_data_dtype()
    header = make_header(path, shape, _in_mm(raw.get_best_affine(), raw))
    _check_type(path, dtype)
    offset, declared = int(raw.get_data_offset()), math.prod(shape) * dtype.itemsize
    # No more is unpacked than the header declares: a small file may unpack to anything. Nor more than the machine
    # has, which would end this process and not this scan alone.
    if declared > psutil.virtual_memory().total:
        raise too_large(f"{path} of shape {header.shape}")
    before = head + source.read(max(0, offset - len(head)))
    body = source.read(declared - len(before[offset:]))
    if len(before[offset:]) + len(body) < declared:
        raise EOFError("it ends before its last voxel")
    voxels = np.frombuffer((before[offset:] + body)[:declared] if len(before) > offset else body, dtype)
    # Its checksum stands behind the last byte.
    while packed and source.read(_PIECE):
        pass
    slope, inter = raw.get_slope_inter()
    if slope is not None and (slope, inter) != (1.0, 0.0):
        voxels = apply_read_scaling(voxels, np.float64(slope), np.float64(inter))
    return voxels.reshape(shape, order="F"), header


def _check_type(path: Path, dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise DataError(f"{path} stores {dtype} voxels; allowed: integers and real numbers")


def _header(path: Path, image: nib.Nifti1Image) -> Header:
    return make_header(path, image.shape, _in_mm(image.affine, image.header))


def _in_mm(affine: np.ndarray, header: nib.Nifti1Header) -> AffineMatrix:
    """A matrix to millimetres, of one to the header's own unit of length."""
    unit = int(header["xyzt_units"]) & 7
    matrix = np.array(affine, dtype=np.float64)
    matrix[:3] *= {_METRE: 1000.0, _MICRON: 0.001}.get(unit, 1.0)
    return matrix


def _open(path: Path) -> nib.Nifti1Image:
    try:
        image = load(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    if not isinstance(image, nib.Nifti1Image):
        raise DataError(f"{path} is a {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    return image


def load(path: Path) -> nib.Nifti1Image:
    """Open a file as nibabel does, whose own `load` finds suffixes in small or in capital letters only."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    if path.name.endswith((suffix, suffix.upper())):
        return nib.load(path)
    with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as file:
        head = file.read(4)
    second = nib.Nifti2Header.sizeof_hdr in {int.from_bytes(head, "little"), int.from_bytes(head, "big")}
    kind = nib.Nifti2Image if second else nib.Nifti1Image
    return kind.from_file_map({"image": FileHolder(str(path))})


def _unreadable(path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be read; its name may say gzip where it is none, or the other way round."""
    named = path.name.lower().endswith(".gz")
    with suppress(OSError, EOFError, zlib.error), path.open("rb") if named else gzip.open(path) as file:
        head = file.read(4)
        if _KINDS.keys().isdisjoint({int.from_bytes(head, "little"), int.from_bytes(head, "big")}):
            return unreadable(path, error)
        if named:
            return DataError(f"{path} is not compressed as its name says; rename it to {path.name[:-3]}")
        return DataError(f"{path} is compressed, which its name does not say; rename it to {path.name}.gz")
    return unreadable(path, error)


def new_image(array: np.ndarray, affine: AffineMatrix) -> nib.Nifti1Image:
    """An array `[x, y, z]`, or with channels last, as NIfTI in millimetres, its dtype kept.

    Rounded DICOM positions leave a little shear in a matrix, which ITK refuses in an sform; so the matrix without
    it stands in the qform, to which ITK then turns.
    """
    kind = nib.Nifti2Image if max(array.shape) > _LONGEST else nib.Nifti1Image
    image = kind(np.ascontiguousarray(array), affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code="aligned", strip_shears=True, update_affine=False)
    return image
