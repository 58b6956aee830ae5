import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import gaussian_filter

from medvisionllama.evaluation.metrics import Measures, dice, measure

SHAPE = (20, 20, 20)


def cube(start: int = 5, edge: int = 10, shift: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    x, y, z = (slice(start + offset, start + offset + edge) for offset in shift)
    mask[x, y, z] = True
    return mask


def voxel(*index: int) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[index] = True
    return mask


EMPTY = np.zeros(SHAPE, dtype=bool)


def measured(predicted, truth, spacing=(1.0, 1.0, 1.0), tolerance=1.0) -> Measures:
    return measure(predicted, truth, spacing, tolerance_mm=tolerance)


def test_a_perfect_mask_has_perfect_measures():
    result = measured(cube(), cube(), (1.0, 2.0, 0.5))
    assert result == Measures(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, volume_ml=1.0, predicted_ml=1.0, empty="")


def test_a_cube_shifted_by_a_voxel_has_the_overlap_counted_by_hand():
    result = measured(cube(shift=(1, 0, 0)), cube())
    assert result.dice == pytest.approx(0.9)
    assert result.iou == pytest.approx(900 / 1100)
    assert (result.precision, result.recall) == (0.9, 0.9)


def test_precision_and_recall_are_not_swapped():
    result = measured(cube(edge=5), cube(edge=10))
    assert (result.precision, result.recall) == (1.0, 0.125)
    assert result.iou == 0.125
    assert result.dice == pytest.approx(2 * 125 / 1125)


def test_nsd_of_a_shifted_cube_counts_the_surface_voxels_that_coincide():
    # A cube of edge 10 has 1000 - 512 = 488 surface voxels. Shifted by one along x, nine of its ten rings of
    # 36 lie on the other's surface.
    result = measured(cube(shift=(1, 0, 0)), cube(), tolerance=0.5)
    assert result.nsd == pytest.approx(9 * 36 / 488)


@pytest.mark.parametrize(("tolerance", "matched"), [(0.9, False), (1.0, True), (1.1, True)])
def test_nsd_counts_distances_up_to_and_with_the_tolerance(tolerance, matched):
    assert (measured(cube(shift=(1, 0, 0)), cube(), tolerance=tolerance).nsd == 1.0) is matched


@pytest.mark.parametrize("axis", range(3))
def test_hd95_of_a_shifted_cube_is_the_shift_in_millimetres_of_that_axis(axis):
    spacing = (3.0, 0.5, 2.0)
    shift = tuple(int(other == axis) for other in range(3))
    result = measured(cube(shift=shift), cube(), spacing)
    assert result.hd95_mm == pytest.approx(spacing[axis])


def test_the_tolerance_is_in_millimetres_of_each_axis():
    spacing = (0.5, 1.0, 3.0)
    along_x = measured(cube(shift=(2, 0, 0)), cube(), spacing)
    along_z = measured(cube(shift=(0, 0, 2)), cube(), spacing)
    assert along_x.nsd == 1.0
    assert along_z.nsd < 1.0


def test_two_single_voxels_are_their_distance_apart():
    result = measured(voxel(2, 2, 2), voxel(4, 5, 2), (1.0, 2.0, 3.0), tolerance=6.4)
    assert result.hd95_mm == pytest.approx(math.hypot(2 * 1.0, 3 * 2.0))
    assert (result.dice, result.nsd) == (0.0, 1.0)
    assert measured(voxel(2, 2, 2), voxel(4, 5, 2), (1.0, 2.0, 3.0), tolerance=6.3).nsd == 0.0


def test_hd95_takes_the_larger_direction():
    truth = cube(start=2, edge=3) | cube(start=12, edge=3)
    predicted = cube(start=2, edge=3)
    assert measured(predicted, truth).hd95_mm == measured(truth, predicted).hd95_mm > 10


def test_hd95_ignores_a_stray_voxel_that_hausdorff_would_not():
    truth = cube()
    predicted = truth | voxel(0, 0, 0)
    assert measured(predicted, truth).hd95_mm == 0.0


@pytest.mark.parametrize("start", [0, 10])
def test_a_mask_at_the_edge_of_the_scan_has_a_surface_there(start):
    # Cubes of 8 and of 10 voxels that share a corner: 296 and 488 voxels of surface, 169 of them the same.
    predicted, truth = (np.roll(cube(edge=edge), start - 5, axis=(0, 1, 2)) for edge in (8, 10))
    assert predicted[0].any() == truth[0].any() == (start == 0)
    assert measured(predicted, truth, tolerance=0.5).nsd == pytest.approx(2 * 169 / (296 + 488))


def test_measures_do_not_depend_on_where_the_masks_lie():
    first = measured(cube(start=2, edge=6, shift=(1, 2, 0)), cube(start=2, edge=6))
    second = measured(cube(start=9, edge=6, shift=(1, 2, 0)), cube(start=9, edge=6))
    assert first == second


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_has_the_edge_of_an_area(axis):
    x, y = np.meshgrid(np.arange(64) - 32, np.arange(64) - 32)
    discs = [np.expand_dims(np.hypot(x, y) <= radius, axis) for radius in (25, 20)]
    found = measured(*discs)
    assert found.nsd == 0
    assert found.hd95_mm == pytest.approx(5, abs=0.5)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("seed", range(8))
def test_surfaces_are_measured_as_monai_does(seed):
    """At tolerances that are themselves distances between voxels too, where rounding decides."""
    rng = np.random.default_rng(seed)
    shape, spacing = rng.integers(9, 24, size=3), tuple(rng.choice([0.7, 1.0, 1.85, 3.3, 10.0], size=3))
    field = gaussian_filter(rng.normal(size=(2, *shape)), (0, 2, 2, 2))
    truth, predicted = field[0] > 0, field[0] + 0.5 * field[1] > 0
    batches = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in (predicted, truth)]
    kept = {"include_background": True, "spacing": spacing}
    hd95 = float(compute_hausdorff_distance(*batches, percentile=95, **kept))
    for tolerance in (1.0, *spacing, math.hypot(*spacing[:2]), 2 * spacing[0]):
        found = measured(predicted, truth, spacing, tolerance)
        assert found.nsd == pytest.approx(
            float(compute_surface_dice(*batches, [tolerance], **kept)), abs=1e-6
        )
        assert found.hd95_mm == pytest.approx(hd95, rel=1e-6)
    assert hd95 > 0, "masks that differ, or the test says nothing"


