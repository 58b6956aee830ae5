import numpy as np
import pytest
from scipy import ndimage

from medvisionllama.data.resample import resample_image, resample_label, shape_at

RNG = np.random.default_rng(0)


def smooth_blob(shape: tuple[int, ...]) -> np.ndarray:
    return ndimage.gaussian_filter(RNG.normal(size=shape), 2.0)


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "expected"),
    [
        ((10, 20, 30), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (10, 20, 30)),
        ((10, 20, 30), (1.0, 1.5, 3.0), (2.0, 1.0, 1.5), (5, 30, 60)),
        ((10, 20, 3), (1.0, 1.0, 1.0), (3.0, 3.0, 9.0), (3, 7, 1)),
    ],
)
def test_the_shape_covers_the_same_extent(shape, spacing, target, expected):
    assert shape_at(shape, spacing, target) == expected


def test_the_same_shape_changes_nothing():
    image, label = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32), RNG.integers(0, 3, (3, 4, 5))
    np.testing.assert_array_equal(resample_image(image, (3, 4, 5)), image)
    np.testing.assert_array_equal(resample_label(label, (3, 4, 5)), label)


def test_half_the_voxels_are_the_means_of_neighbours():
    image = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    np.testing.assert_allclose(resample_image(image, (4, 1, 1)).ravel(), [0.5, 2.5, 4.5, 6.5])


def test_a_ramp_stays_a_ramp_with_aligned_outer_faces():
    # Centres of 4 voxels of length 2 are 1, 3, 5, 7 mm; of 8 voxels of length 1 they are 0.5, 1.5, ... mm.
    image = np.array([1, 3, 5, 7], dtype=np.float32).reshape(1, 1, 4, 1)
    expected = [1.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.0]
    np.testing.assert_allclose(resample_image(image, (1, 8, 1)).ravel(), expected)


def test_channels_are_resampled_apart():
    image = RNG.normal(size=(2, 6, 5, 4)).astype(np.float32)
    both = resample_image(image, (4, 7, 3))
    assert both.shape == (2, 4, 7, 3)
    np.testing.assert_allclose(both[1:], resample_image(image[1:], (4, 7, 3)))


def test_memory_maps_turned_axes_and_other_types_are_taken():
    image = np.asfortranarray(RNG.integers(0, 9, (1, 4, 4, 4)).astype(np.int16))
    result = resample_image(image, (2, 2, 2))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 0, 0, 0], image[0, :2, :2, :2].mean())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_no_class_appears_between_two_others(dtype):
    label = np.zeros((6, 6, 6), dtype=dtype)
    label[:3], label[3:] = 1, 3
    result = resample_label(label, (9, 11, 7))
    assert result.dtype == dtype
    assert np.unique(result).tolist() == [1, 3]
    np.testing.assert_array_equal(result[:4], 1)
    np.testing.assert_array_equal(result[5:], 3)


def test_halving_whole_blocks_gives_one_voxel_each():
    label = RNG.integers(0, 5, (4, 5, 3)).astype(np.uint8)
    doubled = label.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(resample_label(doubled, label.shape), label)


def test_a_large_label_value_keeps_its_value():
    label = np.full((4, 4, 4), 65_535, dtype=np.uint16)
    assert np.unique(resample_label(label, (5, 3, 6))).tolist() == [65_535]


@pytest.mark.parametrize("shape", [(9, 31, 14), (40, 20, 22), (16, 20, 11)])
def test_image_and_label_move_together(shape):
    label = (smooth_blob((20, 24, 18)) > 0.05).astype(np.uint8)
    image = resample_image(label[None].astype(np.float32), shape)[0]
    np.testing.assert_array_equal(resample_label(label, shape), image > 0.5)


def test_three_classes_follow_the_largest_share():
    label = np.argmax([smooth_blob((12, 10, 8)) for _ in range(3)], axis=0).astype(np.uint8)
    shares = resample_image(np.stack([label == value for value in range(3)]).astype(np.float32), (17, 7, 13))
    np.testing.assert_array_equal(resample_label(label, (17, 7, 13)), shares.argmax(axis=0))
