"""Masks out as DICOM-SEG, by highdicom: one binary segment for each class, on the slices of the scan itself."""

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from medvisionllama import __version__
from medvisionllama._files import atomic_path
from medvisionllama._optional import require
from medvisionllama.colours import colour_of
from medvisionllama.data.formats.dicom_grid import grid_of
from medvisionllama.data.formats.dicom_header import (
    Slice,
    broken,
    quiet,
    read_dataset,
    reading,
    reason_of,
)
from medvisionllama.data.formats.dicom_labels import short_labels
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.errors import DataError
from medvisionllama.inference.anatomy import anatomy_of
from medvisionllama.types import LabelArray

PRODUCT = "medvisionllama"
# The standard wants these elements, empty if unknown; de-identified files often lack them.
_MAY_BE_EMPTY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                 "StudyDate", "StudyTime", "ReferringPhysicianName")  # fmt: skip


def write_seg(path: Path, mask: LabelArray, series: Series, classes: dict[int, str]) -> None:
    """Write `[x, y, z]` as a DICOM-SEG file of the study that the scan belongs to.

    Segments are numbered from 1 in the order of `classes`; classes without a voxel are left out. If all are empty,
    the file has one segment, the first class, with an empty frame for every slice: looked for and not found.

    Args:
        path: ends in .dcm.
        mask: on the grid of the series, as `formats.dicom` orders it.
        classes: name of each value; 0 is background.

    Raises:
        DataError: another grid than the scan's, values without a name, a scan that cannot be referred to, or too
            little memory.
    """
    if path.suffix.lower() != ".dcm":
        raise DataError(f"{path}: a DICOM mask is written as .dcm; choose such a name")
    grid = grid_of(series)
    if mask.shape != grid.shape:
        raise DataError(
            f"{path}: the mask has shape {mask.shape}, {series} has {grid.shape}; give a mask on its grid"
        )
    named = {value: name for value, name in classes.items() if value != 0}
    found = _values(mask)
    unknown = sorted(found - set(named))
    if unknown or not named:
        raise DataError(f"{path}: the mask has values without a class name ({unknown}); name every class")
    values = [value for value in named if value in found] or [next(iter(named))]
    labels = short_labels(named)
    palette = {value: colour_of(index) for index, value in enumerate(named)}
    descriptions = [
        _description(number, labels[value], palette[value]) for number, value in enumerate(values, start=1)
    ]
    sources, frames = _sources(series, _numbered(mask, values), grid.spacing_mm[2])
    try:
        with quiet():
            seg = _segmentation(
                sources,
                frames,
                descriptions,
                omit_empty_frames=bool(found),
                series_number=max(0, series.number or 0) + 1000,
                series_description=f"Segmentation of {series.description or series.modality}"[:64],
            )
            with atomic_path(path) as temporary:
                seg.save_as(temporary)
    except OSError:
        raise  # the disk, not the scan
    except MemoryError:
        raise DataError(
            f"{path}: a DICOM mask of shape {mask.shape} does not fit into memory; write the mask as NIfTI, or use a machine with more"
        ) from None
    except broken() as error:
        raise DataError(
            f"{series} has values that a DICOM mask cannot take over ({reason_of(error)}); write the mask as NIfTI"
        ) from None


# Slice by slice, since numpy takes a whole mask as indices in eight times its memory.


def _values(mask: LabelArray) -> set[int]:
    """The values of a mask other than 0."""
    if mask.min() < 0:
        return {int(mask.min())}
    found: set[int] = set()
    for z in range(mask.shape[2]):
        found.update(np.flatnonzero(np.bincount(mask[:, :, z].ravel())).tolist())
    return found - {0}


def _numbered(mask: LabelArray, values: Sequence[int]) -> np.ndarray:
    """Segment numbers as frames `[slice, row, column]`."""
    table = np.zeros(max(values) + 1, np.uint8 if len(values) < 256 else np.uint16)
    table[list(values)] = np.arange(1, len(values) + 1)
    return np.stack([table[mask[:, :, z].T] for z in range(mask.shape[2])])


def _sources(series: Series, frames: np.ndarray, distance_mm: float) -> tuple[list[Any], np.ndarray]:
    """Headers of the scan's files, and the mask in the order of their frames.

    Args:
        distance_mm: of the slices on the scan's grid.
    """
    datasets = [read_dataset(file) for file in series.files]
    # By how they are made: each may hold a single frame.
    multiframe = any(dataset.get("PerFrameFunctionalGroupsSequence") for dataset in datasets)
    if multiframe and len(series.files) > 1:
        raise DataError(
            f"{series} is spread over {len(series.files)} multi-frame files, which a DICOM mask cannot refer to; write the mask as NIfTI"
        )
    for file, dataset in zip(series.files, datasets, strict=True):
        with reading(file):
            _complete(file, dataset)
            _share_grid(dataset, series.slices[0], distance_mm)
    if not multiframe:
        return datasets, frames
    order = np.empty_like(frames)
    for place, piece in enumerate(series.slices):
        order[piece.frame] = frames[place]
    return datasets, order


