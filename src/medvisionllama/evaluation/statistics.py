"""Statistics whose unit is the patient."""

from collections.abc import Sequence

import numpy as np


def patient_means(values: Sequence[float], patients: Sequence[str]) -> np.ndarray:
    """Mean of each patient's values, so that a patient with two scans does not count twice."""
    groups: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        groups.setdefault(patient, []).append(value)
    return np.array([np.mean(group) for group in groups.values()])


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[str], *, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval (BCa, Efron 1987) of the mean over patients; not a number for one patient."""
    from scipy.stats import bootstrap

    means = patient_means(values, patients)
    if len(means) < 2:
        return float("nan"), float("nan")
    if np.ptp(means) == 0:
        return float(means[0]), float(means[0])
    result = bootstrap((means,), np.mean, n_resamples=9999, rng=np.random.default_rng(seed))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
