"""Masks out: the scan's own grid and header, whole numbers, whole files."""

import errno
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.openers import Opener

from medvisionllama._files import atomic_path
from medvisionllama.colours import rgb_of
from medvisionllama.data.formats.itk import LPS_TO_RAS
from medvisionllama.data.formats.nifti import load, new_image
from medvisionllama.data.readers import ScanSource
from medvisionllama.data.volume import spacing_of
from medvisionllama.errors import DataError
from medvisionllama.types import AffineMatrix, LabelArray

NIFTI = (".nii.gz", ".nii")
ITK = (".seg.nrrd", ".nrrd", ".mha")


def write_mask(
    path: Path,
    mask: LabelArray,
    affine: AffineMatrix,
    *,
    like: ScanSource | None = None,
    classes: Mapping[int, str] | None = None,
) -> None:
    """Write `[x, y, z]`; the ending of `path` decides the format.

    The dtype is uint8 up to 255 classes, else uint16. A NIfTI mask of a NIfTI scan has the scan's sform, qform,
    their codes and units. A `.seg.nrrd` carries names and colours, as 3D Slicer keeps them.

    Args:
        like: the scan.
        classes: names by value, for formats that keep them.

    Raises:
        DataError: an ending that we do not write.
    """
    mask = np.ascontiguousarray(mask, dtype=np.uint8 if mask.max(initial=0) < 256 else np.uint16)
    if path.name.endswith(NIFTI):
        header = _header_like(like)
        _write_nifti(path, mask, affine, header)
    elif path.name.endswith(ITK):
        _write_itk(path, mask, affine, classes or {})
    else:
        raise DataError(f"{path}: masks are written as {', '.join((*NIFTI, *ITK))}; choose such a name")


def write_map(
    path: Path, values: np.ndarray, affine: AffineMatrix, *, like: ScanSource | None = None
) -> None:
    """Write numbers `[x, y, z]` as NIfTI in float32; `like` as for `write_mask`."""
    header = _header_like(like)
    _write_nifti(path, np.ascontiguousarray(values, dtype=np.float32), affine, header)


def write_shares(
    path: Path, shares: np.ndarray, affine: AffineMatrix, *, like: ScanSource | None = None
) -> None:
    """Write numbers between 0 and 1, given in 255 steps as `[x, y, z]` or `[k, x, y, z]`, as NIfTI.

    A viewer shows them from 0 to 1; a fourth axis, if any, is the class, background first.

    Args:
        like: the scan, as for `write_mask`.
    """
    array = shares if shares.ndim == 3 else np.moveaxis(shares, 0, -1)
    header = _header_like(like) or new_image(array, affine).header
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header["pixdim"][4:] = 1
    header.set_slope_inter(1 / 255, 0)
    first = header.single_vox_offset
    header["vox_offset"] = first
    # nib.save would choose a slope of its own; these bytes have theirs already.
    with atomic_path(path) as temporary, Opener(str(temporary), "wb") as file:
        header.write_to(file)
        file.write(bytes(first - file.tell()))
        file.write(array.tobytes(order="F"))


def label_table(classes: Mapping[int, str]) -> str:
    """Names and colours as the label descriptions that ITK-SNAP and 3D Slicer load."""
    rows = ['    0     0    0    0        0  0  0    "background"']
    for index, (value, name) in enumerate(classes.items()):
        red, green, blue = rgb_of(index)
        # A quotation mark would end the name, a line break the row.
        text = " ".join(name.replace('"', "'").split())
        rows.append(f'{value:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{text}"')
    return "\n".join(rows) + "\n"


def read_label_table(text: str) -> dict[int, str]:
    """Names of the classes by value in a table of `label_table`; empty for any other text."""
    rows = re.findall(r'^ *(\d+)(?: +[\d.]+){6} +"(.*)"$', text, re.MULTILINE)
    return {int(value): name for value, name in rows if int(value)}


def _header_like(scan: ScanSource | None) -> nib.Nifti1Header | None:
    """Header of a NIfTI scan for what lies on its grid; None of any other."""
    if not (isinstance(scan, Path) and scan.name.endswith(NIFTI)):
        return None
    header = load(scan).header.copy()
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    # Free text and extensions of a hospital's file can name the patient; a mask needs neither. NIfTI-2 lacks some.
    for field in {"descrip", "aux_file", "db_name", "data_type", "intent_name"} & set(header.keys()):
        header[field] = b""
    header.extensions.clear()
    return header


def _write_nifti(path: Path, mask: np.ndarray, affine: AffineMatrix, header: nib.Nifti1Header | None) -> None:
    if header is None:
        image = new_image(mask, affine)
    else:
        header.set_data_dtype(mask.dtype)
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        image = kind(mask, None, header)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def _write_itk(path: Path, mask: LabelArray, affine: AffineMatrix, classes: Mapping[int, str]) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(mask.T)
    lps = LPS_TO_RAS @ affine
    spacing = np.asarray(spacing_of(affine))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    if path.name.endswith(".seg.nrrd"):
        for index, (value, name) in enumerate(classes.items()):
            colour = " ".join(f"{part / 255:.4f}" for part in rgb_of(index))
            facts = {"ID": f"Segment_{value}", "Name": name, "Color": colour, "LabelValue": str(value)}
            for key, text in {**facts, "Layer": "0"}.items():
                image.SetMetaData(f"Segment{index}_{key}", text)
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            # ITK says why in words alone, and not always.
            if shutil.disk_usage(temporary.parent).free < mask.nbytes:
                raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
            raise DataError(f"{path} cannot be written ({_last_line(error)}); check the disk") from None


def _last_line(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"
