"""From slices to a grid: the one matrix that places a series, or the reason why there is none.

Tolerances: directions of rows and columns agree to 0.001, pixel sizes to 0.1 %, each slice lies within a tenth of
the slice distance of its place on the even grid, and slices are stacked along their normal to 0.1 degree. Within
them the matrix is fitted to the first and last slice and may be sheared by what rounding left.
"""

from collections import Counter

import numpy as np

from medvisionllama.data.formats.dicom_header import MARKS, Slice
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.data.formats.header import Header, make_header
from medvisionllama.data.formats.itk import LPS_TO_RAS
from medvisionllama.errors import DataError

_MAX_TILT_DEGREES = 0.1
MAX_SHARE_OF_STEP = 0.1
# Closer than this, two slices are at one place.
_SAME_PLACE_MM = 1e-3


def grid_of(series: Series) -> Header:
    """Shape and place of a series.

    Raises:
        DataError: its images do not make one regular volume; says which of them and why.
    """
    slices = series.slices
    first = slices[0]
    for piece in slices:
        _check_image(piece)
    _check_alike(slices)
    if len(slices) == 1:
        raise DataError(
            f"{first.file} is the only slice of its series; a scan needs two or more: give the folder with all of them"
        )
    positions = np.array([piece.position for piece in slices])
    along, down = np.array(first.orientation).reshape(2, 3)
    normal = np.cross(along, down)
    heights = positions @ normal
    _check_one_volume(series, heights)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    _check_tilt(series, step, normal)
    _check_gaps(series, positions, heights, step)
    affine = np.eye(4)
    assert first.spacing is not None
    affine[:3, 0] = along * first.spacing[1]
    affine[:3, 1] = down * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return make_header(series.folder, (*first.size, len(slices)), LPS_TO_RAS @ affine)


def _check_image(piece: Slice) -> None:
    if piece.fault:
        raise DataError(piece.fault)
    if piece.colour:
        raise DataError(
            f"{piece.file} is a colour image; allowed: one grey value per pixel, as CT and MR have"
        )
    if piece.table:
        raise DataError(
            f"{piece.file} stores values through a look-up table; allowed: rescale slope and intercept, export it so"
        )
    for name, value in (
        ("ImagePositionPatient", piece.position),
        ("ImageOrientationPatient", piece.orientation),
        ("PixelSpacing", piece.spacing),
    ):
        if value is None or not np.isfinite(value).all():
            raise DataError(
                f"{piece.file} has no usable {name}, so its place is unknown; export the series again from its source"
            )
    along, down = np.array(piece.orientation).reshape(2, 3)
    if not np.allclose([along @ along, down @ down, along @ down], [1, 1, 0], atol=1e-3):
        raise DataError(
            f"{piece.file}: rows and columns of ImageOrientationPatient are not at right angles; export the series again from its source"
        )
    if min(piece.spacing or (0,)) <= 0 or min(piece.size) < 1:
        raise DataError(
            f"{piece.file}: PixelSpacing, Rows and Columns must be above zero; export the series again from its source"
        )
    if piece.bits > 64:
        raise DataError(
            f"{piece.file}: BitsStored {piece.bits} is not possible; allowed: up to 64, export the series again"
        )
    if not np.isfinite([piece.slope, piece.intercept]).all() or piece.slope == 0:
        raise DataError(
            f"{piece.file}: RescaleSlope {piece.slope:g} and RescaleIntercept {piece.intercept:g} give no values; export the series again from its source"
        )


def _check_alike(slices: tuple[Slice, ...]) -> None:
    first = slices[0]
    for piece in slices:
        if piece.size != first.size:
            what = f"is {piece.size[0]}x{piece.size[1]} pixels, {first.file.name} is {first.size[0]}x{first.size[1]}"
        elif not np.allclose(piece.orientation or 0, first.orientation or 0, atol=1e-3):
            what = f"lies in another plane than {first.file.name}"
        elif not np.allclose(piece.spacing or 0, first.spacing or 0, rtol=1e-3, atol=0):
            mm = [" by ".join(f"{value:g}" for value in other.spacing or ()) for other in (piece, first)]
            what = f"has pixels of {mm[0]} mm, {first.file.name} of {mm[1]} mm"
        else:
            continue
        raise DataError(
            f"{piece.file} {what}, in one series; put the slices that belong together into a folder of their own"
        )


