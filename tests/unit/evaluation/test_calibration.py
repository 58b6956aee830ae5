import numpy as np
import pytest

from medvisionllama.evaluation.calibration import (
    Reliability,
    brier_score,
    expected_calibration_error,
    reliability_table,
    tally,
)


def two_classes(*foreground):
    """Probabilities of background and of one class."""
    return np.array([[1 - share for share in foreground], foreground])


def test_the_error_is_the_mean_gap_between_confidence_and_accuracy_weighted_by_voxels():
    # In the bin above 0.9: confidence 0.95 three times, right twice. In that above 0.6: 0.65 once, right.
    sums = tally(two_classes(0.95, 0.95, 0.95, 0.65), np.array([1, 1, 0, 1]), num_bins=10)
    assert expected_calibration_error(sums) == pytest.approx(
        3 / 4 * abs(0.95 - 2 / 3) + 1 / 4 * abs(0.65 - 1)
    )


def test_doubt_that_is_justified_is_no_error():
    sums = tally(two_classes(0.75, 0.75, 0.75, 0.75), np.array([1, 1, 1, 0]))
    assert expected_calibration_error(sums) == pytest.approx(0)


def test_gaps_of_opposite_bins_do_not_cancel():
    # 0.6 and always right, 0.9 and right in one of five: together as confident as right, but wrong in each bin.
    sums = tally(two_classes(*[0.6] * 5, *[0.9] * 5), np.array([1] * 5 + [1, 0, 0, 0, 0]))
    assert expected_calibration_error(sums) == pytest.approx(0.5 * 0.4 + 0.5 * 0.7)


def test_the_score_is_the_squared_error_over_all_classes():
    probabilities = np.array([[0.2, 0.1], [0.5, 0.2], [0.3, 0.7]])
    sums = tally(probabilities, np.array([2, 2]))
    first, second = 0.2**2 + 0.5**2 + 0.7**2, 0.1**2 + 0.2**2 + 0.3**2
    assert brier_score(sums) == pytest.approx((first + second) / 2)


def test_a_network_that_is_certain_and_wrong_scores_two():
    assert brier_score(tally(two_classes(1.0), np.array([0]))) == pytest.approx(2)
    assert brier_score(tally(two_classes(1.0), np.array([1]))) == pytest.approx(0)


def test_voxels_count_where_the_true_or_the_likeliest_class_is_foreground():
    # Found, missed, invented; and background that was rightly found, which does not count.
    sums = tally(two_classes(0.9, 0.1, 0.8, 0.3), np.array([1, 1, 0, 0]))
    assert sums.num_voxels == 3
    assert sums.confidence.sum() == pytest.approx(0.9 + 0.9 + 0.8)
    assert sums.correct.sum() == 1


def test_a_bin_holds_its_upper_edge_and_the_first_and_last_hold_the_rest():
    sums = tally(two_classes(0.5, 0.75, 1.0), np.array([1, 1, 1]), num_bins=4)
    assert sums.count.tolist() == [0, 1, 1, 1]
    beyond = tally(np.array([[0.0, -1.0], [1.0 + 1e-6, 0.0]]), np.array([1, 1]), num_bins=4)
    assert beyond.count.tolist() == [1, 0, 0, 1]


def test_scans_are_added_as_if_they_were_one():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 60).T
    truth = rng.integers(0, 3, 60)
    whole = tally(probabilities, truth)
    parts = Reliability.empty()
    for part in (slice(0, 7), slice(7, 31), slice(31, 60)):
        parts += tally(probabilities[:, part], truth[part])
    assert parts.num_voxels == whole.num_voxels
    assert expected_calibration_error(parts) == pytest.approx(expected_calibration_error(whole))
    assert brier_score(parts) == pytest.approx(brier_score(whole))


def test_shape_and_precision_of_the_scan_do_not_matter():
    probabilities = np.random.default_rng(1).dirichlet([1, 1], (4, 5, 6)).transpose(3, 0, 1, 2)
    truth = (probabilities[1] > 0.4).astype(np.uint8)
    flat = tally(probabilities.reshape(2, -1), truth.ravel())
    solid = tally(probabilities.astype(np.float32), truth)
    assert solid.num_voxels == flat.num_voxels
    assert brier_score(solid) == pytest.approx(brier_score(flat), rel=1e-5)


def test_the_table_says_what_each_bin_holds():
    rows = reliability_table(tally(two_classes(0.95, 0.93, 0.6), np.array([1, 0, 1]), num_bins=2))
    assert rows[0] == {"above": 0.0, "up_to": 0.5, "count": 0, "confidence": None, "accuracy": None}
    assert rows[1] == {
        "above": 0.5,
        "up_to": 1.0,
        "count": 3,
        "confidence": pytest.approx((0.95 + 0.93 + 0.6) / 3),
        "accuracy": pytest.approx(2 / 3),
    }


def test_there_are_fifteen_bins():
    rows = reliability_table(tally(two_classes(0.9), np.array([1])))
    assert len(rows) == 15
    assert rows[13]["count"] == 1  # 0.867 to 0.933


def test_without_foreground_nothing_is_known():
    sums = tally(two_classes(0.1, 0.2), np.array([0, 0]))
    assert sums.num_voxels == 0
    assert np.isnan(expected_calibration_error(sums))
    assert np.isnan(brier_score(sums))
