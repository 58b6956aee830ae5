"""Is a label mirrored against its own image? The voxels tell where anatomy is asymmetric.

Along a label's edge the image changes more than elsewhere. So the mean step of the image across the edge is
compared with the step across the mirrored edge. In a set where the edge as it is drawn nearly always wins, a case
in which the mirrored one wins clearly stands out. Where neither wins, as with round or carelessly drawn labels, no
rule is possible, and nothing is said.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medvisionllama.data.check.facts import CaseFacts, ChannelFacts
from medvisionllama.data.check.findings import Finding

# Axes in RAS that are turned about. Taking LPS for RAS mirrors two at once.
_FLIPS = {
    "left to right": (0,),
    "back to front": (1,),
    "down to up": (2,),
    "left to right and back to front": (0, 1),
}
_SAMPLES = 20_000
_MIN_EDGES = 50
_MIN_CASES = 10
# The logarithm of the ratio of both steps in the middle of the cases; below, the anatomy is too symmetric.
_MIN_MEDIAN = 0.1
_MIN_SHARE = 0.9
_DEVIATIONS = 4.0
# Between the median and the tenth percentile of a normal distribution.
_TENTH = 1.2816


def mirror_scores(
    arrays: Sequence[np.ndarray], channels: Sequence[ChannelFacts], label: np.ndarray
) -> tuple[float, ...]:
    """Logarithm of the step across the label's edge over that across the mirrored edge, for each way to mirror.

    Args:
        arrays: channels `[x, y, z]` in RAS.
        label: `[x, y, z]` on the same grid, with whole values.

    Returns:
        The mean over the channels; empty where there is no edge or no channel that changes there.
    """
    pairs = _edge(label)
    if pairs is None:
        return ()
    scores = []
    for array, channel in zip(arrays, channels, strict=True):
        if array.shape != label.shape or channel.num_bad or channel.constant:
            continue
        drawn = _step(array, pairs, channel)
        mirrored = [_step(array, _flipped(pairs, label.shape, axes), channel) for axes in _FLIPS.values()]
        if drawn > 0 and min(mirrored) > 0:
            scores.append(np.log(drawn / np.array(mirrored)))
    return tuple(float(score) for score in np.mean(scores, axis=0)) if scores else ()


def label_mirror_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Labels that fit their image better mirrored, where those of nearly all other cases do not.

    A case counts if nine of ten cases score above zero, and its own score is four deviations below the median, as
    the lower half of the cases spreads, and at least half as far below zero as the median is above.
    """
    scored = [case for case in cases if case.mirror_scores]
    if len(scored) < _MIN_CASES:
        return []
    table = np.array([case.mirror_scores for case in scored])
    middles = np.median(table, axis=0)
    spreads = (middles - np.percentile(table, 10, axis=0)) / _TENTH
    limits = np.minimum(middles - _DEVIATIONS * spreads, -0.5 * middles)
    telling = (middles > _MIN_MEDIAN) & (np.mean(table > 0, axis=0) >= _MIN_SHARE)
    findings = []
    for case, row in zip(scored, table, strict=True):
        found = np.flatnonzero((row < limits) & telling)
        if found.size and case.label is not None:
            words = list(_FLIPS)[found[np.argmin(row[found])]]
            message = f"{case.label.path}: mirrored {words}, the label would fit the edges in its image better, unlike in the other cases; is the label mirrored?"
            findings.append(Finding("label-mirrored", message, (case.case_id,), case.label.path))
    return findings


def _edge(label: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Neighbouring voxels of different classes, as two arrays of places `[pair, axis]`; a sample of them."""
    boxes = ndimage.find_objects((label > 0).view(np.uint8))
    if not boxes:
        return None
    corner = np.array([max(0, part.start - 1) for part in boxes[0]])
    inside = label[tuple(slice(low, part.stop + 1) for low, part in zip(corner, boxes[0], strict=True))]
    rng, first, second = np.random.default_rng(0), [], []
    for axis in range(3):
        size = inside.shape[axis]
        differs = np.take(inside, range(1, size), axis) != np.take(inside, range(size - 1), axis)
        places = np.flatnonzero(differs)
        if places.size > _SAMPLES:
            places = rng.choice(places, _SAMPLES, replace=False)
        low = np.stack(np.unravel_index(places, differs.shape), axis=1) + corner
        first.append(low)
        second.append(low + np.eye(3, dtype=int)[axis])
    pairs = np.concatenate(first), np.concatenate(second)
    return pairs if len(pairs[0]) >= _MIN_EDGES else None


def _flipped(
    pairs: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    first, second = (places.copy() for places in pairs)
    for axis in axes:
        for places in (first, second):
            places[:, axis] = shape[axis] - 1 - places[:, axis]
    return first, second


def _step(array: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], channel: ChannelFacts) -> float:
    """Mean difference of the image between the voxels of each pair, single bright voxels cut off."""
    low, _, high = channel.percentiles
    first, second = (array[tuple(places.T)].astype(np.float64).clip(low, high) for places in pairs)
    return float(np.abs(first - second).mean())