def _check_one_volume(series: Series, heights: np.ndarray) -> None:
    """Refuse two images at one place: several echoes, phases or time points, or a slice that was sent twice."""
    uids = Counter((piece.uid, piece.frame) for piece in series.slices)
    places = np.concatenate([[0], np.cumsum(np.diff(heights) > _SAME_PLACE_MM)])
    counts = np.bincount(places)
    if counts.max() == 1:
        if len(uids) < len(series.slices):
            (uid, _), _ = uids.most_common(1)[0]
            twins = [piece.file for piece in series.slices if piece.uid == uid]
            raise DataError(
                f"{twins[0]} and {twins[1]} are two images with the same SOPInstanceUID; remove the one that does not belong to the series"
            )
        return
    if len(set(counts.tolist())) == 1 and len(counts) > 1:
        here = [piece for piece, place in zip(series.slices, places, strict=True) if place == 0]
        _check_one_export(series, here)
        differ = [name for index, name in enumerate(MARKS) if len({piece.marks[index] for piece in here}) > 1]
        by = f", which differ in {differ[0]}" if differ else ""
        way = (
            "put the files of one of them into a folder of their own"
            if len(series.files) > 1
            else f"split the multi-frame file {series.files[0].name} first, so that each is a series of its own"
        )
        raise DataError(f"{series} holds {counts[0]} volumes (echoes, phases or time points){by}; {way}")
    index = int(np.flatnonzero(np.diff(places) == 0)[0])
    one, two = series.slices[index : index + 2]
    raise DataError(
        f"{_where(one)} and {_where(two)} are two different images of one place, among {len(counts)} places of {series}; keep one of them"
    )


def _check_one_export(series: Series, here: list[Slice]) -> None:
    """Refuse one image several times at one place: the series was exported again, with other headers of files."""
    (uid, frame), times = Counter((piece.uid, piece.frame) for piece in here).most_common(1)[0]
    if uid and times > 1:
        one, two = [piece.file for piece in here if (piece.uid, piece.frame) == (uid, frame)][:2]
        often = "twice" if times == 2 else f"{times} times"
        raise DataError(
            f"{series} holds each image {often}, with one SOPInstanceUID ({one}, {two}); remove all copies but one"
        )


def _check_tilt(series: Series, step: np.ndarray, normal: np.ndarray) -> None:
    cosine = float(step @ normal) / float(np.linalg.norm(step) * np.linalg.norm(normal))
    degrees = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if degrees > _MAX_TILT_DEGREES:
        raise DataError(
            f"slices of {series} are stacked {degrees:.1f} degrees off their normal (gantry tilt); resample the scan to a grid with right angles first"
        )


def _check_gaps(series: Series, positions: np.ndarray, heights: np.ndarray, step: np.ndarray) -> None:
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    multiples = np.rint(gaps / usual)
    holes = np.flatnonzero(
        (multiples > 1) & (np.abs(gaps - multiples * usual) <= 2 * MAX_SHARE_OF_STEP * usual)
    )
    if len(holes):
        index = int(holes[0])
        before, after = series.slices[index : index + 2]
        low, high = _missing(index, before, after, int(multiples[index]))
        which = f"slice {low} of {series} is" if low == high else f"slices {low}-{high} of {series} are"
        more = f", the first of {len(holes)} gaps" if len(holes) > 1 else ""
        raise DataError(
            f"{which} missing: {usual:.4g} mm apart, a gap of {gaps[index]:.4g} mm after {_where(before)}{more}; export the whole series again"
        )
    even = positions[0] + np.arange(len(positions))[:, None] * step
    misplaced = np.linalg.norm(positions - even, axis=1)
    if misplaced.max() > MAX_SHARE_OF_STEP * float(np.linalg.norm(step)):
        index = int(misplaced.argmax())
        raise DataError(
            f"slices of {series} are unevenly spaced: {gaps.min():.4g} to {gaps.max():.4g} mm apart, {_where(series.slices[index])} is {misplaced[index]:.2g} mm from its place; resample the scan to even slices first"
        )


def _missing(index: int, before: Slice, after: Slice, multiple: int) -> tuple[int, int]:
    """First and last missing slice: by instance numbers if they leave the same gap, else counted from the end."""
    if (
        before.number is not None
        and after.number is not None
        and abs(after.number - before.number) == multiple
    ):
        low = min(before.number, after.number) + 1
    else:
        low = index + 2
    return low, low + multiple - 2


def _where(piece: Slice) -> str:
    return f"{piece.file.name} frame {piece.frame + 1}" if piece.frame else piece.file.name
