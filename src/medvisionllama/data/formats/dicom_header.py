"""What one DICOM file says of itself: the series it belongs to, and a `Slice` for each of its frames.

Only the header is read. Enhanced multi-frame files keep the place of a frame in functional groups, shared by all
frames or one per frame; classic files keep it at the top. Both become the same `Slice`.
"""

import logging
import re
import sqlite3
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import psutil

from medvisionllama._optional import require
from medvisionllama.data.formats.header import too_large, unreadable
from medvisionllama.errors import DataError, MedVisionLlamaError

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_SLICES = {".dcm", ".ima"}
_MAGIC = b"DICM"
_DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = "1.2.840.10008.1.2.1.99"
_HARMLESS = 1 << 20
"""Deflate makes at most 1032 bytes of one, so of so many a gigabyte."""
# What their voxels hold is measured: Hounsfield units, activity. How they are shown changes nothing in it.
_MEASURED = {"CT", "PT"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Modalities of files that describe a scan instead of being one, among them doses, which have rows and columns.
_NO_SCANS = {
    "SEG",
    "RTSTRUCT",
    "RTPLAN",
    "RTDOSE",
    "RTRECORD",
    "RTIMAGE",
    "PR",
    "SR",
    "KO",
    "DOC",
    "REG",
    "FID",
}
# By these the images of one place usually differ when a series holds several volumes.
MARKS = (
    "EchoTime", "EchoNumbers", "InversionTime", "TemporalPositionIdentifier", "TriggerTime", "DiffusionBValue",
    "NominalPercentageOfCardiacPhase", "AcquisitionNumber", "ImageType", "AcquisitionTime", "ContentTime",
)  # fmt: skip
_TAGS = (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality",
    "SeriesDescription", "SeriesNumber", "InstanceNumber", "PatientName", "PatientID", "PatientBirthDate", "NumberOfFrames",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", *MARKS,
)  # fmt: skip


_WORDS = re.compile(r"[\W_]+")
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae"})
_NO_ACCENTS = str.maketrans({"ł": "l", "đ": "d", "ı": "i", "ð": "d", "þ": "th", "œ": "oe"})
"""Letters that are no letter with an accent to Unicode."""
_BROKEN = (
    OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError, RuntimeError,
    ArithmeticError, struct.error, zlib.error, sqlite3.Error,
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One image of a series. What its file does not say is None."""

    file: Path
    frame: int = 0
    """Which frame of a multi-frame file, from 0."""
    uid: str = ""
    number: int | None = None
    size: tuple[int, int] = (0, 0)
    """Columns and rows."""
    position: tuple[float, ...] | None = None
    """Centre of the first pixel, in millimetres to the left, back and head (LPS)."""
    orientation: tuple[float, ...] | None = None
    """Direction along a row, then along a column."""
    spacing: tuple[float, ...] | None = None
    """Millimetres between rows, then between columns."""
    slope: float = 1.0
    intercept: float = 0.0
    inverted: bool = False
    """MONOCHROME1: low values are shown bright; False where values are measures, as Hounsfield units are."""
    colour: bool = False
    table: bool = False
    """Stored values stand for others in a look-up table."""
    bits: int = 0
    signed: bool = False
    marks: tuple[str, ...] = ()
    fault: str = ""
    """Why its file makes no volume: said when the series' turn comes, since a study may hold others."""


@dataclass(frozen=True)
class FileHeader:
    """One file of images."""

    series_uid: str
    study_uid: str
    description: str
    modality: str
    number: int | None
    slices: tuple[Slice, ...]

    @property
    def file(self) -> Path:
        return self.slices[0].file


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings from terminal and logs: they quote values, which may be the patient's.

    Of several threads the first to come silences and the last to go lets speak again.
    """
    global _num_quiet
    with _QUIET:
        _num_quiet += 1
        if _num_quiet == 1:
            _loud.enter_context(_silenced())
    try:
        yield
    finally:
        with _QUIET:
            _num_quiet -= 1
            if not _num_quiet:
                _loud.close()


_QUIET, _loud, _num_quiet = Lock(), ExitStack(), 0


@contextmanager
def _silenced() -> Iterator[None]:
    logger = logging.getLogger("pydicom")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def broken() -> tuple[type[Exception], ...]:
    """What pydicom, highdicom and their decoders raise on bytes that are not what they should be."""
    errors = require("pydicom.errors", extra="dicom")
    return (*_BROKEN, errors.BytesLengthException, errors.InvalidDicomError)


def damaged(path: Path, error: Exception) -> DataError:
    """The error of a file that a library could not read."""
    return unreadable(path, RuntimeError(reason_of(error)))


def reason_of(error: Exception) -> str:
    """What a library says, in one line and without the values that it quotes."""
    text = re.sub(r"'[^']*'?|\"[^\"]*\"?", "...", " ".join(str(error).split()))
    return text[:120] or type(error).__name__


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read quietly; what a library raises on damaged bytes becomes one line."""
    try:
        with quiet():
            yield
    except MedVisionLlamaError:
        raise
    except MemoryError:
        raise too_large(path) from None
    except broken() as error:
        raise damaged(path, error) from None


def has_preamble(path: Path) -> bool:
    """True if a file starts with DICOM's preamble, behind which it says how it is encoded."""
    return _head(path)[128:] == _MAGIC


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(132)


def is_dicom(path: Path) -> bool:
    """True if a file starts as DICOM does, with its preamble or, as old files do, without."""
    head = _head(path)
    return head[128:] == _MAGIC or (
        head[:2] == b"\x08\x00" and head[2:4] in {b"\x00\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00"}
    )


def check_named_as_slice(path: Path) -> None:
    """Raise DataError if a file is called what slices are, and holds none: a copy that was stopped leaves such."""
    if path.suffix.lower() in _SLICES and not is_dicom(path):
        reason = "it does not begin as DICOM does" if path.stat().st_size else "it is empty"
        raise damaged(path, ValueError(reason))


def read_dataset(path: Path, tags: Sequence[str] | None = None) -> Any:
    """A file's elements before its pixels, or only those named.

    Raises:
        DataError: the file is damaged, ends within them, or does not fit into memory.
    """
    pydicom = require("pydicom", extra="dicom")
    with reading(path):
        _check_deflated(path)
        return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags and list(tags))


def _check_deflated(path: Path) -> None:
    """Raise DataError for a deflated file, which pydicom unpacks whole, of more than this machine holds."""
    if path.stat().st_size <= _HARMLESS or not has_preamble(path):
        return
    meta = require("pydicom.filereader", extra="dicom").read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DEFLATED:
        return
    with path.open("rb") as file:
        # Behind the element that says how long the others of the head are.
        file.seek(144 + int(meta.FileMetaInformationGroupLength))
        unpacker, left = zlib.decompressobj(-zlib.MAX_WBITS), psutil.virtual_memory().total
        while piece := file.read(1 << 16):
            left -= len(unpacker.decompress(piece))
            if left < 0:
                raise too_large(path)


def read_file_header(path: Path) -> FileHeader | None:
    """Series and slices of a file; None if it is no scan: not DICOM, a report, a mask, a localiser.

    Raises:
        DataError: it is a scan, but damaged or truncated.
    """
    if not is_dicom(path):
        return None
    dataset = read_dataset(path, _TAGS)
    with reading(path):
        return _header(path, dataset)


def is_mask(path: Path) -> bool:
    """True if a file is DICOM-SEG."""
    if not path.is_file() or not is_dicom(path):
        return False
    dataset = read_dataset(path, ("SOPClassUID",))
    with reading(path):
        return str(dataset.get("SOPClassUID")) in SEGMENTATIONS


def _header(path: Path, dataset: Any) -> FileHeader | None:
    meta = getattr(dataset, "file_meta", None) or {}
    kind = str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    if kind == _DIRECTORY or kind in SEGMENTATIONS or dataset.get("Modality") in _NO_SCANS:
        return None
    if "LOCALIZER" in (dataset.get("ImageType") or []):
        return None
    if kind.startswith(_SECONDARY_CAPTURE) and "ImagePositionPatient" not in dataset and not _groups(dataset):
        return None  # a screenshot, such as a dose report
    if not kind or "SeriesInstanceUID" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        uid = require("pydicom.uid", extra="dicom").UID(kind)
        if kind and not uid.name.endswith("Image Storage"):
            return None
        raise DataError(
            f"{path} is damaged or truncated (its header ends early); copy it again from its source"
        )
    return FileHeader(
        series_uid=str(dataset.SeriesInstanceUID),
        study_uid=str(dataset.get("StudyInstanceUID", "")),
        description=_without_patient(dataset),
        modality=str(dataset.get("Modality") or ""),
        number=_whole(dataset.get("SeriesNumber")),
        slices=tuple(_slices(path, dataset)),
    )


def _groups(dataset: Any) -> Sequence[Any]:
    return dataset.get("PerFrameFunctionalGroupsSequence") or ()


def _slices(path: Path, dataset: Any) -> Iterator[Slice]:
    common = {
        "file": path,
        "uid": str(dataset.get("SOPInstanceUID", "")),
        "number": _whole(dataset.get("InstanceNumber")),
        "size": (int(dataset.Columns), int(dataset.Rows)),
        "inverted": dataset.get("PhotometricInterpretation") == "MONOCHROME1"
        and dataset.get("Modality") not in _MEASURED,
        "colour": dataset.get("SamplesPerPixel", 1) != 1
        or dataset.get("PhotometricInterpretation", "MONOCHROME2") not in {"MONOCHROME1", "MONOCHROME2"},
        "table": "ModalityLUTSequence" in dataset,
        "bits": int(dataset.get("BitsStored") or 0),
        "signed": dataset.get("PixelRepresentation", 0) == 1,
        "marks": tuple(str(dataset.get(name, "")) for name in MARKS),
    }
    groups = _groups(dataset)
    num_frames = _whole(dataset.get("NumberOfFrames")) or 1
    if not groups and num_frames == 1:
        yield _slice(common, 0, dataset, dataset, dataset, dataset)
        return
    if len(groups) != num_frames:
        # As nuclear medicine and cine have it.
        fault = f"{path} holds {num_frames} frames but says the place of {len(groups)}; convert it to enhanced multi-frame or to one file per slice"
        yield replace(_slice(common, 0, {}, {}, {}, {}), fault=fault)
        return
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    for frame, own in enumerate(groups):

        def group(name: str, own: Any = own) -> Any:
            return (own.get(name) or shared.get(name) or [{}])[0]

        yield _slice(
            common,
            frame,
            group("PlanePositionSequence"),
            group("PlaneOrientationSequence"),
            group("PixelMeasuresSequence"),
            # Secondary captures have no such group; their one rescaling stands at the top.
            group("PixelValueTransformationSequence") or dataset,
        )


def _slice(common: dict[str, Any], frame: int, place: Any, plane: Any, measures: Any, values: Any) -> Slice:
    slope = values.get("RescaleSlope")
    return Slice(
        frame=frame,
        position=_numbers(place.get("ImagePositionPatient"), 3),
        orientation=_numbers(plane.get("ImageOrientationPatient"), 6),
        spacing=_numbers(measures.get("PixelSpacing"), 2),
        slope=1.0 if slope is None else float(slope),
        intercept=float(values.get("RescaleIntercept") or 0),
        **common,
    )


def _numbers(values: Any, count: int) -> tuple[float, ...] | None:
    if values is None or isinstance(values, str) or not hasattr(values, "__len__") or len(values) != count:
        return None
    return tuple(float(value) for value in values)


def _whole(value: Any) -> int | None:
    return None if value in (None, "") else int(value)


def _without_patient(dataset: Any) -> str:
    """The series' description, or nothing if someone typed the patient into it."""
    description = " ".join(str(dataset.get("SeriesDescription") or "").split())
    number = str(dataset.get("PatientID") or "")
    born = str(dataset.get("PatientBirthDate") or "")
    # What has no digit in a number, as MRN, is nobody's.
    parts = [part for part in _WORDS.split(number) if re.search(r"\d", part)]
    words = [*_WORDS.split(str(dataset.get("PatientName") or "")), number, *parts, born]
    texts = _spellings(description)
    told = any(_tells(word, text) for each in words for word in _spellings(each) for text in texts)
    return "" if told else description


def _spellings(text: str) -> set[str]:
    """Small letters without accents, in both ways that they are left out: Müller is Muller and Mueller."""
    whole = unicodedata.normalize("NFC", text).casefold()
    ways = (whole, whole.translate(_UMLAUTS))
    return {
        "".join(
            letter for letter in unicodedata.normalize("NFKD", way) if not unicodedata.combining(letter)
        ).translate(_NO_ACCENTS)
        for way in ways
    }


def _tells(word: str, text: str) -> bool:
    """Whether a word of a patient's name or number stands in a text."""
    if len(word) == 2 and word.isascii():
        # Two letters stand within many words ("Li" in "liver"), and two digits are a number like others.
        return word.isalpha() and word in re.split(r"[\W_]+", text)
    # A single letter tells nothing; in other scripts one character may be a whole name.
    return (len(word) > 2 or not word.isascii()) and word in text
