import numpy as np
import pytest
from scipy import ndimage

from medvisionllama.data.places import Place, Places
from medvisionllama.data.volume import Volume
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.inference.postprocess import _weighed, clean, remove_islands

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


MIDDLE = Place(mean_mm=(0.0, 0.0, 0.0), std_mm=(3.0, 3.0, 3.0))
MIDDLES = Places(foreground=MIDDLE, classes={1: MIDDLE})
CUBES = (1.0, 1.0, 1.0)


@pytest.fixture
def two_hearts():
    """Class 1 twice: 3×3×3 voxels in the scan's middle, and 4×3×3 at its end; class 2 likewise, above each."""
    array = np.zeros((31, 9, 9), np.uint8)
    array[14:17, 3:6, 3:6], array[14:17, 3:6, 6:7] = 1, 2
    array[27:31, 3:6, 3:6], array[27:31, 3:6, 6:7] = 1, 2
    return array


@pytest.mark.parametrize("kept", [{"largest_foreground": True}, {"largest_only": True}])
def test_of_two_of_a_size_the_one_where_labels_lie_stays(two_hearts, kept):
    assert remove_islands(two_hearts, CUBES, **kept)[27:31].any()
    found = remove_islands(two_hearts, CUBES, **kept, places=MIDDLES)
    assert (found == 1).sum() == 27
    assert (found[14:17] == 1).sum() == 27
    # Of a class that no training label has, the largest stays as it did.
    assert (found[27:31] == 2).any() == ("largest_only" in kept)


def test_a_speck_in_the_middle_is_none_beside_an_organ_elsewhere(two_hearts):
    two_hearts[14:17] = 0
    two_hearts[15, 4, 4] = 1
    found = remove_islands(two_hearts, CUBES, largest_foreground=True, largest_only=True, places=MIDDLES)
    assert (found[27:31] == 1).sum() == 36
    assert not found[:27].any()


def test_what_is_too_small_is_not_the_largest(two_hearts):
    # The one in the middle has 27 voxels, by place more than the 36 at the end.
    found = remove_islands(two_hearts, CUBES, largest_only=True, min_ml=0.030, places=MIDDLES)
    assert (found[27:31] == 1).sum() == 36
    assert not found[:27].any()
    assert not remove_islands(two_hearts, CUBES, largest_only=True, min_ml=0.040, places=MIDDLES).any()


def test_sizes_are_weighed_plane_by_plane_as_in_one_piece(two_hearts):
    place = Place(mean_mm=(4.0, -1.0, 2.0), std_mm=(5.0, 2.0, 1.0))
    x, y, z = place.distances(two_hearts.shape, SPACING)
    weights = 1 / (1 + x[:, None, None] + y[:, None] + z)
    box = (slice(14, 31), slice(3, 6), slice(3, 7))
    components, number = ndimage.label(two_hearts[box] > 0)
    expected = ndimage.sum_labels(weights[box], components, range(1, number + 1))
    sizes = np.bincount(components.ravel())[1:]
    found = _weighed(components, sizes, place, SPACING, two_hearts.shape, box)
    np.testing.assert_allclose(found, expected)


def test_places_hold_whichever_way_a_scan_s_axes_run(two_hearts):
    # Labels lie on the right, at the end of the array's first axis, where the smaller one is now.
    two_hearts[27] = 0
    two_hearts[13, 3:6, 3:6] = 1
    right = Place(mean_mm=(13.0, 0.0, 0.0), std_mm=(3.0, 3.0, 3.0))
    places = Places(foreground=right, classes={})
    cleaning = Cleaning(largest_foreground=True)
    ras = Volume(two_hearts, np.diag([1.0, 2.0, 3.0, 1.0]))
    expected = clean(ras, cleaning, places).array
    assert expected[28:].any()
    assert not expected[:27].any()
    # Stored as z, y, x, with x to the left.
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = -1, 2, 3, 1
    other = clean(Volume(two_hearts[::-1].transpose(2, 1, 0), affine), cleaning, places)
    np.testing.assert_array_equal(other.array.transpose(2, 1, 0)[::-1], expected)
    np.testing.assert_array_equal(other.affine, affine)
