from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medvisionllama.config import AugmentConfig
from medvisionllama.data.transforms import (
    Augmentation,
    Parameters,
    apply_bias_field,
    apply_intensity,
    apply_spatial,
    spline_field,
)

CROP = (12, 10, 8)
REGION = (16, 14, 10)
EFFECTS = ("brightness", "contrast", "gamma", "noise", "blur", "low_resolution")


def random_batch(num_cases: int = 1, num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of blocks, and the labels themselves as images: one channel a class."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, num_classes, (num_cases, 4, 5, 5), generator=generator)
    labels = small.repeat_interleave(4, 1).repeat_interleave(3, 2).repeat_interleave(2, 3)[:, :, :14]
    assert labels.shape[1:] == REGION
    images = torch.stack([(labels == value).float() for value in range(num_classes)], dim=1)
    return images, labels


def augmentation(spacing=(1.0, 1.0, 1.0), flip_axes=(), **settings) -> Augmentation:
    return Augmentation(AugmentConfig(**settings), spacing, CROP, flip_axes)


def still(**changes) -> Parameters:
    values = {"matrix": np.eye(3), "shift": np.zeros(3), "effects": {}, "noise_seed": 0}
    return Parameters(**{**values, **changes})


def middle(batch: torch.Tensor) -> torch.Tensor:
    return batch[..., 2:14, 2:12, 1:9]


def angles_of(drawn: Parameters, spacing) -> np.ndarray:
    turn = np.diag(spacing) @ drawn.matrix @ np.diag(1 / np.asarray(spacing))
    x, y, z = (
        np.arctan2(-turn[1, 2], turn[2, 2]),
        np.arcsin(turn[0, 2]),
        np.arctan2(-turn[0, 1], turn[0, 0]),
    )
    return np.rad2deg(np.abs([x, y, z]))


def largest_angles(spacing, degrees: float = 20.0) -> np.ndarray:
    made = augmentation(spacing, rotation_degrees=degrees, scale=(1.0, 1.0), spatial_probability=1.0)
    rng = np.random.default_rng(0)
    return np.max([angles_of(made.draw(rng), spacing) for _ in range(200)], axis=0)


@pytest.mark.parametrize("seed", range(8))
def test_image_and_label_move_together(seed):
    images, labels = random_batch(2)
    made = augmentation(
        (1.0, 1.0, 2.0),
        (0,),
        rotation_degrees=45.0,
        spatial_probability=1.0,
        elastic=0.05,
        elastic_probability=1.0,
        intensity_probability=0.0,
    )
    moved, classes = made(images, labels, np.random.default_rng(seed))
    assert torch.equal(moved.argmax(dim=1), classes)
    assert not torch.equal(classes, middle(labels))


@pytest.mark.parametrize("seed", range(4))
def test_images_are_sampled_where_the_parameters_say(seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=REGION).astype(np.float32)
    drawn = still(matrix=np.eye(3) + rng.normal(scale=0.3, size=(3, 3)), shift=rng.normal(scale=2.0, size=3))
    offsets = np.indices(CROP).reshape(3, -1) - (np.array(CROP)[:, None] - 1) / 2
    points = drawn.matrix @ offsets + drawn.shift[:, None] + (np.array(REGION)[:, None] - 1) / 2
    expected = map_coordinates(image, points, order=1, mode="grid-constant").reshape(CROP)
    batch = torch.from_numpy(image)[None, None]
    moved, _ = apply_spatial(batch, torch.zeros(1, *REGION, dtype=torch.int64), [drawn], CROP)
    np.testing.assert_allclose(moved[0, 0].numpy(), expected, atol=1e-4)


def test_identity_parameters_give_the_middle_crop():
    images, labels = random_batch()
    moved, classes = apply_spatial(images, labels, [still()], CROP)
    torch.testing.assert_close(moved, middle(images), atol=1e-5, rtol=0)
    assert torch.equal(classes, middle(labels))


def test_a_whole_voxel_shift_moves_the_crop_by_that_much():
    images, labels = random_batch()
    _, classes = apply_spatial(images, labels, [still(shift=np.array([2.0, -1.0, 1.0]))], CROP)
    assert torch.equal(classes, labels[:, 4:16, 1:11, 2:10])


def test_outside_the_region_is_zero_and_background():
    images, labels = random_batch()
    moved, classes = apply_spatial(images, labels + 1, [still(shift=np.array([100.0, 0, 0]))], CROP)
    assert moved.eq(0).all()
    assert classes.eq(0).all()


def test_each_case_has_its_own_parameters():
    images, labels = random_batch(2)
    parameters = [still(), still(shift=np.array([1.0, 0.0, 0.0]))]
    moved, classes = apply_spatial(images, labels, parameters, CROP)
    torch.testing.assert_close(moved[0], middle(images)[0], atol=1e-5, rtol=0)
    assert torch.equal(classes[1], labels[1, 3:15, 2:12, 1:9])


def test_augmentation_that_is_off_cuts_the_middle_exactly():
    images, labels = random_batch(2)
    cut, classes = augmentation(enabled=False)(images, labels, np.random.default_rng(0))
    assert torch.equal(cut, middle(images))
    assert torch.equal(classes, middle(labels))


def test_the_same_generator_state_gives_the_same_batch():
    images, labels = random_batch(3)
    made = augmentation(flip_axes=(0,), intensity_probability=1.0)
    first, second, third = (made(images, labels, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], third[0])


def test_inputs_are_left_as_they_were():
    images, labels = random_batch()
    before = images.clone(), labels.clone()
    augmentation(flip_axes=(0,), intensity_probability=1.0)(images, labels, np.random.default_rng(0))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_a_flip_mirrors_its_axis_about_half_the_time():
    images, labels = random_batch()
    made = augmentation(flip_axes=(0,), spatial_probability=0.0, intensity_probability=0.0)
    rng = np.random.default_rng(0)
    results = [made(images, labels, rng)[1] for _ in range(40)]
    mirrored = sum(torch.equal(result, middle(labels).flip(1)) for result in results)
    assert mirrored + sum(torch.equal(result, middle(labels)) for result in results) == 40
    assert 8 < mirrored < 32


def test_nothing_is_mirrored_where_flips_are_not_allowed():
    made, rng = augmentation(spatial_probability=1.0), np.random.default_rng(0)
    assert all(np.linalg.det(made.draw(rng).matrix) > 0 for _ in range(100))


def test_isotropic_scans_turn_by_the_full_angle_about_every_axis():
    angles = largest_angles((1.0, 1.0, 1.0))
    assert (angles <= 20).all()
    assert (angles > 15).all()


@pytest.mark.parametrize("thick", range(3))
def test_thick_slices_turn_freely_only_in_their_plane(thick):
    spacing = [1.5, 1.5, 1.5]
    spacing[thick] = 10.0
    angles = largest_angles(spacing)
    assert 15 < angles[thick] <= 20
    assert (np.delete(angles, thick) == 0).all()


@pytest.mark.parametrize("thick", range(3))
def test_every_thick_slice_of_a_crop_is_one_of_the_scan(thick):
    spacing = np.full(3, 1.5)
    spacing[thick] = 5.0
    config = AugmentConfig(elastic=0.05, elastic_probability=1.0, spatial_probability=1.0, translation=0.2)
    made = Augmentation(config, tuple(spacing), CROP, flip_axes=(thick,))
    # Each slice has a value of its own, also as a label.
    numbers = torch.arange(1, REGION[thick] + 1).view([-1 if axis == thick else 1 for axis in range(3)])
    labels = numbers.expand(REGION)[None].clone()
    rng, shifts = np.random.default_rng(0), set()
    for _ in range(20):
        drawn = made.draw(rng)
        for effect in ("blur", "low_resolution"):
            changed = apply_intensity(labels.float(), replace(drawn, effects={effect: 1.0}))[0]
            torch.testing.assert_close(changed, labels[0].float())
        images, classes = apply_spatial(labels.float()[:, None], labels, [drawn], CROP)
        # Through the middle, where no padding is near.
        middle = tuple(slice(None) if axis == thick else size // 2 for axis, size in enumerate(CROP))
        torch.testing.assert_close(images[0, 0][middle], classes[0][middle].float(), atol=1e-4, rtol=0)
        shifts.add(float(drawn.shift[thick]))
    assert len(shifts) > 1


def test_voxels_that_are_nearly_cubes_are_mixed_along_all_axes():
    made = augmentation(
        spacing=(1.0, 1.0, 2.5), elastic=0.05, elastic_probability=1.0, spatial_probability=1.0
    )
    drawn = made.draw(np.random.default_rng(0))
    assert drawn.apart == ()
    assert drawn.shift[2] != round(drawn.shift[2])
    assert drawn.elastic[2].any()


def test_two_coarse_axes_turn_freely_only_into_each_other():
    angles = largest_angles((1.0, 5.0, 5.0))
    assert 15 < angles[0] <= 20
    assert (angles[1:] <= 5 + 1e-6).all()


def test_a_few_thin_slices_turn_freely_only_in_their_plane():
    config = AugmentConfig(rotation_degrees=20, scale=(1.0, 1.0), spatial_probability=1.0)
    made, rng = Augmentation(config, (1.0, 1.0, 1.0), (40, 40, 8), flip_axes=()), np.random.default_rng(0)
    angles = np.max([angles_of(made.draw(rng), (1.0, 1.0, 1.0)) for _ in range(200)], axis=0)
    assert angles[2] > 15
    assert (angles[:2] <= 5 + 1e-6).all()


def test_rotations_are_rigid_in_millimetres():
    spacing = np.array([1.0, 2.0, 2.5])
    made = augmentation(tuple(spacing), rotation_degrees=90.0, scale=(1.0, 1.0), spatial_probability=1.0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        turn = np.diag(spacing) @ made.draw(rng).matrix @ np.diag(1 / spacing)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)


def test_zoom_and_shift_stay_in_their_ranges():
    made, rng = (
        augmentation(scale=(0.5, 2.0), translation=0.1, spatial_probability=1.0),
        np.random.default_rng(0),
    )
    drawn = [made.draw(rng) for _ in range(200)]
    zooms = np.array([np.linalg.det(one.matrix) ** (-1 / 3) for one in drawn])
    shifts = np.abs([one.shift for one in drawn]).max(axis=0)
    assert zooms.min() >= 0.5
    assert zooms.max() <= 2.0
    assert abs(np.mean(zooms < 1) - 0.5) < 0.15
    assert (shifts <= 0.1 * np.array(CROP)).all()
    assert (shifts > 0.08 * np.array(CROP)).all()


def test_a_zoom_above_one_enlarges():
    image = torch.zeros(1, 1, *REGION)
    image[:, :, 6:10, 5:9, 3:7] = 1
    moved, _ = apply_spatial(image, image[:, 0].long(), [still(matrix=np.eye(3) / 1.5)], CROP)
    assert moved.sum() == pytest.approx(64 * 1.5**3, rel=0.1)


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.0])
def test_every_effect_changes_the_image_a_little_and_reproducibly(effect, strength):
    image = torch.randn(2, 12, 10, 8, generator=torch.Generator().manual_seed(0))
    drawn = still(effects={effect: strength}, noise_seed=3)
    changed = apply_intensity(image, drawn)
    assert changed.shape == image.shape
    assert changed.isfinite().all()
    assert not torch.equal(changed, image)
    assert (changed - image).abs().mean() < 1.5
    assert torch.equal(changed, apply_intensity(image, drawn))


