"""From voxels to facts: pure functions on arrays in RAS."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from medvisionllama.data.check.facts import CaseFacts, ChannelFacts, MaskFacts
from medvisionllama.data.check.mirrors import mirror_scores
from medvisionllama.data.readers import count_fractional
from medvisionllama.types import Triple

_SAMPLES = 50_000
_VOXELS_AT_ONCE = 1 << 22
# A mask has few whole values; a scan has many.
MASK_VALUES = 16
SCAN_VALUES = 64
# An island this small, in a class that is much larger, is a slip of the pen.
SPECK_VOXELS = 3
_SPECK_CLASS_VOXELS = 100
# Of the boxes around all classes together, as a multiple of the scan: classes have places of their own, the values
# of a scan in the place of a label are everywhere.
_MOST_BOXES = 20
_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)


def examine_case(case: CaseFacts, images: Sequence[np.ndarray], label: np.ndarray | None) -> CaseFacts:
    """Add what the voxels say to what the headers say.

    Args:
        images: one array `[channel, x, y, z]` in RAS per file.
        label: `[x, y, z]` in RAS, whatever its values.
    """
    arrays = [channel for image in images for channel in image]
    channels = tuple(examine_channel(array) for array in arrays)
    mask = None if label is None else examine_label(label)
    suspicious = label is not None and mask is not None and _looks_like_mask(arrays, channels, label, mask)
    scores = mirror_scores(arrays, channels, label) if label is not None and mask and mask.countable else ()
    return replace(case, channels=channels, mask=mask, image_is_mask=suspicious, mirror_scores=scores)


def examine_channel(array: np.ndarray) -> ChannelFacts:
    """Describe one channel `[x, y, z]`; percentiles come from a sample of voxels drawn at random."""
    num_bad, first_bad = _count_bad(array)
    flat = array.reshape(-1)
    # Evenly spaced voxels would all lie in one plane where the step is a multiple of the last axis.
    drawn = np.random.default_rng(0).integers(0, flat.size, _SAMPLES) if flat.size > 2 * _SAMPLES else None
    sample = flat if drawn is None else flat[drawn]
    if num_bad:
        finite = flat[np.isfinite(flat)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        sample = sample[np.isfinite(sample)]
    else:
        low, high = float(flat.min()), float(flat.max())
    ordered = np.sort(sample)
    seen = ordered[ordered != 0]
    if seen.size == 0:
        seen = np.zeros(1)
    p01, p50, p99 = (float(seen[round(share * (seen.size - 1))]) for share in (0.01, 0.5, 0.99))
    return ChannelFacts(
        dtype=str(array.dtype),
        low=low,
        high=high,
        percentiles=(p01, p50, p99),
        num_values=int(np.count_nonzero(np.diff(ordered))) + 1 if ordered.size else 0,
        mostly_one_value=_mostly_one(ordered),
        num_bad=num_bad,
        first_bad=first_bad,
        sha256=voxel_hash(array),
    )


def examine_label(array: np.ndarray) -> MaskFacts:
    """Describe a label `[x, y, z]`; classes are counted only where the values are class numbers."""
    num_bad, _ = _count_bad(array)
    finite = array[np.isfinite(array)] if num_bad else array
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    num_fractional, fraction = count_fractional(finite) if array.dtype.kind == "f" else (0, None)
    facts = MaskFacts(
        dtype=str(array.dtype),
        low=low,
        high=high,
        num_values=0,
        num_bad=num_bad,
        num_fractional=num_fractional,
        fraction=fraction,
        voxels={},
        centroids={},
        specks={},
        sha256=voxel_hash(array),
    )
    if not facts.countable:
        return replace(facts, num_values=len(np.unique(finite)))
    # Only known once the values lie in 0..65535: a cast before that would wrap.
    whole = np.rint(array) if array.dtype.kind == "f" else array
    whole = np.ascontiguousarray(whole, np.uint8 if high < 256 else np.uint16)
    counts, boxes, middles = _places(whole, int(whole.max(initial=0)) + 1)
    present = [int(value) for value in np.flatnonzero(counts) if value]
    specks = {}
    volumes = np.prod(boxes[present, :, 1] - boxes[present, :, 0] + 1, axis=1)
    for value in present if volumes.sum() <= _MOST_BOXES * whole.size else ():
        if counts[value] < _SPECK_CLASS_VOXELS:
            continue
        x, y, z = (slice(first, last + 1) for first, last in boxes[value].tolist())
        if number := _count_specks(whole[x, y, z] == value):
            specks[value] = number
    return replace(
        facts,
        num_values=int(np.count_nonzero(counts)),
        voxels={value: int(counts[value]) for value in present},
        centroids={value: _rounded(middles[value]) for value in present},
        specks=specks,
    )


def _places(whole: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels `[k]` of each value below a number, its first and last plane `[k, 3, 2]`, and its middle `[k, 3]` as a
    share of the scan.

    Plane by plane: counting takes a copy of eight bytes a voxel.
    """
    counts = np.zeros(number, np.int64)
    boxes = np.zeros((number, 3, 2), np.int64)
    middles = np.zeros((number, 3))
    for axis, length in enumerate(whole.shape):
        counts[:] = 0
        for place in range(length):
            here = np.bincount(whole.take(place, axis=axis).ravel(), minlength=number)
            boxes[(counts == 0) & (here > 0), axis, 0] = place
            boxes[here > 0, axis, 1] = place
            middles[:, axis] += here * (place + 0.5)
            counts += here
        middles[:, axis] /= np.maximum(counts, 1) * length
    return counts, boxes, middles


