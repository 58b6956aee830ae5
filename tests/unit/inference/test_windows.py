import itertools
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from medvisionllama.data.planning import Plan
from medvisionllama.inference.slabs import native_mask
from medvisionllama.inference.views import coverage, views_of
from medvisionllama.inference.windows import (
    SlidingWindow,
    _place_of_sums,
    _row_weights,
    slab_axis,
    window_starts,
)

CROP = (8, 8, 4)


def _plan(**changes):
    facts = {
        "channels": ("CT", "PET"),
        "classes": {1: "liver", 2: "tumour"},
        "merged": False,
        "resize": False,
        "spacing_mm": (1.0, 1.0, 2.0),
        "crop_size": CROP,
        "strides": ((2, 2, 1), (2, 2, 2), (2, 2, 2)),
        "flip_axes": (0,),
    }
    return Plan(**facts | changes)


class _Voxelwise(nn.Module):
    """Looks at one voxel at a time, and notes the windows it was given."""

    def __init__(self, num_outputs):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(2, num_outputs, 1)
        self.shapes = []

    def forward(self, windows):
        self.shapes.append(tuple(windows.shape))
        return self.conv(windows)


class _OneSided(nn.Module):
    """Its logits depend on where in the window a voxel lies."""

    def forward(self, windows):
        ramp = torch.linspace(-2, 2, windows.shape[2]).view(1, 1, -1, 1, 1)
        return torch.cat([windows[:, :1], windows[:, 1:] + ramp, windows[:, :1] * ramp], dim=1)


def predict_probabilities(network, image, plan, *, overlap, flip, turn=False, **options):
    """Class probabilities `[k, x, y, z]`, all at once."""
    axis = slab_axis(tuple(image.shape[1:]), [plan], turn=turn)
    window = SlidingWindow(network, plan, axis, overlap, **options)
    return torch.cat(list(window.probabilities(image, flip=flip, turn=turn)), axis + 1)


def mask_of(probabilities, shape, plan, axis=0):
    return native_mask([probabilities], tuple(probabilities.shape[1:]), shape, plan, axis=axis)


