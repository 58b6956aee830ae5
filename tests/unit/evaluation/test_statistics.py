import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from medvisionllama.evaluation.statistics import (
    bootstrap_interval,
    cohens_dz,
    critical_difference,
    friedman_p,
    holm,
    patient_means,
    patients_needed,
    rank_biserial,
    run_p,
    smallest_p,
    wilcoxon_p,
)

# Differences of six patients, in hundredths of Dice. By size: 1, -2, 3, 4, -5, 6, so the ranks are 1 to 6.
# Up: 1 + 3 + 4 + 6 = 14. Down: 2 + 5 = 7. All: 21.
SIX = [0.04, -0.02, 0.06, 0.01, -0.05, 0.03]


def by_all_signs(differences):
    """Two-sided p of the signed-rank test over all 2^n signs, ties at their mean rank."""
    values = np.array([value for value in differences if value != 0])
    ranks = stats.rankdata(np.abs(values))
    up = ranks[values > 0].sum()
    middle = ranks.sum() / 2
    sums = np.array(list(itertools.product((0, 1), repeat=len(ranks)))) @ ranks
    return np.mean(abs(sums - middle) >= abs(up - middle) - 1e-9)


def drawn(num, seed=0, shift=0.3):
    return np.random.default_rng(seed).normal(shift, 1, num)


def test_wilcoxon_of_six_patients_is_the_number_counted_by_hand():
    # Subsets of the ranks 1 to 6 with a sum of at most 7: 1 of sum 0, then 1, 1, 2, 2, 3, 4, 4 of sums 1 to 7,
    # which makes 18 (as many have at least 14). Two sides of 2^6 = 64 signs.
    assert wilcoxon_p(SIX) == pytest.approx(2 * 18 / 64)
    assert wilcoxon_p(SIX) == pytest.approx(by_all_signs(SIX))


def test_rank_biserial_of_six_patients_is_the_number_counted_by_hand():
    assert rank_biserial(SIX) == pytest.approx((14 - 7) / 21)
    assert rank_biserial([-value for value in SIX]) == pytest.approx(-(14 - 7) / 21)


def test_dz_of_six_patients_is_the_number_counted_by_hand():
    # Sum 0.07; squares 16 + 4 + 36 + 1 + 25 + 9 = 91 of 1e-4; variance (91 - 7^2 / 6) / 5 of 1e-4.
    assert cohens_dz(SIX) == pytest.approx(0.07 / 6 / math.sqrt((91 - 49 / 6) / 5 * 1e-4))
    assert cohens_dz(SIX) == pytest.approx(stats.ttest_1samp(SIX, 0).statistic / math.sqrt(6))


def test_holm_of_four_tests_is_the_number_counted_by_hand():
    # Sorted: 0.01 * 4 = 0.04, 0.02 * 3 = 0.06, 0.025 * 2 = 0.05 but not below the one before, 0.5 * 1.
    assert holm([0.02, 0.5, 0.01, 0.025]) == pytest.approx([0.06, 0.5, 0.04, 0.06])


@pytest.mark.parametrize("seed", range(5))
def test_holm_agrees_with_statsmodels(seed):
    values = np.random.default_rng(seed).uniform(0, 0.2, 12).round(2)
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_holm_counts_only_tests_that_were_done():
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[[0, 2]] == pytest.approx([0.04, 0.04])
    assert math.isnan(adjusted[1])
    assert len(holm([])) == 0


