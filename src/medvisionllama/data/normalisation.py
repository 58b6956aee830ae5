"""Intensities on a common scale: each scan by its own mean and deviation, CT by numbers of the training cases."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medvisionllama.config.schema import parse_window
from medvisionllama.data.planning import Normalisation
from medvisionllama.errors import DataError
from medvisionllama.types import ImageArray

if TYPE_CHECKING:
    from medvisionllama.data.cache import CachedCase


def fit_normalisation(cases: Sequence["CachedCase"], rules: Sequence[str]) -> tuple[Normalisation, ...]:
    """Choose the normalisation of each channel; `cases` are those that train.

    `dataset`, the rule for CT, clips to the 0.5 and 99.5 percentiles of foreground voxels and scales by their mean
    and deviation (nnU-Net's rule). A window is scaled as if its values were evenly spread.

    Args:
        rules: `Plan.channel_rules`.

    Raises:
        DataError: no case has a labelled voxel, and a channel is CT.
    """
    result = []
    for index, rule in enumerate(rules):
        if rule == "image":
            result.append(Normalisation(kind="image"))
            continue
        if rule != "dataset":
            low, high = parse_window(rule)
            spread = (high - low) / math.sqrt(12)
            result.append(
                Normalisation(kind="dataset", low=low, high=high, mean=(low + high) / 2, std=spread)
            )
            continue
        samples = np.concatenate(
            [np.asarray(case.facts["foreground_samples"][index], dtype=np.float64) for case in cases]
        )
        if samples.size == 0:
            raise DataError(
                f"no labelled voxel in the {len(cases)} training cases, so CT intensities cannot be scaled; check the labels, or give a window: --set data.normalisation=-160:240"
            )
        low, high = (float(value) for value in np.percentile(samples, [0.5, 99.5]))
        clipped = samples.clip(low, high)
        mean = float(clipped.mean())
        std = _divisor(mean, float(clipped.std()))
        result.append(Normalisation(kind="dataset", low=low, high=high, mean=mean, std=std))
    return tuple(result)


def normalise(
    image: ImageArray, rules: Sequence[Normalisation], moments: Sequence[Sequence[float]]
) -> ImageArray:
    """Bring `[channel, x, y, z]` to a common scale; `moments` are the scan's own, by channel."""
    result = np.empty(image.shape, dtype=np.float32)
    for channel, (rule, (mean, std)) in enumerate(zip(rules, moments, strict=True)):
        if rule.kind == "image":
            result[channel] = (image[channel] - np.float32(mean)) / np.float32(std)
        else:
            result[channel] = (image[channel].clip(rule.low, rule.high) - np.float32(rule.mean)) / np.float32(
                rule.std
            )
    return result


def image_moments(image: ImageArray) -> list[tuple[float, float]]:
    """Mean and deviation of each channel's non-zero voxels: zero is padding or stripped skull in MR."""
    moments = []
    for channel in image:
        mean, std = _nonzero_moments(channel)
        moments.append((mean, _divisor(mean, std)))
    return moments


def _divisor(mean: float, std: float) -> float:
    """The deviation, or 1 for values that are all the same to rounding, whatever their unit: m²/s are 1e-9."""
    return std if std > 1e-8 * abs(mean) else 1.0


def _nonzero_moments(channel: np.ndarray) -> tuple[float, float]:
    """Mean and deviation, plane by plane: those of a whole scan at once would take three times its memory."""
    number = int(np.count_nonzero(channel))
    if number == 0:
        return 0.0, 0.0
    # Zeros add nothing to a sum; to the squares they do, so they are left out there.
    mean = sum(float(plane.sum(dtype=np.float64)) for plane in channel) / number
    squares = (np.square(np.subtract(plane[plane != 0], mean, dtype=np.float64)).sum() for plane in channel)
    return mean, math.sqrt(sum(map(float, squares)) / number)