def _rounded(middle: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (round(float(share), 5) for share in middle)
    return (x, y, z)


def voxel_hash(array: np.ndarray) -> str:
    """Hash of shape and values as float32, a few slabs at a time so that large scans are not copied whole."""
    digest = hashlib.sha256(str(array.shape).encode())
    step = max(1, _VOXELS_AT_ONCE // max(1, array[0].size))
    with np.errstate(over="ignore"):
        for start in range(0, len(array), step):
            digest.update(np.ascontiguousarray(array[start : start + step], np.float32).tobytes())
    return digest.hexdigest()


def _count_bad(array: np.ndarray) -> tuple[int, Triple | None]:
    """Number and first place of voxels that are no numbers, or too large for float32 as training reads them."""
    if array.dtype.kind != "f":
        return 0, None
    low, high, limit = array.min(), array.max(), np.finfo(np.float32).max
    if np.isfinite(low) and np.isfinite(high) and -limit <= low and high <= limit:
        return 0, None
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(array.astype(np.float32, copy=False))
    x, y, z = (int(index[0]) for index in np.nonzero(bad))
    return int(bad.sum()), (x, y, z)


def _mostly_one(ordered: np.ndarray) -> bool:
    """A run of equal values in the sorted sample that covers 99 % of it."""
    span = int(np.ceil(0.99 * ordered.size))
    return ordered.size > 0 and bool((ordered[span - 1 :] == ordered[: ordered.size - span + 1]).any())


def _count_specks(inside: np.ndarray) -> int:
    labelled, number = ndimage.label(inside, _NEIGHBOURS)
    if number < 2:
        return 0
    flat, sizes = labelled.reshape(-1), np.zeros(number + 1, np.int64)
    for start in range(0, flat.size, _VOXELS_AT_ONCE):
        sizes += np.bincount(flat[start : start + _VOXELS_AT_ONCE], minlength=number + 1)
    return int(np.count_nonzero(sizes[1:] <= SPECK_VOXELS))


def _looks_like_mask(
    arrays: Sequence[np.ndarray], channels: Sequence[ChannelFacts], label: np.ndarray, mask: MaskFacts
) -> bool:
    """A channel holds the label itself, or mask and scan were exchanged."""
    for array, channel in zip(arrays, channels, strict=True):
        if channel.constant or channel.num_bad or channel.num_values > MASK_VALUES:
            continue
        if mask.num_values >= SCAN_VALUES:
            return True
        same = array.shape == label.shape and mask.num_values > 1 and mask.num_bad == 0
        if same and np.array_equal(array != 0, label != 0):
            return True
    return False
