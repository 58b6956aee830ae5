"""Masks out: the scan's own grid and header, whole numbers, whole files."""

from pathlib import Path

import nibabel as nib
import numpy as np

from medvisionllama._files import atomic_path
from medvisionllama.errors import DataError
from medvisionllama.types import LabelArray


def write_mask(path: Path, mask: LabelArray, like: Path) -> None:
    """Write `[x, y, z]` with the geometry of the scan `like`.

    The dtype is uint8 up to 255 classes, else uint16; sform, qform, their codes and the units are the scan's.

    Raises:
        DataError: the name is not one of a NIfTI file.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: masks are written as .nii or .nii.gz; choose such a name")
    scan = nib.load(like)
    header = scan.header.copy()
    dtype = np.uint8 if mask.max(initial=0) < 256 else np.uint16
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    # Free text and extensions of a hospital's file can name the patient; a mask needs neither. NIfTI-2 lacks some.
    for field in {"descrip", "aux_file", "db_name", "data_type", "intent_name"} & set(header.keys()):
        header[field] = b""
    header.extensions.clear()
    image = type(scan)(np.ascontiguousarray(mask, dtype=dtype), None, header)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
