"""Files of one layout as files of another: passed on as they are, split into channels, or put together.

NIfTI keeps its own header, dtype and scaling, so what is split and put together again has the voxels, the affine
and the dtype it began with. What is already right is linked or copied, byte for byte.
"""

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from medvisionllama._files import flush, linked
from medvisionllama.data.formats import ScanSource, nifti
from medvisionllama.data.formats.header import channel_problem
from medvisionllama.data.labels import label_on_grid, may_be_cropped
from medvisionllama.data.readers import read_header, read_label, read_voxels
from medvisionllama.data.volume import from_ras, ras_grid, same_place
from medvisionllama.errors import DataError

Transfer = Literal["link", "symlink", "copy"]
SUFFIX = ".nii.gz"


def pass_on(source: Path, target: Path, transfer: Transfer) -> None:
    """Give a scan a second name, or a copy; what is not .nii.gz yet becomes it, with the same voxels.

    A hard link that the disk does not allow becomes a copy.
    """
    name = source.name.lower()
    if source.is_file() and name.endswith(".nii.gz"):
        source = source.resolve()
        if transfer == "symlink":
            target.symlink_to(source)
            return
        if transfer == "link" and linked(source, target):
            return
        shutil.copyfile(source, target)
        flush(target)
    elif source.is_file() and name.endswith(".nii"):
        # Compressing changes neither header nor voxels.
        with (
            source.open("rb") as plain,
            target.open("wb") as file,
            gzip.GzipFile("", "wb", compresslevel=3, fileobj=file, mtime=0) as packed,
        ):
            shutil.copyfileobj(plain, packed, 1 << 20)
        flush(target)
    else:
        _save(_from_other(source), target)


def split(source: Path, targets: Sequence[Path]) -> None:
    """Write each channel of a scan to a 3-D file of its own.

    Raises:
        DataError: the scan has another number of channels, or cannot be read.
    """
    image = _open(source)
    header = read_header(source)
    if header.num_channels != len(targets):
        raise DataError(
            f"{source} has {header.num_channels} channels where the dataset names {len(targets)}; correct 'modality' or 'channel_names' in dataset.json"
        )
    raw, scaling = _raw(source, image)
    for channel, target in enumerate(targets):
        _save(_like(image, np.ascontiguousarray(raw[..., channel]), scaling), target)


def merge(sources: Sequence[Path], target: Path) -> None:
    """Write the channels of a case to one 4-D file, channels last.

    Raises:
        DataError: channels of different geometry, or one that cannot be read.
    """
    images = [_open(source) for source in sources]
    first = read_header(sources[0])
    for source in sources:
        header = read_header(source)
        if header.num_channels != 1:
            raise DataError(f"{source} has {header.num_channels} channels; one file per channel must be 3-D")
        if problem := channel_problem(source, header, sources[0], first):
            raise DataError(problem)
    parts = [_raw(source, image) for source, image in zip(sources, images, strict=True)]
    arrays, scaling = [array for array, _ in parts], parts[0][1]
    if len({(array.dtype.newbyteorder("="), factors) for array, factors in parts}) > 1:
        # One file has one dtype and one scaling: the values themselves, in a dtype that holds them all.
        arrays = [
            array if factors == (1.0, 0.0) else array * factors[0] + factors[1] for array, factors in parts
        ]
        scaling = (1.0, 0.0)
    _save(_like(images[0], np.concatenate(arrays, axis=-1), scaling), target)


def relabel(source: Path, target: Path, new_values: dict[int, int]) -> None:
    """Write a label with other numbers; those not named become 0."""
    label = read_label(source).array
    table = np.zeros(max(int(label.max()), *new_values, 0) + 1, np.uint16)
    table[list(new_values)] = list(new_values.values())
    dtype = np.uint8 if table.max() < 256 else np.uint16
    _save(_like(_open(source), table[label].astype(dtype), (1.0, 0.0)), target)


def lies_otherwise(label: Path, image: ScanSource) -> bool:
    """Whether a label is stored on other axes than its image, or as a part of it.

    Programs that compare arrays, as nnU-Net does, would take it for a mirrored or exchanged one.
    """
    ours, theirs = read_header(label), read_header(image)
    if ours.shape != theirs.shape and may_be_cropped(label):
        return True
    if ours.shape == theirs.shape and same_place(theirs.affine, ours.affine, ours.shape):
        return False
    return bool(nib.aff2axcodes(ours.affine) != nib.aff2axcodes(theirs.affine))


def lay_on(source: Path, image: ScanSource, target: Path) -> None:
    """Write a label on the grid and axes of its image; what is outside of a cropped one is 0.

    Raises:
        DataError: it is on another grid.
    """
    header = read_header(image)
    label = label_on_grid(source, read_label(source), *ras_grid(header.shape, header.affine))
    _save(nifti.new_image(from_ras(label.array, header.affine), header.affine), target)


def is_flat(path: Path) -> bool:
    """Whether a file is 3-D as it is stored; one of a single channel may have a fourth axis."""
    if not path.name.lower().endswith(nifti.SUFFIXES):
        return read_header(path).num_channels == 1
    return len(_open(path).shape) == 3


def _open(path: Path) -> Any:
    read_header(path)  # refuses what cannot be read, with our words
    return nifti.load(path) if path.name.lower().endswith(nifti.SUFFIXES) else _from_other(path)


def _from_other(path: Path) -> nib.Nifti1Image:
    """Read NRRD, MetaImage or a series; NIfTI keeps an affine in single precision."""
    volume = read_voxels(path)
    array = np.moveaxis(volume.array, 0, -1)
    array = array[..., 0] if array.shape[-1] == 1 else array
    return nifti.new_image(array, volume.affine)


def _raw(path: Path, image: Any) -> tuple[np.ndarray, tuple[float, float]]:
    """Voxels `[x, y, z, channel]` as they are stored, and the slope and intercept of their values."""
    if isinstance(image.dataobj, np.ndarray):
        array, scaling = image.dataobj, (1.0, 0.0)
    else:
        read_voxels(path)  # to the end of the file, with its checksum
        array = np.asarray(image.dataobj.get_unscaled())
        scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
    x, y, z = array.shape[:3]
    return array.reshape(x, y, z, -1), scaling


def _like(image: Any, array: np.ndarray, scaling: tuple[float, float]) -> Any:
    header = image.header.copy()
    header.set_data_dtype(array.dtype)
    made = type(image)(array, image.affine, header)
    # Set by hand, so that nibabel writes the voxels as they are; a new image has forgotten its header's.
    made.header.set_slope_inter(*scaling)
    return made


def _save(image: Any, target: Path) -> None:
    nib.save(image, target)
    flush(target)