@pytest.mark.parametrize("num", [2, 5, 20, 50])
def test_wilcoxon_without_ties_is_exact_and_agrees_with_scipy(num):
    values = drawn(num)
    assert wilcoxon_p(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_wilcoxon_of_more_than_fifty_patients_is_the_normal_one():
    values = drawn(60)
    assert wilcoxon_p(values) == pytest.approx(stats.wilcoxon(values, method="asymptotic").pvalue)
    assert wilcoxon_p(values) != pytest.approx(stats.wilcoxon(values, method="exact").pvalue, rel=1e-6)


@pytest.mark.parametrize("num", [2, 5, 9, 13])
def test_wilcoxon_with_tied_ranks_counts_all_signs_of_few_patients(num):
    values = [*drawn(num - 2).round(1), 0.5, -0.5]
    assert wilcoxon_p(values) == pytest.approx(by_all_signs(values))


def test_wilcoxon_with_tied_ranks_of_many_patients_is_corrected_for_ties():
    values = drawn(30).round(1)
    values = values[values != 0]
    up = stats.rankdata(np.abs(values))[values > 0].sum()
    num, (_, tied) = len(values), np.unique(np.abs(values), return_counts=True)
    variance = num * (num + 1) * (2 * num + 1) / 24 - (tied**3 - tied).sum() / 48
    z = (up - num * (num + 1) / 4) / math.sqrt(variance)
    assert wilcoxon_p(values) == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_patients_without_a_difference_are_left_out_of_the_ranks():
    many = drawn(20).tolist()
    assert wilcoxon_p([*SIX, 0.0, 0.0]) == wilcoxon_p(SIX)
    assert wilcoxon_p([*many, 0.0, 0.0]) == wilcoxon_p(many)
    assert rank_biserial([*SIX, 0.0, 0.0]) == rank_biserial(SIX)


def test_where_nothing_differs_p_is_one_and_the_effect_nothing():
    assert (wilcoxon_p([0.0, 0.0]), rank_biserial([0.0, 0.0])) == (1.0, 0.0)
    assert wilcoxon_p([0.0, 0.3]) == 1.0
    assert math.isnan(cohens_dz([0.0, 0.0]))


def test_one_patient_has_no_test():
    assert math.isnan(wilcoxon_p([0.1]))
    assert math.isnan(wilcoxon_p([]))
    assert math.isnan(cohens_dz([0.1]))
    assert math.isnan(rank_biserial([]))


@pytest.mark.parametrize("num", [1, 2, 4, 6, 10])
def test_no_p_is_smaller_than_the_smallest(num):
    assert smallest_p(num) == pytest.approx(2 / 2**num)
    if num > 1:
        assert wilcoxon_p(np.arange(1, num + 1)) == pytest.approx(smallest_p(num))


def test_four_patients_cannot_be_significant():
    assert smallest_p(4) == 0.125
    assert math.isnan(smallest_p(0))


def test_p_over_runs_is_that_of_the_t_test():
    # Mean 2, SD 1, t = 2 sqrt(3) with two degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    assert run_p([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert math.isnan(run_p([1.0]))
    assert math.isnan(run_p([1.0, 1.0]))


@pytest.mark.parametrize("sd", [0.01, 0.02, 0.03, 0.1, 0.3])
def test_patients_needed_agrees_with_statsmodels_over_the_efficiency(sd):
    for_t = math.ceil(TTestPower().solve_power(0.01 / sd, alpha=0.05, power=0.8))
    assert patients_needed(sd) == math.ceil(for_t * math.pi / 3)


def test_patients_needed_follow_the_arguments():
    for_t = math.ceil(TTestPower().solve_power(0.05 / 0.1, alpha=0.01, power=0.9))
    assert patients_needed(0.1, difference=0.05, alpha=0.01, power=0.9) == math.ceil(for_t * math.pi / 3)


@pytest.mark.parametrize("sd", [0.0, 1e-6, 1e-3, 2e-3])
def test_patients_needed_are_never_fewer_than_can_be_significant(sd):
    assert patients_needed(sd) == 6
    assert smallest_p(6) < 0.05 < smallest_p(5)
    assert patients_needed(sd, alpha=0.01) == 8
    assert smallest_p(8) < 0.01 < smallest_p(7)


def test_patients_needed_of_an_unknown_sd_are_unknown():
    assert math.isnan(patients_needed(math.nan))


@pytest.mark.slow
def test_with_the_patients_needed_four_of_five_studies_are_significant():
    generator = np.random.default_rng(0)
    num = int(patients_needed(0.02))
    studies = generator.normal(0.01, 0.02, (1000, num))
    assert np.mean([wilcoxon_p(study) < 0.05 for study in studies]) == pytest.approx(0.8, abs=0.04)


def test_the_interval_agrees_with_the_formula_of_efron():
    values = drawn(12)
    generator = np.random.default_rng(7)
    means = values[generator.integers(0, 12, (20_000, 12))].mean(axis=1)
    bias = stats.norm.ppf(np.mean(means < values.mean()))
    left_out = (values.sum() - values) / 11
    apart = left_out.mean() - left_out
    skew = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    z = bias + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(means, stats.norm.cdf(bias + z / (1 - skew * z)))
    found = bootstrap_interval(values.tolist(), [str(number) for number in range(12)])
    assert found == pytest.approx(expected, abs=0.04)
    assert found != pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.002)


def test_the_interval_is_over_patients_and_not_over_scans():
    values, patients = [0.1, 0.5, 0.2, 0.4, 0.9], ["a", "a", "b", "c", "d"]
    assert patient_means(values, patients) == pytest.approx([0.3, 0.2, 0.4, 0.9])
    assert bootstrap_interval(values, patients) == bootstrap_interval([0.3, 0.2, 0.4, 0.9], list("abcd"))


def test_the_interval_of_equal_patients_is_a_point_and_of_one_patient_unknown():
    assert bootstrap_interval([0.2, 0.2], ["a", "b"]) == (0.2, 0.2)
    assert all(math.isnan(end) for end in bootstrap_interval([0.2, 0.4], ["a", "a"]))


# Demsar 2006, table 5a: q at 0.05 for 2 to 10 arms.
@pytest.mark.parametrize(
    ("num_arms", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)]
)
def test_the_critical_difference_is_that_of_demsars_table(num_arms, quantile):
    expected = quantile * math.sqrt(num_arms * (num_arms + 1) / (6 * 14))
    assert critical_difference(num_arms, 14) == pytest.approx(expected, abs=1e-3)


def test_there_is_no_critical_difference_of_one_block_or_one_arm():
    assert critical_difference(4, 1) is None
    assert critical_difference(1, 9) is None


def test_friedman_of_ranks_is_the_number_counted_by_hand():
    # Four blocks, three arms; average ranks 1.25, 1.75, 3. Chi2 = 12 * 4 / (3 * 4) * (sum of squares - 3 * 16 / 4)
    # = 4 * (1.5625 + 3.0625 + 9 - 12) = 6.5 with two degrees of freedom, so p = exp(-6.5 / 2).
    ranks = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [2, 1, 3]]
    assert friedman_p(ranks) == pytest.approx(math.exp(-3.25))


def test_friedman_needs_two_blocks_and_three_arms():
    assert math.isnan(friedman_p([[1, 2, 3]]))
    assert math.isnan(friedman_p([[1, 2], [1, 2]]))
    assert friedman_p([[2, 2, 2], [2, 2, 2]]) == 1.0
