"""DICOM series, classic and enhanced multi-frame, by pydicom; masks (DICOM-SEG) by highdicom.

A scan is a folder that holds exactly one series of images, one multi-frame file, or a `Series`.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from medvisionllama._optional import require
from medvisionllama.data.formats import dicom_labels
from medvisionllama.data.formats.dicom_grid import grid_of
from medvisionllama.data.formats.dicom_header import (
    DEFLATED,
    Slice,
    broken,
    damaged,
    has_preamble,
    is_mask,
    quiet,
    read_file_header,
    reading,
)
from medvisionllama.data.formats.dicom_series import Series, find_series
from medvisionllama.data.formats.header import Header, too_large
from medvisionllama.errors import DataError

SUFFIXES = (".dcm",)
# On damaged frames gdcm ends the whole process and pylibjpeg's RLE panics; these decoders raise an error instead.
_DECODERS = {
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG, 8 bits
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
}


def read_header(source: Path | Series) -> Header:
    """Shape and placement of a series or a mask, from its headers."""
    if isinstance(source, Path) and is_mask(source):
        return dicom_labels.read_header(source)
    return grid_of(_one_series(source))


def read(source: Path | Series, _content: bytes | None = None) -> tuple[np.ndarray, Header]:
    """Voxels `[channel, x, y, z]` and header: x along rows, y along columns, z along the normal.

    A mask has the numbers of its segments.

    Rescaled values are integers where slope and intercept are whole numbers and the same for all slices, else
    float32. MONOCHROME1 is inverted, so that bright is high, but for CT and PET, whose values are measures.
    """
    if isinstance(source, Path) and is_mask(source):
        return dicom_labels.read(source)
    series = _one_series(source)
    header = grid_of(series)
    if isinstance(source, Series):
        _check_same(series)
    return _voxels(series, header), header


def open_series(source: Path) -> Series:
    """The one series of images in a folder or file.

    Raises:
        DataError: none there, or several, which are listed.
    """
    found = find_series(source)
    if not found:
        raise DataError(
            f"{source} holds no DICOM series of images (reports, masks and localisers do not count); give the folder of a scan"
        )
    if len(found) > 1:
        listed = ", ".join(f"{series.name} ({len(series.slices)} images)" for series in found[:10])
        raise DataError(
            f"{source} holds {len(found)} series: {listed}{', ...' if len(found) > 10 else ''}; give the folder of one of them"
        )
    return found[0]


def _one_series(source: Path | Series) -> Series:
    return source if isinstance(source, Series) else open_series(source)


def _voxels(series: Series, header: Header) -> np.ndarray:
    x, y, z = header.shape
    dtype = _dtype(series.slices)
    places = enumerate(series.slices)
    try:
        array = np.empty((z, y, x), dtype)
        with quiet():
            for file, group in groupby(places, key=lambda item: item[1].file):
                _read_frames(file, list(group), array)
    except MemoryError:
        raise too_large(f"{series} of shape {header.shape}") from None
    return array.transpose(2, 1, 0)[None]


def _check_same(series: Series) -> None:
    """Raise DataError if another image has come in a file's place since the series was found.

    In a long batch that is hours before its turn, and the voxels would be laid where the other's belong.
    """
    for file, pieces in groupby(series.slices, key=lambda piece: piece.file):
        with reading(file):
            header = read_file_header(file)
        now = dict(enumerate(header.slices)) if header else {}
        if any(now.get(piece.frame) != piece for piece in pieces):
            raise DataError(
                f"{file} holds another image than when its series was found; see that all of it has arrived, then give the same command again"
            )


def _read_frames(file: Path, group: list[tuple[int, Slice]], out: np.ndarray) -> None:
    """Decode the frames of one file into their slices of `out`, `[z, y, x]`."""
    pixels = require("pydicom.pixels", extra="dicom")
    try:
        source, plugin = _with_syntax(file)
        chosen = [piece.frame for _, piece in group]
        frames = pixels.iter_pixels(source, indices=chosen, raw=True, decoding_plugin=plugin)
        for (place, piece), frame in zip(group, frames, strict=True):
            out[place] = _values(piece, frame, out.dtype)
    except AttributeError as error:
        if "Transfer Syntax" in str(error):
            raise damaged(file, error) from None
        raise DataError(f"{file} has no pixel data; export the series again from its source") from None
    except broken() as error:
        # pydicom has no error of its own for a compression that no installed decoder knows.
        if isinstance(error, NotImplementedError) or re.search("missing dep|does not support", str(error)):
            raise DataError(
                f"{file} is compressed in a way that no decoder here reads; run pip install 'medvisionllama[dicom]', or decompress it first, with gdcmconv --raw for example"
            ) from None
        raise damaged(file, error) from None


def _with_syntax(file: Path) -> tuple[Any, str]:
    """What pydicom decodes a file from, and by which decoder.

    Old files have no preamble to say their encoding; they come as a dataset with the one that was found. So does
    what is deflated, of which pydicom finds no pixels in the file.
    """
    pydicom = require("pydicom", extra="dicom")
    filereader = require("pydicom.filereader", extra="dicom")
    if has_preamble(file):
        syntax = filereader.read_file_meta_info(file).get("TransferSyntaxUID", "")
        return (pydicom.dcmread(file), "") if syntax == DEFLATED else (file, _decoder(syntax))
    dataset = pydicom.dcmread(file, force=True)
    implicit, _ = dataset.original_encoding
    dataset.file_meta.TransferSyntaxUID = (
        pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    )
    return dataset, ""


def _decoder(syntax: str) -> str:
    """Name of the preferred decoder of a compression, or "" for whichever pydicom finds."""
    pixels = require("pydicom.pixels", extra="dicom")
    preferred = _DECODERS.get(syntax, "")
    return preferred if preferred and preferred in pixels.get_decoder(syntax).available_plugins else ""


def _values(piece: Slice, stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if piece.inverted and piece.bits:
        low, high = _range(piece)
        stored = low + high - stored.astype(np.int64 if stored.dtype.kind in "iu" else stored.dtype)
    if piece.slope == 1 and piece.intercept == 0:
        return stored
    if dtype.kind == "f":
        return stored.astype(np.float64) * piece.slope + piece.intercept
    return stored.astype(np.int64) * int(piece.slope) + int(piece.intercept)


def _range(piece: Slice) -> tuple[int, int]:
    """Lowest and highest value that the bits of a slice can store."""
    return (-(1 << piece.bits - 1), (1 << piece.bits - 1) - 1) if piece.signed else (0, (1 << piece.bits) - 1)


def _dtype(slices: tuple[Slice, ...]) -> np.dtype:
    """The smallest type of int16, int32 and float32 that holds every value the slices can have."""
    scales = {(piece.slope, piece.intercept) for piece in slices}
    if len(scales) > 1 or not all(value.is_integer() for value in next(iter(scales))):
        return np.dtype(np.float32)
    if any(piece.bits == 0 for piece in slices):  # floating-point pixel data
        return np.dtype(np.float32)
    slope, intercept = next(iter(scales))
    ends = [value * slope + intercept for piece in slices for value in _range(piece)]
    for dtype in (np.int16, np.int32):
        if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.float32)