@pytest.mark.parametrize("effect", EFFECTS)
def test_every_effect_survives_a_constant_image_of_one_slice(effect):
    changed = apply_intensity(torch.ones(1, 6, 6, 1), still(effects={effect: 1.0}))
    assert changed.shape == (1, 6, 6, 1)
    assert changed.isfinite().all()


def test_contrast_and_gamma_keep_mean_and_range():
    image = torch.randn(2, 12, 10, 8, generator=torch.Generator().manual_seed(0))
    contrast = apply_intensity(image, still(effects={"contrast": 1.0}))
    torch.testing.assert_close(contrast.mean(dim=(1, 2, 3)), image.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(contrast.std(dim=(1, 2, 3)), 1.5 * image.std(dim=(1, 2, 3)))
    gamma = apply_intensity(image, still(effects={"gamma": -1.0}))
    torch.testing.assert_close(gamma.amax(), image.amax())
    torch.testing.assert_close(gamma.amin(), image.amin())


def test_intensity_effects_are_drawn_with_their_probability():
    rng = np.random.default_rng(0)
    assert all(not augmentation(intensity_probability=0.0).draw(rng).effects for _ in range(20))
    assert set(augmentation(intensity_probability=1.0).draw(rng).effects) == set(EFFECTS)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_is_moved_in_its_plane_only(axis):
    crop = tuple(1 if other == axis else 12 for other in range(3))
    made = Augmentation(
        AugmentConfig(spatial_probability=1.0, rotation_degrees=90), (1.0, 1.0, 1.0), crop, flip_axes=()
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = made.draw(rng)
        across = np.eye(3)[axis]
        np.testing.assert_allclose(drawn.matrix[axis], across, atol=1e-12)
        np.testing.assert_allclose(drawn.matrix[:, axis], across, atol=1e-12)
        assert drawn.shift[axis] == 0
        assert np.abs(np.delete(drawn.shift, axis)).min() > 0


def test_a_slice_is_not_faded_by_the_padding_beside_it():
    made = Augmentation(
        AugmentConfig(spatial_probability=1.0, intensity_probability=0),
        (1.0, 1.0, 1.0),
        (12, 12, 1),
        flip_axes=(),
    )
    images, labels = torch.zeros(1, 1, 16, 16, 3), torch.zeros(1, 16, 16, 3, dtype=torch.int64)
    images[..., 1], labels[..., 1] = 1.0, 1
    for seed in range(5):
        moved, classes = made(images, labels, np.random.default_rng(seed))
        torch.testing.assert_close(moved[0, 0, 4:8, 4:8, 0], torch.ones(4, 4))
        assert (classes[0, 4:8, 4:8, 0] == 1).all()


def test_without_elastic_the_draws_are_those_of_before():
    before, after = augmentation(elastic=0.0), augmentation(elastic=0.2, elastic_probability=0.0)
    drawn = [made.draw(np.random.default_rng(3)) for made in (before, after)]
    assert drawn[0].elastic is None
    assert drawn[1].elastic is None
    assert drawn[0].noise_seed == drawn[1].noise_seed


def test_elastic_displacement_is_a_share_of_the_crop():
    made = augmentation(elastic=0.1, elastic_probability=1.0)
    rng = np.random.default_rng(0)
    fields = torch.stack([spline_field(made.draw(rng).elastic, CROP) for _ in range(400)])
    # The strength is even between 0.3 and 1, whose mean square is 0.463.
    expected = 0.1 * np.asarray(CROP) * 0.463**0.5
    assert fields.shape[1:] == (3, *CROP)
    np.testing.assert_allclose(fields.square().mean(dim=(0, 2, 3, 4)).sqrt(), expected, rtol=0.05)


def test_equal_control_points_shift_the_crop():
    shift = np.array([2.0, -1.0, 1.0])
    points = np.broadcast_to(shift[:, None, None, None], (3, 6, 6, 6))
    # The field is as much larger as makes up for what the spline flattens.
    points = points / float(spline_field(np.ones((3, 6, 6, 6)), CROP).mean())
    images, labels = random_batch()
    by_field, by_field_classes = apply_spatial(images, labels, [still(elastic=points)], CROP)
    shifted, shifted_classes = apply_spatial(images, labels, [still(shift=shift)], CROP)
    torch.testing.assert_close(by_field, shifted, atol=1e-4, rtol=0)
    assert torch.equal(by_field_classes, shifted_classes)


def test_elastic_displacement_does_not_fold_the_scan():
    made = Augmentation(
        AugmentConfig(elastic=0.05, elastic_probability=1.0), (1.0, 1.0, 1.0), (40, 56, 32), ()
    )
    rng = np.random.default_rng(0)
    for _ in range(10):
        field = spline_field(made.draw(rng).elastic, (40, 56, 32))
        slopes = torch.stack([torch.stack(torch.gradient(part)) for part in field])
        assert torch.linalg.det(slopes.permute(2, 3, 4, 0, 1) + torch.eye(3)).min() > 0


def test_an_axis_of_one_voxel_is_not_bent():
    made = Augmentation(AugmentConfig(elastic=0.1, elastic_probability=1.0), (1.0, 1.0, 1.0), (12, 10, 1), ())
    field = spline_field(made.draw(np.random.default_rng(0)).elastic, (12, 10, 1))
    assert field[2].abs().max() == 0
    assert field[:2].abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 9, 9, 9), (2, 12, 7, 1), (1, 16, 16, 3)])
