import pytest
import torch
from torch import nn

from medvisionllama.networks.heads import _overlapping
from medvisionllama.networks.layers import Rise
from medvisionllama.training.kernels import reshaped


def with_weight_of(before, now):
    with torch.no_grad():
        now.weight.copy_(reshaped(before.weight, before, now))
        if now.bias is not None:
            now.bias.copy_(before.bias)
    return now


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def slices(depth=5):
    return torch.randn(1, 3, 8, 8, depth)


def test_what_looks_at_a_slice_looks_at_the_middle_of_three():
    flat = nn.Conv3d(3, 4, (3, 3, 1), padding=(1, 1, 0))
    deep = with_weight_of(flat, nn.Conv3d(3, 4, 3, padding=1))
    image = slices()
    torch.testing.assert_close(deep(image), flat(image))


def test_what_looks_at_three_slices_sees_one_as_if_all_were_alike():
    deep = nn.Conv3d(3, 4, 3, padding=(1, 1, 0))
    flat = with_weight_of(deep, nn.Conv3d(3, 4, (3, 3, 1), padding=(1, 1, 0)))
    image = slices(1)
    torch.testing.assert_close(flat(image), deep(image.expand(-1, -1, -1, -1, 3)))


@pytest.mark.parametrize("make", [Rise, _overlapping])
def test_what_is_written_to_one_voxel_is_written_to_each_of_two(make):
    flat = make(3, 4, (2, 2, 1))
    deep = with_weight_of(flat, make(3, 4, (2, 2, 2)))
    grid = slices(1).expand(-1, -1, -1, -1, 4)
    # Boxes that overlap lack a neighbour at either end.
    inner = deep(grid)[..., 1:-1]
    torch.testing.assert_close(inner, flat(grid)[..., :1].expand_as(inner))
    again = with_weight_of(deep, make(3, 4, (2, 2, 1)))
    torch.testing.assert_close(again.weight, flat.weight)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (nn.Conv3d(3, 4, 8, stride=8), nn.Conv3d(3, 4, 16, stride=16)),
        # A patch of an even number of voxels has no middle.
        (nn.Conv3d(3, 4, (4, 4, 1)), nn.Conv3d(3, 4, (4, 4, 4))),
        (nn.Conv3d(3, 4, (1, 4, 4)), nn.Conv3d(3, 4, (3, 8, 8))),
        (nn.Conv3d(4, 4, (3, 3, 1)), nn.ConvTranspose3d(4, 4, 3)),
        (nn.Conv3d(3, 4, (3, 3, 1)), nn.Conv3d(3, 4, (3, 3, 1))),
    ],
)
def test_others_stay_as_they_are(before, now):
    assert reshaped(before.weight, before, now) is before.weight