def _image(shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(21, 9, 11), (8, 8, 4), (5, 20, 4), (3, 2, 1)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("flip", [False, True])
def test_a_voxelwise_network_sees_no_windows(shape, overlap, flip):
    network = _Voxelwise(3)
    found = predict_probabilities(network, _image(shape), _plan(), overlap=overlap, flip=flip)
    assert set(network.shapes) == {(1, 2, *CROP)}
    expected = network(_image(shape)[None])[0].softmax(dim=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_more_overlap_means_more_windows():
    counts = []
    for overlap in (0.0, 0.5):
        network = _Voxelwise(3)
        predict_probabilities(network, _image((16, 16, 8)), _plan(), overlap=overlap, flip=False)
        counts.append(len(network.shapes))
    assert counts == [8, 27]


def test_merged_classes_are_background_and_foreground():
    network = _Voxelwise(1)
    plan = _plan(merged=True)
    found = predict_probabilities(network, _image((10, 9, 5)), plan, overlap=0.5, flip=False)
    foreground = network(_image((10, 9, 5))[None])[0].sigmoid()
    torch.testing.assert_close(found, torch.cat([1 - foreground, foreground]), atol=1e-5, rtol=1e-5)


def test_probabilities_carry_no_gradient():
    assert not predict_probabilities(
        _Voxelwise(3), _image(CROP), _plan(), overlap=0.5, flip=True
    ).requires_grad


@pytest.mark.parametrize("shape", [(8, 8, 4), (13, 9, 6), (6, 8, 4)])
def test_averaging_over_mirrored_images_makes_a_one_sided_network_fair(shape):
    def predict(image, flip):
        return predict_probabilities(_OneSided(), image, _plan(), overlap=0.5, flip=flip)

    image = _image(shape)
    torch.testing.assert_close(predict(image.flip(1), True), predict(image, True).flip(1))
    assert not torch.allclose(predict(image.flip(1), False), predict(image, False).flip(1), atol=1e-2)
    torch.testing.assert_close(predict(image, True).sum(dim=0), torch.ones(shape))


@pytest.mark.parametrize("turn", [False, True])
def test_turned_views_of_what_is_the_same_everywhere_change_nothing(turn):
    image = torch.ones(2, 13, 9, 6)
    found = predict_probabilities(_Voxelwise(3), image, _plan(), overlap=0.5, flip=False, turn=turn)
    expected = _Voxelwise(3)(image[None])[0].softmax(dim=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_turned_views_are_two_more_looks_that_count_half():
    plan, image = _plan(flip_axes=()), _image((13, 12, 6))
    once = _together(image, plan, turn=False)
    shape = (13, 12, 6)
    ways = views_of(plan, shape, axis=2, flip=False, turn=True)
    views = [_softmax_of(view, image, plan) for view in ways]
    assert len(views) == 3
    torch.testing.assert_close(views[0], once)
    assert all(not torch.allclose(view, once, atol=1e-2) for view in views[1:])
    together, mean = _together(image, plan, turn=True), views[0] / 2 + views[1] / 4 + views[2] / 4
    shares = [coverage(way, 2, plan, shape) for way in ways[1:]]
    whole = ((shares[0] == 1) & (shares[1] == 1)).expand(3, *shape)
    torch.testing.assert_close(together[whole], mean[whole])
    # A corner that neither shows is what the scan as it is says.
    neither = ((shares[0] == 0) & (shares[1] == 0)).expand(3, *shape)
    assert neither.any()
    torch.testing.assert_close(together[neither], once[neither])


def test_half_precision_is_the_networks_alone():
    plan, image, seen = _plan(flip_axes=(0,)), _image((64, 60, 4)), []

    def network(windows):
        seen.append(torch.is_autocast_enabled("cpu"))
        return _OneSided()(windows)

    def predict(context):
        return predict_probabilities(network, image, plan, overlap=0.0, flip=True, turn=True, context=context)

    # Nothing in the network itself is rounded, so nothing at all may be.
    assert torch.equal(predict(partial(torch.autocast, "cpu", torch.bfloat16)), predict(nullcontext))
    half = len(seen) // 2
    assert seen == [True] * half + [False] * half


def _together(image, plan, *, turn):
    pieces = SlidingWindow(_OneSided(), plan, 2, 0.5).probabilities(image, flip=False, turn=turn)
    return torch.cat(list(pieces), dim=3)


def _softmax_of(view, image, plan):
    pieces = SlidingWindow(_OneSided(), plan, 2, 0.5).blended(image, [view])
    return torch.cat(list(pieces), dim=4)[0].softmax(dim=0)


def test_axes_that_training_does_not_mirror_are_not_mirrored():
    plan, image = _plan(flip_axes=()), _image((13, 9, 6))
    once = predict_probabilities(_OneSided(), image, plan, overlap=0.5, flip=False)
    assert torch.equal(predict_probabilities(_OneSided(), image, plan, overlap=0.5, flip=True), once)


@pytest.mark.parametrize(
    ("classes", "merged", "values", "dtype"),
    [
        ({1: "liver", 2: "tumour"}, False, [0, 1, 2], np.uint8),
        ({255: "a", 4: "b"}, False, [0, 255, 4], np.uint8),
        ({1: "a", 256: "b"}, False, [0, 1, 256], np.uint16),
        ({3: "a", 300: "b"}, True, [0, 1], np.uint8),
    ],
)
def test_masks_hold_label_values_in_the_smallest_type_that_fits(classes, merged, values, dtype):
    winners = torch.arange(24).view(2, 3, 4) % len(values)
    probabilities = nn.functional.one_hot(winners, len(values)).movedim(-1, 0).float()
    mask = mask_of(probabilities, (2, 3, 4), _plan(classes=classes, merged=merged))
    assert mask.dtype == dtype
    assert mask.shape == (2, 3, 4)
    assert np.array_equal(mask, np.array(values)[winners.numpy()])


def test_masks_come_back_to_the_scans_own_grid():
    probabilities = torch.zeros(3, 4, 4, 4)
    probabilities[0] = 1
    probabilities[:, 2:] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1, 1)
    mask = mask_of(probabilities, (8, 6, 2), _plan())
    assert mask.shape == (8, 6, 2)
    assert (mask[:4] == 0).all()
    assert (mask[4:] == 2).all()


def test_masks_of_a_few_planes_at_a_time_are_those_of_all_at_once(monkeypatch):
    probabilities = torch.rand(3, 7, 6, 5, generator=torch.Generator().manual_seed(0)).softmax(dim=0)
    whole = mask_of(probabilities, (17, 9, 8), _plan())
    monkeypatch.setattr("medvisionllama.inference.slabs._SLAB_BYTES", 1)
    for axis in range(3):
        assert np.array_equal(mask_of(probabilities, (17, 9, 8), _plan(), axis), whole)
        planes = probabilities.split(2, dim=axis + 1)
        pieces = native_mask(planes, (7, 6, 5), (17, 9, 8), _plan(), axis=axis)
        assert np.array_equal(pieces, whole)


def _monai_starts(size, window, overlap):
    """Steps of full length, and the last window at the end."""
    step = max(1, int(window * (1 - overlap)))
    return sorted({max(0, min(start, size - window)) for start in range(0, size - window + step, step)}) or [
        0
    ]


def _all_at_once(network, image, overlap, axis):
    """Every window, weighted by Gaussians that never vanish across a row nor along it, added up and divided."""

    def gaussian(size):
        return torch.exp(-((torch.arange(size) - (size - 1) / 2) ** 2) / (2 * (0.125 * size) ** 2))

    def starts(size, window):
        number = len(_monai_starts(size, window, overlap))
        return np.rint(np.linspace(0, size - window, number)).astype(int)

    along = gaussian(CROP[axis]).clamp_min(1e-3).view([-1 if dim == axis else 1 for dim in range(3)])
    across = torch.ones(CROP)
    for dim in {0, 1, 2} - {axis}:
        across = across * gaussian(CROP[dim]).view([-1 if other == dim else 1 for other in range(3)])
    weights = along * across.clamp_min(1e-3)
    total, count = torch.zeros(3, *image.shape[1:]), torch.zeros(image.shape[1:])
    for corner in itertools.product(*map(starts, image.shape[1:], CROP)):
        place = tuple(slice(start, start + size) for start, size in zip(corner, CROP, strict=True))
        total[(slice(None), *place)] += weights * network(image[(slice(None), *place)][None])[0]
        count[place] += weights
    return (total / count).softmax(dim=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(21, 19, 11), (8, 20, 4), (9, 9, 13)])
def test_blending_slab_by_slab_is_blending_all_windows_at_once(axis, overlap, shape):
    image, plan = _image(shape), _plan(flip_axes=())
    pieces = list(SlidingWindow(_OneSided(), plan, axis, overlap).probabilities(image, flip=False))
    torch.testing.assert_close(
        torch.cat(pieces, axis + 1), _all_at_once(_OneSided(), image, overlap, axis), atol=1e-5, rtol=1e-5
    )
    assert max(piece.shape[axis + 1] for piece in pieces) <= CROP[axis]


@pytest.mark.parametrize("window", [1, 8, 112])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.5, 0.75])
def test_windows_lie_evenly_from_end_to_end_as_many_as_in_full_steps(window, overlap):
    for size in range(1, 3 * window + 40):
        starts = window_starts(size, window, overlap)
        assert (starts[0], starts[-1]) == (0, max(0, size - window))
        gaps = np.diff(starts)
        assert not len(gaps) or (gaps.min() >= 1 and np.ptp(gaps) <= 1)
        assert not len(gaps) or gaps.max() <= max(1, int(window * (1 - overlap)))
        assert len(starts) == len(_monai_starts(size, window, overlap))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(21, 19, 11), (8, 20, 4), (5, 9, 3), (3, 30, 2)])
