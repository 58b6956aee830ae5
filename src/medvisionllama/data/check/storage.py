"""How a NIfTI file says where it lies: two matrices with a code each, and a unit of length.

Our readers resolve these to one matrix. A check wants to know whether they were set and whether they agree.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from medvisionllama.data.formats import ScanSource, nifti
from medvisionllama.types import AffineMatrix

_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")


@dataclass(frozen=True)
class Storage:
    """Placement as stored; a matrix is None where its code is 0."""

    sform: AffineMatrix | None
    qform: AffineMatrix | None
    unit: str

    @property
    def placed(self) -> bool:
        """One of the two matrices is set."""
        return self.sform is not None or self.qform is not None


def read_storage(path: ScanSource) -> Storage | None:
    """Read a NIfTI header's placement; None for other formats."""
    if not (isinstance(path, Path) and path.is_file() and path.name.lower().endswith(nifti.SUFFIXES)):
        return None
    # The header alone: opening an image takes three times as long.
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        block = file.read(nib.Nifti2Header.sizeof_hdr)
    second = nib.Nifti2Header.sizeof_hdr in {int.from_bytes(block[:4], order) for order in _ORDERS}
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    header = kind(block[: kind.sizeof_hdr], check=False)
    # As our reader does, which has accepted the file: 0 means 1, and lengths have no sign.
    if header["pixdim"][0] not in {-1, 1}:
        header["pixdim"][0] = 1
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    try:
        qform = header.get_qform(coded=True)[0]
    except ValueError:  # a quaternion longer than 1, in a file whose sform may be well
        qform = None
    try:
        unit = str(header.get_xyzt_units()[0])
    except KeyError:  # a code that the standard does not know
        unit = "unknown"
    return Storage(header.get_sform(coded=True)[0], qform, unit)
