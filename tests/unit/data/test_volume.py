import itertools

import nibabel as nib
import numpy as np
import pytest

from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.volume import Volume, distance_at_corners, from_ras, same_place, spacing_of, to_ras

SHAPE = (3, 4, 5)
FORMATS = ("ct_totalseg_3mm", "mr_totalseg_3mm_crop", "sct_t1_cord", "sct_t2_cord", "sct_t2s_greymatter")


def signed_axes() -> list[np.ndarray]:
    affines = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[:, order] @ np.diag(signs) @ np.diag([1.5, 2.0, 7.0])
            affine[:3, 3] = [-20.0, 30.5, 4.0]
            affines.append(affine)
    return affines


ORIENTATIONS = [pytest.param(affine, id="".join(nib.aff2axcodes(affine))) for affine in signed_axes()]


def numbered(affine: np.ndarray) -> Volume:
    return Volume(np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE), affine)


def test_all_orientations_are_tested():
    assert len({nib.aff2axcodes(affine) for affine in signed_axes()}) == 48


@pytest.mark.parametrize("affine", ORIENTATIONS)
def test_going_to_ras_and_back_is_exact(affine):
    volume = numbered(affine)
    turned = to_ras(volume)
    assert nib.aff2axcodes(turned.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(from_ras(turned.array, affine), volume.array)


@pytest.mark.parametrize("affine", ORIENTATIONS)
def test_channels_stay_first_and_turn_like_a_label(affine):
    label = numbered(affine)
    image = Volume(np.stack([label.array, 100 + label.array]), affine)
    turned = to_ras(image)
    np.testing.assert_array_equal(turned.array[0], to_ras(label).array)
    np.testing.assert_array_equal(turned.array[1], 100 + to_ras(label).array)
    np.testing.assert_array_equal(from_ras(turned.array, affine), image.array)


@pytest.mark.parametrize("affine", ORIENTATIONS)
def test_a_voxel_keeps_its_place_in_the_patient(affine):
    volume = numbered(affine)
    turned = to_ras(volume)
    before = np.argwhere(np.ones(SHAPE, dtype=bool))
    after = np.array([np.argwhere(turned.array == value)[0] for value in volume.array[tuple(before.T)]])
    expected = nib.affines.apply_affine(affine, before)
    np.testing.assert_allclose(nib.affines.apply_affine(turned.affine, after), expected, atol=1e-9)


def test_oblique_scans_turn_to_the_nearest_axes():
    turn = nib.eulerangles.euler2mat(0.3, 0.2, 0.1)
    affine = nib.affines.from_matvec(turn @ np.diag([-1.0, -1.0, 2.0]), [5, 6, 7])
    volume = numbered(affine)
    turned = to_ras(volume)
    np.testing.assert_array_equal(turned.array, volume.array[::-1, ::-1])
    np.testing.assert_allclose(turned.affine @ [2, 3, 0, 1], affine @ [0, 0, 0, 1])


def test_shape_and_spacing_follow_the_axes():
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -3.0, 1.0, 2.0, 1.0
    volume = numbered(affine)
    assert (volume.shape, volume.spacing_mm) == ((3, 4, 5), (3.0, 1.0, 2.0))
    assert (to_ras(volume).shape, to_ras(volume).spacing_mm) == ((4, 5, 3), (1.0, 2.0, 3.0))


def test_the_spacing_of_an_oblique_scan_is_its_edge_lengths():
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.5, 0.4, 0.3) @ np.diag([0.7, 0.8, 3.0]))
    assert spacing_of(affine) == pytest.approx((0.7, 0.8, 3.0))


def test_turned_arrays_are_contiguous():
    assert all(to_ras(numbered(affine)).array.flags.c_contiguous for affine in signed_axes())


@pytest.mark.data
@pytest.mark.parametrize("name", FORMATS)
def test_real_scans_of_every_format_go_to_ras_and_back_exactly(data_root, name):
    image = read_image((data_root / "formats" / name / "image.nii.gz",))
    label = read_label(data_root / "formats" / name / "label.nii.gz")
    assert label.shape == image.shape
    assert label.array.any()
    for volume in (image, label):
        turned = to_ras(volume)
        assert nib.aff2axcodes(turned.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(from_ras(turned.array, volume.affine), volume.array)


def test_the_distance_at_the_corners_is_that_of_the_farthest():
    affine = np.diag([0.78125, 0.78125, 5.0, 1.0])
    other = np.diag([0.781, 0.78125, 5.0, 1.0])
    assert distance_at_corners(affine, other, (512, 512, 40)) == pytest.approx(511 * 0.00025)
    assert not same_place(affine, other, (512, 512, 40))
    assert same_place(affine, other, (128, 128, 40))