def test_blur_leaves_what_is_even_as_it_is(shape):
    even = torch.full(shape, 3.0)
    assert torch.allclose(apply_intensity(even, still(effects={"blur": 1.0})), even, atol=1e-5)


def test_without_a_bias_field_the_draws_are_those_of_before():
    before = augmentation(elastic=0.05, elastic_probability=1.0)
    after = Augmentation(
        AugmentConfig(elastic=0.05, elastic_probability=1.0, bias_field=0.6, bias_field_probability=1.0),
        (1.0, 1.0, 1.0),
        CROP,
        (),
        unitless_channels=(0,),
    )
    drawn = [made.draw(np.random.default_rng(3)) for made in (before, after)]
    assert drawn[0].bias_field is None
    assert drawn[1].bias_field is not None
    np.testing.assert_array_equal(drawn[0].elastic, drawn[1].elastic)
    assert drawn[0].noise_seed == drawn[1].noise_seed


def bias_field(crop, spacing=(1.0, 1.0, 1.0), channels=(0,)) -> Augmentation:
    config = AugmentConfig(
        bias_field=0.6, bias_field_probability=1.0, spatial_probability=0.0, intensity_probability=0.0
    )
    return Augmentation(config, spacing, crop, (), unitless_channels=channels)


def test_a_bias_field_is_a_gain_on_what_is_above_no_signal():
    crop = (20, 16, 12)
    points = np.random.default_rng(0).standard_normal((4, 4, 4)) * 0.5
    gain = spline_field(points[None], crop)[0].exp()
    image = torch.full((1, *crop), -1.5)
    image[:, 4:] += 2.0
    changed = apply_bias_field(image, points, channels=(0,))
    dark, bright = changed[0, :4], changed[0, 4:]
    assert dark.max() - dark.min() < 1e-5
    risen = (bright - dark.mean()) / gain[4:]
    torch.testing.assert_close(risen, torch.full_like(risen, float(risen[0, 0, 0])))
    # As a scan's own normalisation would bring them back.
    torch.testing.assert_close(changed.mean(), image.mean())
    torch.testing.assert_close(changed.std(), image.std())
    assert gain.max() / gain.min() > 1.5


