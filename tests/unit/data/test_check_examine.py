import numpy as np
import pytest

from medvisionllama.data.check.examine import examine_channel, examine_label, voxel_hash
from medvisionllama.data.volume import Volume, to_ras


def test_values_of_a_channel_are_described():
    array = np.zeros((10, 10, 10), np.int16)
    array[:5] = np.arange(1, 501).reshape(5, 10, 10)
    facts = examine_channel(array)
    assert (facts.dtype, facts.low, facts.high) == ("int16", 0.0, 500.0)
    # Zero is padding: percentiles are those of 1..500.
    assert facts.percentiles == pytest.approx((6, 250, 495), abs=1)
    assert facts.scale == pytest.approx(489, abs=2)
    assert facts.num_values == 501
    assert (facts.num_bad, facts.constant, facts.mostly_one_value) == (0, False, False)


def test_bad_voxels_are_counted_and_the_rest_is_described():
    array = np.ones((4, 4, 4), np.float32)
    array[0, 0, 0], array[1, 2, 3], array[3, 0, 0] = 5, np.nan, np.inf
    facts = examine_channel(array)
    assert (facts.num_bad, facts.first_bad) == (2, (1, 2, 3))
    assert (facts.low, facts.high) == (1.0, 5.0)


def test_a_channel_without_one_finite_voxel_is_described():
    facts = examine_channel(np.full((3, 3, 3), np.nan, np.float32))
    assert facts.num_bad == 27
    assert not facts.constant


@pytest.mark.parametrize(("others", "mostly"), [(5, True), (10, True), (20, False)])
def test_a_channel_is_nearly_constant_from_99_percent_on(others, mostly):
    array = np.zeros(1000, np.float32)
    array[:others] = np.arange(1, others + 1)
    assert examine_channel(array.reshape(10, 10, 10)).mostly_one_value is mostly


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_a_label_is_counted_whatever_its_type(dtype):
    label = np.zeros((10, 20, 30), dtype)
    label[0:2, 4:6, 6:9] = 1
    label[5:10, :, :] = 3
    facts = examine_label(label)
    assert facts.countable
    assert facts.voxels == {1: 12, 3: 3000}
    assert facts.centroids[1] == pytest.approx((0.1, 0.25, 0.25))
    assert facts.centroids[3] == pytest.approx((0.75, 0.5, 0.5))
    assert facts.centroid == pytest.approx((0.7474, 0.499, 0.499), abs=1e-3)


def test_places_of_classes_are_those_found_voxel_by_voxel():
    label = np.random.default_rng(0).integers(0, 4, (7, 8, 9)).astype(np.uint8)
    label[label == 2] = 7
    facts = examine_label(label)
    for value in (1, 3, 7):
        places = np.argwhere(label == value)
        assert facts.voxels[value] == len(places)
        assert facts.centroids[value] == pytest.approx((places + 0.5).mean(0) / label.shape, abs=1e-5)


def test_a_scan_in_the_place_of_a_label_is_not_searched_value_by_value(monkeypatch):
    searched = []
    monkeypatch.setattr("medvisionllama.data.check.examine._count_specks", lambda _: searched.append(1) or 0)
    scan = np.random.default_rng(0).integers(1, 201, (40, 50, 60)).astype(np.uint8)
    facts = examine_label(scan)
    assert (len(facts.voxels), searched) == (200, [])
    # As many classes, each in a place of its own.
    examine_label(np.repeat(np.arange(1, 201, dtype=np.uint8), 600).reshape(200, 20, 30))
    assert len(searched) == 200


def test_values_that_are_no_classes_are_told_apart():
    label = np.zeros((4, 4, 4))
    assert examine_label(label).voxels == {}
    label[0, 0, 0] = 0.25
    facts = examine_label(label)
    assert (facts.num_fractional, facts.fraction, facts.countable) == (1, 0.25, False)
    label[0, 0, 0] = -2
    assert examine_label(label).low == -2
    assert not examine_label(label).countable
    assert not examine_label(np.full((2, 2, 2), 65_536)).countable
    assert examine_label(np.full((2, 2, 2), 65_535)).voxels == {65_535: 8}


def test_islands_count_as_specks_only_beside_a_large_class():
    label = np.zeros((20, 20, 20), np.uint8)
    label[0:6, 0:6, 0:6] = 1
    label[15, 15, 15:18] = 1  # three voxels
    label[10, 10, 15:19] = 1  # four voxels
    label[6, 6, 6] = 1  # touches the class by a corner
    label[18, 18, 18] = 2  # alone: the class itself
    assert examine_label(label).specks == {1: 1}


def test_the_hash_tells_content_not_type_or_axes():
    array = np.random.default_rng(0).integers(0, 1000, (5, 6, 7)).astype(np.int16)
    assert voxel_hash(array) == voxel_hash(array.astype(np.float64))
    assert voxel_hash(array) == voxel_hash(np.asfortranarray(array))
    affine = np.eye(4)
    affine[0, 0], affine[0, 3] = -1, 4
    turned = to_ras(Volume(array[::-1].copy(), affine))
    assert voxel_hash(turned.array) == voxel_hash(array)
    assert voxel_hash(array) != voxel_hash(array[::-1])
    assert voxel_hash(array) != voxel_hash(array.reshape(6, 5, 7))


def test_the_hash_of_a_scan_read_in_slabs_is_that_of_the_whole(monkeypatch):
    array = np.random.default_rng(0).normal(size=(5, 6, 7))
    whole = voxel_hash(array)
    monkeypatch.setattr("medvisionllama.data.check.examine._VOXELS_AT_ONCE", 100)
    assert voxel_hash(array) == whole


def test_an_image_that_is_the_label_and_one_exchanged_with_it_are_suspicious(case_facts):
    label = np.zeros((6, 7, 8), np.uint8)
    label[2:4, 2:4, 2:4] = 1
    scan = np.random.default_rng(0).integers(0, 1000, (6, 7, 8))
    assert case_facts(image=label * 50.0, label=label).image_is_mask
    assert case_facts(image=label, label=scan).image_is_mask
    assert not case_facts(image=scan, label=label).image_is_mask
    # Few values, but not the label's: a coarse scan.
    assert not case_facts(image=scan // 100, label=label).image_is_mask