def test_volumes_are_in_millilitres():
    result = measured(cube(edge=5), cube(edge=10), (1.0, 2.0, 3.0))
    assert result.volume_ml == pytest.approx(6.0)
    assert result.predicted_ml == pytest.approx(0.75)


def test_two_empty_masks_are_perfect_and_marked():
    result = measured(EMPTY, EMPTY)
    assert result == Measures(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, volume_ml=0.0, predicted_ml=0.0, empty="both")


@pytest.mark.parametrize(
    ("predicted", "truth", "which"), [(EMPTY, cube(), "prediction"), (cube(), EMPTY, "truth")]
)
def test_one_empty_mask_is_as_wrong_as_can_be_and_marked(predicted, truth, which):
    result = measured(predicted, truth, (1.0, 2.0, 3.0))
    assert (result.dice, result.iou, result.precision, result.recall, result.nsd) == (0, 0, 0, 0, 0)
    assert result.hd95_mm == pytest.approx(math.sqrt(20**2 + 40**2 + 60**2))
    assert result.empty == which


def test_dice_alone_follows_the_same_rule():
    assert dice(EMPTY, EMPTY) == 1.0
    assert dice(cube(), EMPTY) == 0.0
    assert dice(cube(shift=(0, 1, 0)), cube()) == pytest.approx(0.9)