def _complete(file: Path, dataset: Any) -> None:
    """Check what a mask must repeat of its scan, and add what may be empty."""
    if not dataset.get("FrameOfReferenceUID") or not dataset.get("StudyInstanceUID"):
        raise DataError(
            f"{file} has no FrameOfReferenceUID or StudyInstanceUID, so a DICOM mask cannot refer to it; write the mask as NIfTI"
        )
    for keyword in _MAY_BE_EMPTY:
        if keyword not in dataset or not _sound(keyword, str(dataset.get(keyword) or "")):
            setattr(dataset, keyword, "")
    if dataset.PatientSex not in {"M", "F", "O"}:
        dataset.PatientSex = ""  # highdicom takes the standard's values only


def _share_grid(dataset: Any, first: Slice, distance_mm: float) -> None:
    """Put the plane, pixels and slice distance of a scan's grid into its header, which a mask repeats.

    highdicom wants one plane for all slices, the same to the last digit; for frames, in the group that they share.
    """
    orientation = _at_right_angles(first)
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        dataset.ImageOrientationPatient = orientation
        # Some scanners write the gap between slices, or nothing; the mask is read by it.
        dataset.SpacingBetweenSlices = distance_mm
        # May be empty in a scan, not in a mask; the distance of the slices is what is known of it.
        dataset.SliceThickness = dataset.get("SliceThickness") or distance_mm
        return
    highdicom = require("highdicom", extra="dicom")
    if not dataset.get("SharedFunctionalGroupsSequence"):
        dataset.SharedFunctionalGroupsSequence = [require("pydicom", extra="dicom").Dataset()]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    measures = (groups[first.frame].get("PixelMeasuresSequence") or shared.PixelMeasuresSequence)[0]
    shared.PlaneOrientationSequence = highdicom.PlaneOrientationSequence("PATIENT", orientation)
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence(
        first.spacing, measures.get("SliceThickness") or distance_mm, distance_mm
    )


def _at_right_angles(first: Slice) -> list[float]:
    """Directions of rows and columns, of length 1 and at right angles: a scan of few decimals may miss that by more
    than a mask may."""
    assert first.orientation is not None, "checked by grid_of"
    along, down = np.array(first.orientation, np.float64).reshape(2, 3)
    if np.allclose([along @ along, down @ down, along @ down], [1, 1, 0], atol=1e-5):
        return list(first.orientation)
    along = along / np.linalg.norm(along)
    down = down - (down @ along) * along
    valuerep = require("pydicom.valuerep", extra="dicom")
    numbers = [*along, *(down / np.linalg.norm(down))]
    return [valuerep.DSfloat(float(number), auto_format=True) for number in numbers]


def _sound(keyword: str, text: str) -> bool:
    """Whether a date or time can be read; others are taken as they are."""
    if not text or keyword[-4:] not in {"Date", "Time"}:
        return True
    if keyword.endswith("Time"):
        hour, minute, second = r"([01]\d|2[0-3])", r"[0-5]\d", r"([0-5]\d|60)"
        return bool(re.fullmatch(rf"{hour}({minute}({second}(\.\d{{1,6}})?)?)?", text))
    with suppress(ValueError):
        datetime.strptime(text, "%Y%m%d")  # only whether it is one
        return bool(re.fullmatch(r"\d{8}", text))
    return False


def _description(number: int, label: str, colour: str) -> Any:
    seg = require("highdicom.seg", extra="dicom")
    highdicom = require("highdicom", extra="dicom")
    coded = require("highdicom.sr", extra="dicom").CodedConcept
    codes = require("pydicom.sr.codedict", extra="dicom").codes
    anatomy = anatomy_of(label)
    description = seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=anatomy.category,
        segmented_property_type=anatomy.kind,
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=PRODUCT, family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
        tracking_uid=highdicom.UID(),
        tracking_id=label,
        display_color=highdicom.color.CIELabColor.from_string(colour),
    )
    if anatomy.modifier is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [coded.from_code(anatomy.modifier)]
    return description


def _segmentation(sources: list[Any], frames: np.ndarray, descriptions: list[Any], **options: Any) -> Any:
    highdicom = require("highdicom", extra="dicom")
    seg = require("highdicom.seg", extra="dicom")
    result = seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type=seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=PRODUCT,
        manufacturer_model_name=PRODUCT,
        software_versions=__version__,
        # Required, and a program has none.
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description="Made by a research model",
        # Names of classes may be in any script.
        specific_character_set="ISO_IR 192",
        **options,
    )
    # Required to be there, and nobody drew it by hand.
    result.ContentCreatorName = ""
    _decode(result)
    return result


def _decode(dataset: Any) -> None:
    """Read every text, or those in the scan's sequences would be written as bytes of its own character set."""
    for tag in list(dataset.keys()):
        # What cannot be read stays as it is.
        with suppress(*broken()):
            element = dataset[tag]
            for item in element.value if element.VR == "SQ" else ():
                _decode(item)
