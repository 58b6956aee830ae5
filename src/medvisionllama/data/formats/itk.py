"""NRRD and MetaImage in one file each, by SimpleITK.

Detached headers (.nhdr, .mhd, or a .nrrd that names another file) are refused: the name in them could point
anywhere on the disk of whoever opens a stranger's scan.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medvisionllama.data.formats.header import Header, make_header, unreadable
from medvisionllama.errors import DataError

if TYPE_CHECKING:
    import SimpleITK as sitk

SUFFIXES = (".seg.nrrd", ".nrrd", ".mha")
# Of a header; parcellations into hundreds of segments take some 100,000.
_MAX_HEADER_BYTES = 1 << 24
_NRRD_END = re.compile(rb"\n\r?\n")
_MHA_END = re.compile(rb"elementdatafile", re.IGNORECASE)
# ITK counts towards the patient's left and back (LPS), we towards right and front (RAS).
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_header(path: Path) -> Header:
    """Shape and placement, from the text at the head of the file."""
    return _read_header(path, _reader(path))


def read(path: Path, _content: bytes | None = None) -> tuple[np.ndarray, Header]:
    """Voxels `[channel, x, y, z]` as stored, and header; ITK reads the file itself, whoever has its bytes."""
    import SimpleITK as sitk

    reader = _reader(path)
    header = _read_header(path, reader)
    try:
        image = reader.Execute()
    except RuntimeError:
        # ITK's own words are places in its source code.
        raise unreadable(path, RuntimeError("its voxels end early or cannot be unpacked")) from None
    array = sitk.GetArrayFromImage(image)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{path} stores {array.dtype} voxels; allowed: integers and real numbers")
    if image.GetNumberOfComponentsPerPixel() > 1:
        return np.moveaxis(array, -1, 0).transpose(0, 3, 2, 1), header
    # [channel, z, y, x], where a fourth axis is the slowest.
    return array.reshape(header.num_channels, *header.shape[::-1]).transpose(0, 3, 2, 1), header


def is_segmentation(path: Path) -> bool:
    """True for labels of 3D Slicer, which it saves as `scan.seg.nrrd` beside `scan.nrrd`."""
    return path.name.lower().endswith(".seg.nrrd")


def segment_names(path: Path) -> dict[int, str]:
    """Name of each value as 3D Slicer writes it into a label's header; empty where it says none.

    Values mean nothing where overlapping segments lie in layers, as each layer counts anew.

    Raises:
        DataError: the header cannot be read.
    """
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() > 1:
            return {}
        fields = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    except RuntimeError:
        raise _no_header(path) from None
    names = {}
    for key, content in fields.items():
        segment = re.fullmatch(r"(Segment\d+)_Name", key)
        value = fields.get(f"{segment[1]}_LabelValue", "").strip() if segment else ""
        # A name goes into messages and pages, so it is one line of plain characters.
        name = " ".join("".join(char for char in content if char.isprintable()).split())
        if re.fullmatch(r"[0-9]{1,5}", value) and name:
            names[int(value)] = name
    return {value: names[value] for value in sorted(names) if value}


def _no_header(path: Path) -> DataError:
    return unreadable(path, RuntimeError("its header makes no sense"))


def _reader(path: Path) -> "sitk.ImageFileReader":
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # noqa: FBT003 # ITK's own name; our errors are one line, its go to the terminal
    _refuse_detached(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    return reader


def _read_header(path: Path, reader: "sitk.ImageFileReader") -> Header:
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise _no_header(path) from None
    dimension, components = reader.GetDimension(), reader.GetNumberOfComponents()
    if dimension < 3 or (dimension > 3 and components > 1):
        raise DataError(f"{path} has shape {reader.GetSize()}; allowed: 3-D, or 4-D with channels last")
    direction = np.asarray(reader.GetDirection(), dtype=np.float64).reshape(dimension, dimension)
    affine = np.eye(4)
    affine[:3, :3] = direction[:3, :3] * np.asarray(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    sizes = (*reader.GetSize(), components) if components > 1 else reader.GetSize()
    return make_header(path, sizes, LPS_TO_RAS @ affine)


def _refuse_detached(path: Path) -> None:
    """Let ITK see plain headers only: what it reads otherwise than we do could name another file."""
    head = _head(path, _NRRD_END if path.suffix.lower() == ".nrrd" else _MHA_END)
    if path.suffix.lower() == ".nrrd":
        end = _NRRD_END.search(head)
        lines = re.split(rb"[\r\n]", head[: end.start() if end else None])
        detached = any(re.match(rb"data\s*file", line.strip(), re.IGNORECASE) for line in lines)
    else:
        # The first place where this key stands must be its own line, and say that the voxels follow.
        end = _MHA_END.search(head)
        line = rb"(?:^|\n)ElementDataFile[ \t]*=[ \t]*LOCAL[ \t]*\r?\n"
        local = re.search(line, head, re.IGNORECASE)
        detached = end is not None and not (local and local.start() <= end.start() < local.end())
    whole = end is not None
    if detached:
        raise DataError(
            f"{path} keeps its voxels in another file, or its header is ambiguous; save it again as one .nrrd, .mha or .nii.gz"
        )
    if not whole:
        raise unreadable(path, RuntimeError("no end of its header found"))


def _head(path: Path, end: re.Pattern[bytes]) -> bytes:
    """The first bytes of a file, until a line after `end` or as many as a header may have."""
    head = b""
    with path.open("rb") as file:
        while len(head) < _MAX_HEADER_BYTES and (piece := file.read(1 << 16)):
            head += piece
            found = end.search(head)
            if found and len(head) > found.end() + 256:
                break
    return head
