"""Turned views: what is seen, and that it comes back to where it was."""

import math

import pytest
import torch

from medvisionllama.data.planning import Plan
from medvisionllama.inference.views import TURNED, View, brought_back, can_turn, coverage, seen, views_of

SHAPE = (8, 8, 8)


def plan(spacing_mm=(1.0, 1.0, 1.0), **changes):
    facts = {
        "channels": ("MR",),
        "classes": {1: "organ"},
        "merged": False,
        "resize": False,
        "spacing_mm": spacing_mm,
        "crop_size": (8, 8, 8),
        "strides": ((2, 2, 2),) * 3,
        "flip_axes": (0,),
    }
    return Plan(**facts | changes)


def image(shape, channels=2):
    return torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_those_of_pytorch(axis, quarters):
    shape = [6, 6, 6]
    shape[axis] = 3
    first, second = (other + 2 for other in range(3) if other != axis)
    slab = image(shape)
    expected = torch.rot90(slab, quarters, (first, second))
    found = seen(slab, View(degrees=90 * quarters), axis, plan())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_turn_is_one_in_millimetres():
    slab = torch.zeros(1, 1, 9, 7, 1)
    slab[0, 0, 8, 3] = 1  # 4 voxels of 1 mm from the middle
    turned = seen(slab, View(degrees=90), 2, plan((1.0, 2.0, 5.0)))
    assert turned[0, 0, 4, 5, 0] == pytest.approx(1, abs=1e-5)  # 2 voxels of 2 mm


@pytest.mark.parametrize("view", TURNED)
@pytest.mark.parametrize(
    ("axis", "spacing"), [(2, (1.0, 1.2, 8.0)), (0, (3.0, 1.0, 1.0)), (1, (1.0, 1.0, 1.0))]
)
def test_what_is_seen_comes_back_to_its_place(view, axis, spacing):
    shape = (24, 20, 22)
    x, y, z = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in shape), indexing="ij")
    # Interpolation between voxels leaves a slope as it is.
    slope = (0.3 * x - 0.7 * y + 0.5 * z)[None, None]
    shown = seen(slope, view, axis, plan(spacing))
    expected = [size if other == axis else math.ceil(size * view.zoom) for other, size in enumerate(shape)]
    assert list(shown.shape[2:]) == expected
    found = brought_back(shown, view, axis, plan(spacing), shape)
    assert found.shape == slope.shape
    assert not torch.allclose(shown[..., :20, :17, :19], slope[..., :20, :17, :19], atol=0.1)
    # The corners of a turned scan lie outside of it.
    inside = (..., *(slice(None) if other == axis else slice(6, -6) for other in range(3)))
    torch.testing.assert_close(found[inside], slope[inside], atol=0.02, rtol=0)


def test_a_view_that_is_mirrored_too_comes_back():
    slab, both = image((5, 6, 4)), View(mirrored=(0, 2))
    torch.testing.assert_close(seen(slab, both, 1, plan()), slab.flip(2, 4))
    torch.testing.assert_close(brought_back(slab.flip(2, 4), both, 1, plan(), (5, 6, 4)), slab)


def test_planes_are_turned_alone():
    slab = image((12, 12, 5))
    one = seen(slab[..., 2:3], TURNED[0], 2, plan())
    torch.testing.assert_close(seen(slab, TURNED[0], 2, plan())[..., 2:3], one)


@pytest.mark.parametrize(
    ("spacing", "axis", "expected"),
    [
        ((1.0, 1.0, 1.0), 0, True),
        ((1.85, 1.85, 10.0), 2, True),
        ((1.85, 1.85, 10.0), 1, False),
        ((1.0, 1.6, 10.0), 2, False),
    ],
)
def test_planes_turn_where_voxels_are_nearly_squares(spacing, axis, expected):
    assert can_turn(plan(spacing), SHAPE, axis) is expected
    assert len(views_of(plan(spacing), SHAPE, axis=axis, flip=True, turn=True)) == (4 if expected else 2)


@pytest.mark.parametrize(("axis", "expected"), [(0, False), (1, False), (2, True)])
def test_strips_are_not_turned(axis, expected):
    assert can_turn(plan(), (256, 200, 1), axis) is expected


def test_squeezed_scans_are_not_turned():
    assert not can_turn(plan(resize=True), SHAPE, 2)


def test_views_are_what_is_asked_for():
    assert views_of(plan(), SHAPE, axis=1, flip=False, turn=False) == [View()]
    assert views_of(plan(), SHAPE, axis=1, flip=True, turn=False) == [View(), View(mirrored=(0,))]


@pytest.mark.parametrize("view", TURNED)
@pytest.mark.parametrize(("axis", "shape"), [(2, (40, 24, 3)), (0, (5, 20, 44))])
def test_what_is_turned_out_of_the_picture_is_not_covered(view, axis, shape):
    share = coverage(view, axis, plan(), shape)
    assert list(share.shape) == [1, *(1 if other == axis else size for other, size in enumerate(shape))]
    x, y, z = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in shape), indexing="ij")
    slope = (0.3 * x - 0.7 * y + 0.5 * z)[None, None]
    back = brought_back(seen(slope, view, axis, plan()), view, axis, plan(), shape)
    error = (back - slope)[0].abs()
    # Where a voxel is covered it holds what was there; the corners of a plane are not, and hold something else.
    assert error.where(share == 1, torch.zeros(1)).max() < 0.5
    assert 0.6 < share.mean() < 1
    assert error.where(share == 0, torch.zeros(1)).max() > 1


def test_what_is_not_turned_is_covered_by_itself():
    assert coverage(View(mirrored=(0,)), 1, plan(), SHAPE).tolist() == [[[[1.0]]]]