def test_windows_side_by_side_are_blended_as_monai_does_to_the_bit(axis, overlap, shape, monkeypatch):
    monkeypatch.setattr("medvisionllama.inference.windows.window_starts", _monai_starts)
    slab = _image(shape).narrow(axis + 1, 0, min(shape[axis], CROP[axis]))[None]
    expected = sliding_window_inference(
        slab, CROP, 1, _OneSided(), overlap=overlap, roi_weight_map=_row_weights(CROP, axis)
    )
    assert torch.equal(SlidingWindow(_OneSided(), _plan(), axis, overlap)._blend_row(slab), expected)


def test_only_one_slab_of_the_scan_is_normalised_at_a_time():
    seen = []

    def normalise(slab):
        seen.append(tuple(slab.shape))
        return slab - 100

    window = SlidingWindow(_Voxelwise(3), _plan(), 2, 0.5, normalise=normalise)
    shifted = list(window.probabilities(_image((9, 9, 20)) + 100, flip=True))
    expected = predict_probabilities(_Voxelwise(3), _image((9, 9, 20)), _plan(), overlap=0.5, flip=True)
    assert set(seen) == {(2, 9, 9, CROP[2])}
    torch.testing.assert_close(torch.cat(shifted, 3), expected, atol=1e-4, rtol=1e-4)


def test_slabs_run_along_the_longest_axis_that_is_not_mirrored():
    assert slab_axis((512, 512, 800), [_plan()]) == 2
    assert slab_axis((900, 512, 90), [_plan()]) == 1
    assert slab_axis((900, 512, 90), [_plan(flip_axes=())]) == 0
    assert slab_axis((900, 512, 90), [_plan(flip_axes=(0, 1, 2))]) == 0


def test_thick_slices_are_read_along_their_axis_where_views_are_turned():
    plan = _plan(spacing_mm=(1.0, 1.0, 5.0))
    assert slab_axis((900, 512, 10), [plan], turn=True) == 2
    assert slab_axis((900, 512, 10), [plan], turn=False) == 1


def test_the_plane_of_a_single_slice_is_turned_whatever_its_header_says():
    assert slab_axis((256, 200, 1), [_plan(spacing_mm=(1.0, 1.0, 1.0))], turn=True) == 2


def test_sagittal_slices_are_turned_though_their_axis_is_mirrored():
    plan = _plan(spacing_mm=(3.3, 0.9, 0.9), flip_axes=(0,))
    assert slab_axis((20, 256, 256), [plan], turn=True) == 0


def test_gradients_stay_on_between_the_pieces():
    planes = SlidingWindow(_Voxelwise(3), _plan(), 2, 0.5).probabilities(_image((9, 9, 20)), flip=False)
    next(planes)
    assert torch.is_grad_enabled()


def test_rows_are_added_up_on_a_gpu_that_has_room_for_them(monkeypatch):
    cpu, gpu, number = torch.device("cpu"), torch.device("cuda"), 3 * 512 * 512 * 96
    for free, place in ((80 * 2**30, gpu), (2 * 2**30, cpu)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 * 2**30))
        assert _place_of_sums(gpu, number) == place
        assert _place_of_sums(cpu, number) == cpu
