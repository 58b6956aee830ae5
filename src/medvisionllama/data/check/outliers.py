"""Which values stand apart from the rest: robust, on a log scale, in terms that can be said in one sentence.

A value is an outlier if it differs from the median by more than a factor, and by more than five robust standard
deviations of the logarithms (1.4826 times the median absolute deviation). So a value must be both far away and
unusual: sets that vary much, such as tumours, raise no alarm, and neither does a small step in a set of equals.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

MIN_CASES = 8
_DEVIATIONS = 5.0


def robust_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and standard deviation as the median absolute deviation tells it."""
    array = np.asarray(values, dtype=np.float64)
    middle = float(np.median(array))
    return middle, 1.4826 * float(np.median(np.abs(array - middle)))


def find_outliers(values: Mapping[str, float], *, factor: float) -> dict[str, tuple[float, float]]:
    """Value and median of each outlier; values that are not positive are left out.

    Args:
        values: by case. With fewer than eight there is no usual to be unlike.
        factor: smallest ratio to the median that matters.
    """
    logs = {case: math.log(value) for case, value in values.items() if value > 0}
    if len(logs) < MIN_CASES:
        return {}
    middle, spread = robust_spread(list(logs.values()))
    limit = max(_DEVIATIONS * spread, math.log(factor))
    return {
        case: (values[case], math.exp(middle))
        for case, log in logs.items()
        if abs(log - middle) > limit + 1e-9
    }
