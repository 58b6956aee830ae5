import numpy as np
import pytest
from scipy import ndimage

from medvisionllama.data.readers import read_label
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
    # Equal shares may go either way.
    decided = np.abs(image - 0.5) > 1e-6
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(resample_label(label, shape)[decided], image[decided] > 0.5)


def test_three_classes_follow_the_largest_share():
    label = np.argmax([smooth_blob((12, 10, 8)) for _ in range(3)], axis=0).astype(np.uint8)
    shares = resample_image(np.stack([label == value for value in range(3)]).astype(np.float32), (17, 7, 13))
    first, second = np.sort(shares, axis=0)[:0:-1]
    decided = first - second > 1e-6
    assert decided.mean() > 0.9
    result = resample_label(label, (17, 7, 13))
    np.testing.assert_array_equal(result[decided], shares.argmax(axis=0)[decided])


def check_class_by_class(label: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Compare with the definition: torch's interpolation of each class, equal shares to either."""
    values = np.unique(label)
    shares = np.stack(
        [resample_image((label == value)[None].astype(np.float32), shape)[0] for value in values]
    )
    result = resample_label(label, shape)
    assert result.dtype == label.dtype
    wanted = values[shares.argmax(axis=0)]
    mine = np.take_along_axis(shares, np.searchsorted(values, result)[None], axis=0)[0]
    # Where torch was built without fused products, equal shares differ in the last bit; nothing else may.
    np.testing.assert_array_equal(result[mine < shares.max(axis=0) - 1e-6], [])
    assert (result != wanted).mean() < 0.002


@pytest.mark.parametrize("num_classes", [2, 7, 61])
@pytest.mark.parametrize("shape", [(9, 31, 14), (40, 7, 37), (13, 16, 1), (1, 1, 1)])
def test_many_classes_are_resampled_as_one_by_one(num_classes, shape, monkeypatch):
    monkeypatch.setattr("medvisionllama.data.resample._SLAB_VOXELS", 500)
    blobs = np.stack([smooth_blob((13, 16, 11)) for _ in range(num_classes)])
    label = (3 * blobs.argmax(axis=0)).astype(np.uint8)
    check_class_by_class(label, shape)


def test_equal_shares_go_to_either_value_in_turn(monkeypatch):
    label = np.tile(np.array([9, 4], dtype=np.uint16), 4).reshape(8, 1, 1)
    assert resample_label(label, (4, 1, 1)).ravel().tolist() == [4, 9, 4, 9]
    monkeypatch.setattr("medvisionllama.data.resample._SLAB_VOXELS", 1)
    assert resample_label(label, (4, 1, 1)).ravel().tolist() == [4, 9, 4, 9]


@pytest.mark.parametrize("start", [4, 5])
@pytest.mark.parametrize("length", [8, 9])
def test_halving_a_grid_changes_no_volume(start, length):
    label = np.zeros((24, 8, 8), np.uint8)
    label[start : start + length] = 1
    # Always to the background, it would lose a voxel of thickness wherever an end lies within a voxel.
    assert 8 * resample_label(label, (12, 4, 4)).sum() == label.sum()


@pytest.mark.data
def test_sixty_one_organs_are_resampled_as_one_by_one(data_root):
    label = read_label(data_root / "formats" / "ct_totalseg_3mm" / "label.nii.gz").array
    shape = tuple(round(0.61 * size) for size in label.shape)
    assert len(np.unique(label)) > 60
    check_class_by_class(label, shape)
