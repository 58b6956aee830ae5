import numpy as np
import pandas as pd
import pytest

from medvisionllama.evaluation.explain.summary import summarise_scores
from medvisionllama.evaluation.pointing import make_target, peak, score, within


def scores_of(values, mask, token=(1.0, 1.0, 1.0)):
    [found] = score(values, [make_target(mask, token)])
    return found


@pytest.fixture
def line():
    """Values 1 to 10 along x, and a mask over the voxels whose values are 8 and 10."""
    values = np.arange(1, 11, dtype=np.float32).reshape(10, 1, 1)
    mask = np.zeros((10, 1, 1), bool)
    mask[[7, 9]] = True
    return values, mask


def test_a_line_of_ten_voxels_scores_as_computed_by_hand(line):
    found = scores_of(*line)
    assert found.hit == 1
    assert found.energy == pytest.approx(18 / 55)
    assert found.volume_share == pytest.approx(0.2)
    assert found.energy_ratio == pytest.approx(18 / 55 / 0.2)
    # Of 2 x 8 pairs, 10 beats all eight outside and 8 all but the 9.
    assert found.auc == pytest.approx(15 / 16)
    assert found.near_share == pytest.approx(0.4)


def test_a_maximum_beside_the_mask_is_near_and_no_hit(line):
    values, mask = line
    mask[9] = False
    found = scores_of(values, mask, token=(2.0, 1.0, 1.0))
    assert (found.hit, found.hit_near) == (0, 1)
    found = scores_of(values, mask, token=(1.9, 1.0, 1.0))
    assert (found.hit, found.hit_near) == (0, 0)


def test_a_constant_map_scores_as_one_that_guesses(line):
    values, mask = line
    found = scores_of(np.ones_like(values), mask)
    assert found.hit == pytest.approx(found.volume_share)
    assert found.hit_near == pytest.approx(found.near_share)
    assert found.energy_ratio == pytest.approx(1)
    assert found.auc == pytest.approx(0.5)


def test_auc_knows_no_unit_and_no_offset_and_energy_does(line):
    values, mask = line
    shifted = scores_of(values**3 + 1000, mask)
    assert shifted.auc == pytest.approx(scores_of(values, mask).auc)
    assert shifted.energy_ratio < scores_of(values, mask).energy_ratio


def test_an_empty_mask_has_no_score(line):
    values, mask = line
    found = scores_of(values, np.zeros_like(mask))
    assert np.isnan([found.hit, found.hit_near, found.energy, found.energy_ratio, found.auc]).all()
    assert found.volume_share == found.near_share == 0


def test_a_target_holds_the_part_with_something_in_it():
    whole = np.zeros((64, 64, 64), bool)
    whole[30, 30, 30] = True
    target = make_target(whole, (2.0, 2.0, 2.0))
    for held in (target.mask, target.near):
        assert held.shape == (5, 5, 5)
        assert held.base is None, "a view would hold the whole"
    values = np.random.default_rng(0).random(whole.shape, np.float32)
    near = within(whole, (2.0, 2.0, 2.0))
    found = scores_of(values, whole, token=(2.0, 2.0, 2.0))
    assert found.near_share == near.mean()
    assert found.energy == values[whole].sum(dtype=np.float64) / values.sum(dtype=np.float64)
    assert found.auc == pytest.approx((values[~whole] < values[whole]).mean(), abs=1e-4)


def test_the_tolerance_is_one_token_along_each_axis():
    mask = np.zeros((21, 21, 21), bool)
    mask[10, 10, 10] = True
    near = within(mask, (4.0, 2.0, 1.0))
    assert [int(near[:, 10, 10].sum()), int(near[10, :, 10].sum()), int(near[10, 10].sum())] == [9, 5, 3]
    assert not near[14, 12, 10], "a token away along two axes is more than a token away"
    grid = np.stack(np.meshgrid(*(np.arange(21) - 10,) * 3, indexing="ij"))
    scaled = np.sqrt((grid / np.array([4.0, 2.0, 1.0])[:, None, None, None]) ** 2).astype(float)
    np.testing.assert_array_equal(near, np.sqrt((scaled**2).sum(axis=0)) <= 1 + 1e-9)


def test_the_peak_is_the_voxel_of_the_maximum():
    values = np.zeros((3, 4, 5))
    values[2, 1, 3] = 1
    assert peak(values) == (2, 1, 3)
    values[0, 1, 3] = values[1, 1, 3] = 1
    assert peak(values) == (1, 1, 3), "of a plateau, its middle"


def test_means_are_over_patients_and_differences_over_the_same_cases():
    shared = {
        "stage": "decoder",
        "kind": "norm",
        "class": "foreground",
        "volume_share": 0.1,
        "near_share": 0.3,
    }
    aucs = {"a1": ("a", 0.9, 0.5), "a2": ("a", 0.7, 0.5), "b": ("b", 0.6, 0.7), "c": ("c", np.nan, np.nan)}
    rows = [
        {
            "case_id": case,
            "patient_id": patient,
            "network": network,
            **shared,
            **dict.fromkeys(("hit", "hit_near", "energy_ratio", "auc"), value),
        }
        for case, (patient, *values) in aucs.items()
        for network, value in zip(("trained", "random block"), values, strict=True)
    ]
    trained, control = summarise_scores(pd.DataFrame(rows)).to_dict(orient="records")
    assert (trained["cases"], trained["patients"]) == (3, 2)
    assert trained["auc"] == pytest.approx((0.8 + 0.6) / 2)
    assert control["auc"] == pytest.approx((0.5 + 0.7) / 2)
    assert control["auc_difference"] == pytest.approx((0.3 - 0.1) / 2)
    assert control["auc_difference_low"] <= control["auc_difference"] <= control["auc_difference_high"]
    assert np.isnan(trained.get("auc_difference", np.nan))
