"""How far probabilities can be believed: expected calibration error, Brier score and the table behind them.

Of the likeliest class, probability is compared with how often it is right, in 15 bins of equal width (Guo et al.,
ICML 2017, arXiv 1706.04599). Brier's score (1950) is the squared error over all classes: 0 is perfect, 2 as wrong
as can be. Both are usual for segmentation (Mehrtash et al., IEEE TMI 2020).

Counted are the voxels whose true or likeliest class is foreground; this is our choice. Nearly all other voxels are
background that no network doubts, and the more of it a scan shows, the better any network would look. The price:
background that was rightly found is not there to balance foreground that was missed, so the numbers are mostly
larger than over whole scans, and may be compared only with others over the same voxels.

Sums are kept, never voxels, so that scans can be added one by one. All voxels weigh alike: large scans weigh more.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

NUM_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Sums over voxels, by bin of the likeliest class's probability."""

    count: np.ndarray
    confidence: np.ndarray
    """Sum of the likeliest class's probability."""
    correct: np.ndarray
    """Voxels whose likeliest class is the true one."""
    squared_error: float
    """Sum of the squared errors over all classes."""

    @classmethod
    def empty(cls, num_bins: int = NUM_BINS) -> Self:
        """No voxel yet."""
        return cls(np.zeros(num_bins, np.int64), np.zeros(num_bins), np.zeros(num_bins, np.int64), 0.0)

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(
            self.count + other.count,
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.squared_error + other.squared_error,
        )

    @property
    def num_voxels(self) -> int:
        return int(self.count.sum())


def tally(probabilities: np.ndarray, truth: np.ndarray, *, num_bins: int = NUM_BINS) -> Reliability:
    """Sum up the voxels whose true or likeliest class is foreground.

    Args:
        probabilities: `[k, ...]`, background first.
        truth: `[...]`, index of the true class, 0 for background.
    """
    likeliest = probabilities.argmax(axis=0)
    counted = (truth > 0) | (likeliest > 0)
    shares = probabilities[:, counted].astype(np.float64)
    true, top = truth[counted], shares.max(axis=0)
    # A bin holds its upper edge, as in Guo et al.
    bins = np.clip(np.ceil(top * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    correct = likeliest[counted] == true
    of_truth = np.take_along_axis(shares, true[None].astype(np.int64), axis=0)[0]
    return Reliability(
        np.bincount(bins, minlength=num_bins),
        np.bincount(bins, weights=top, minlength=num_bins),
        np.bincount(bins[correct], minlength=num_bins),
        # (1 - p)^2 for the true class and p^2 for the others, without an array of ones and zeros.
        float((shares**2).sum() + (1 - 2 * of_truth).sum()),
    )


def expected_calibration_error(sums: Reliability) -> float:
    """Mean distance of confidence and accuracy over bins, weighted by their voxels; NaN without any voxel."""
    if not sums.num_voxels:
        return float("nan")
    return float(np.abs(sums.confidence - sums.correct).sum() / sums.num_voxels)


def brier_score(sums: Reliability) -> float:
    """Mean squared error over all classes, from 0 to 2; NaN without any voxel."""
    return sums.squared_error / sums.num_voxels if sums.num_voxels else float("nan")


def reliability_table(sums: Reliability) -> list[dict[str, Any]]:
    """A row per bin: its edges, voxels, mean confidence and accuracy; None for the last two where it is empty."""
    num_bins = len(sums.count)
    return [
        {
            "above": number / num_bins,
            "up_to": (number + 1) / num_bins,
            "count": int(count),
            "confidence": float(sums.confidence[number] / count) if count else None,
            "accuracy": float(sums.correct[number] / count) if count else None,
        }
        for number, count in enumerate(sums.count)
    ]
