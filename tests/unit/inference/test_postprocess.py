import numpy as np
import pytest

from medvisionllama.inference.postprocess import remove_islands

SPACING = (1.0, 2.0, 5.0)  # a voxel of 0.01 ml


@pytest.fixture
def mask():
    """Class 1: bodies of 8 and of 2 + 1 voxels, the last joined by a corner only; class 3: one voxel between."""
    array = np.zeros((10, 10, 10), np.uint8)
    array[0:2, 0:2, 0:2] = 1
    array[5, 5, 5:7] = 1
    array[6, 6, 7] = 1
    array[4, 5, 5] = 3
    return array


def test_the_largest_component_of_each_class_stays(mask):
    found = remove_islands(mask, SPACING, largest_only=True)
    expected = mask.copy()
    expected[5:7, 5:7, 5:8] = 0
    np.testing.assert_array_equal(found, expected)


def test_the_largest_component_of_all_classes_together_stays(mask):
    found = remove_islands(mask, SPACING, largest_foreground=True)
    assert (found == 1).sum() == 8
    assert (found > 0).sum() == 8
    # Within it, and not in the whole mask, each class's largest is kept.
    mask[0:2, 2, 0:2] = 3
    mask[8, 0:8, 8] = 3
    found = remove_islands(mask, SPACING, largest_foreground=True, largest_only=True)
    assert (found == 3).sum() == 4


def test_components_that_touch_by_a_corner_are_one(mask):
    # Three voxels, 0.03 ml: above the limit only together, and the third shares just a corner.
    found = remove_islands(mask, SPACING, min_ml=0.025)
    assert (found == 1).sum() == 11
    assert (found == 3).sum() == 0


@pytest.mark.parametrize(("min_ml", "left"), [(0.0, 12), (0.011, 11), (0.031, 8), (0.08, 8), (0.081, 0)])
def test_components_below_a_volume_go(mask, min_ml, left):
    assert (remove_islands(mask, SPACING, min_ml=min_ml) > 0).sum() == left


def test_the_mask_given_is_not_changed(mask):
    before = mask.copy()
    remove_islands(mask, SPACING, largest_only=True, min_ml=1.0)
    np.testing.assert_array_equal(mask, before)


def test_an_empty_mask_stays_empty():
    empty = np.zeros((3, 3, 3), np.uint16)
    assert not remove_islands(empty, SPACING, largest_only=True, largest_foreground=True).any()
