"""Statistics whose unit is the patient.

Everything takes the differences of patients (arm minus reference), one number per patient. What is unusual:

- zeros are dropped before ranking, as Wilcoxon did; the table counts them as ties
- p is exact for at most 50 patients without tied ranks, and for at most 13 with tied ranks
- Holm ignores tests that could not be done, so they cost the others nothing
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

EFFICIENCY = 3 / math.pi
"""Of Wilcoxon's test against the paired t test for normal differences, asymptotically (Lehmann 1975, 4.3)."""


def patient_means(values: Sequence[float], patients: Sequence[str]) -> np.ndarray:
    """Mean of each patient's values, so that a patient with two scans does not count twice."""
    groups: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        groups.setdefault(patient, []).append(value)
    return np.array([np.mean(group) for group in groups.values()])


def bootstrap_interval(values: Sequence[float], patients: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval (BCa, Efron 1987) of the mean over patients; not a number for one patient."""
    from scipy.stats import bootstrap

    means = patient_means(values, patients)
    if len(means) < 2:
        return float("nan"), float("nan")
    if np.ptp(means) == 0:
        return float(means[0]), float(means[0])
    result = bootstrap((means,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def wilcoxon_p(differences: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where nothing differs, not a number below two patients.

    With tied ranks and more than 13 non-zero differences p is normal, with the variance corrected for ties.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return float("nan")
    values = values[values != 0]
    if len(values) < 2:
        return 1.0
    return float(wilcoxon(values).pvalue)


def smallest_p(num_patients: int) -> float:
    """Smallest two-sided p that Wilcoxon's test of so many patients can give: all differ in one direction.

    >>> smallest_p(4), smallest_p(6)
    (0.125, 0.03125)
    """
    return 2.0 ** (1 - num_patients) if num_patients > 0 else float("nan")


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjust p values of one family (Holm 1979); those that are not a number stay so and are not counted."""
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation (Kerby 2014): share of the rank sum that is up, minus that down.

    From -1 to 1; 0 where nothing differs.
    """
    from scipy.stats import rankdata

    values = np.asarray(differences, dtype=float)
    if len(values) == 0:
        return float("nan")
    values = values[values != 0]
    if len(values) == 0:
        return 0.0
    ranks = rankdata(np.abs(values))
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def cohens_dz(differences: ArrayLike) -> float:
    """Mean of the differences over their SD; not a number where they do not vary."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float("nan")
    return float(values.mean() / values.std(ddof=1))


def run_p(differences: ArrayLike) -> float:
    """Two-sided p of the t test over the mean differences of runs; not a number where they do not vary.

    Patients share the training they are tested with. A lucky run lifts all of them, which a test over patients
    takes for an effect of the arm; this one does not.
    """
    from scipy.stats import ttest_1samp

    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float("nan")
    return float(ttest_1samp(values, 0).pvalue)


def t_reach(sd: float, number: int) -> float:
    """How far the 95 % interval of a mean of so many runs reaches either way, by the t distribution.

    Infinite for one run, which does not say how much runs vary.
    """
    from scipy.stats import t

    return math.inf if number < 2 else float(t.ppf(0.975, number - 1) * sd / math.sqrt(number))


def patients_needed(sd: float, *, difference: float = 0.01, alpha: float = 0.05, power: float = 0.8) -> float:
    """Patients with which Wilcoxon's test finds a mean difference with this power, if differences are normal.

    The number for the paired t test (noncentral t) over the efficiency of Wilcoxon's, rounded up; never so few
    that no p below alpha exists (6 at 0.05). As uncertain as the SD it is given.
    """
    if not math.isfinite(sd):
        return float("nan")
    least = math.floor(1 - math.log2(alpha)) + 1
    if sd == 0:
        return float(least)
    effect = difference / sd
    upper = 2
    while _t_power(upper, effect, alpha) < power:
        upper *= 2
    upper = bisect_left(
        range(upper), power, lo=max(2, upper // 2), key=lambda number: _t_power(number, effect, alpha)
    )
    return float(max(least, math.ceil(upper / EFFICIENCY)))


def _t_power(num_patients: int, effect: float, alpha: float) -> float:
    """Power of the two-sided paired t test, without the tail of the wrong sign, which no useful power has."""
    from scipy.stats import nct, t

    freedom = num_patients - 1
    return float(nct.sf(t.isf(alpha / 2, freedom), freedom, effect * math.sqrt(num_patients)))


def friedman_p(ranks: ArrayLike) -> float:
    """P of Friedman's test over `[blocks, arms]`; not a number for fewer than two blocks or three arms."""
    from scipy.stats import friedmanchisquare

    values = np.asarray(ranks, dtype=float)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 3:
        return float("nan")
    if (values == values[:, :1]).all():
        return 1.0
    return float(friedmanchisquare(*values.T).pvalue)


def critical_difference(num_arms: int, num_blocks: int) -> float | None:
    """Distance of average ranks from which two arms differ at 5 % (Nemenyi; Demsar 2006); none below two blocks."""
    from scipy.stats import studentized_range

    if num_blocks < 2 or num_arms < 2:
        return None
    quantile = studentized_range.isf(0.05, num_arms, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(num_arms * (num_arms + 1) / (6 * num_blocks)))