def test_a_bias_field_changes_over_millimetres_not_over_crops():
    small, large = bias_field((40, 40, 40)), bias_field((100, 100, 10), (2.1, 2.1, 10.0))
    assert small.draw(np.random.default_rng(0)).bias_field.shape == (4, 4, 4)
    assert large.draw(np.random.default_rng(0)).bias_field.shape == (6, 6, 5)

    def spread(made: Augmentation) -> float:
        rng = np.random.default_rng(1)
        fields = [spline_field(made.draw(rng).bias_field[None], made.crop_size) for _ in range(200)]
        return float(torch.stack([field.std() for field in fields]).square().mean().sqrt())

    assert spread(small) < 0.6 * spread(large)
    # The strength is even between 0 and 0.6, with a mean square of 0.12; what is even over the crop does not count.
    assert 0.8 < spread(large) / 0.12**0.5 < 1.0


def test_only_channels_without_a_unit_have_a_bias_field():
    images, labels = random_batch()
    made = bias_field(CROP, channels=(1,))
    changed, classes = made(images, labels, np.random.default_rng(0))
    assert torch.equal(classes, middle(labels))
    pairs = zip(changed[0], middle(images)[0], strict=True)
    different = [not torch.allclose(after, before, atol=1e-4) for after, before in pairs]
    assert different == [False, True, False, False]
    assert bias_field(CROP, channels=()).draw(np.random.default_rng(0)).bias_field is None


def test_a_bias_field_leaves_what_is_even_as_it_is():
    even = torch.full((1, 9, 8, 1), 3.0)
    assert torch.equal(apply_bias_field(even, np.ones((4, 4, 4)), channels=(0,)), even)
