"""What comes piece by piece equals what would come at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medvisionllama.inference.slabs import (
    entropy,
    likeliest,
    native_slabs,
    slab_thickness,
)

sizes = st.integers(1, 9)
shapes = st.tuples(sizes, sizes, sizes)


@settings(max_examples=200, deadline=None)
@given(
    grid=shapes,
    shape=shapes,
    axis=st.integers(0, 2),
    thickness=st.integers(1, 10),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_slabs_joined_are_the_interpolated_whole(grid, shape, axis, thickness, cuts):
    whole = torch.randn(2, *grid, generator=torch.Generator().manual_seed(0))
    pieces, start = [], 0
    while start < grid[axis]:
        length = min(cuts[len(pieces) % len(cuts)], grid[axis] - start)
        pieces.append(whole.narrow(axis + 1, start, length))
        start += length
    slabs = list(native_slabs(iter(pieces), grid, shape, axis=axis, thickness=thickness))
    assert all(slab.shape[axis + 1] <= thickness for slab in slabs)
    expected = F.interpolate(whole[None], size=shape, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat(slabs, axis + 1), expected, atol=2e-5, rtol=2e-5)


def test_planes_are_asked_for_only_when_they_are_needed():
    asked = []

    def planes():
        for number in range(10):
            asked.append(number)
            yield torch.full((1, 1, 1, 1), float(number))

    slabs = native_slabs(planes(), (10, 1, 1), (10, 1, 1), axis=0, thickness=2)
    assert next(slabs).flatten().tolist() == [0.0, 1.0]
    assert len(asked) <= 3


@pytest.mark.parametrize("num_classes", [2, 3, 62, 300])
def test_the_likeliest_class_is_the_first_of_the_largest(num_classes):
    slab = torch.randn(num_classes, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    slab[1] = slab[0]
    np.testing.assert_array_equal(likeliest(slab), slab.numpy().argmax(axis=0))


def test_entropy_runs_from_certain_to_undecided():
    slab = torch.zeros(4, 1, 1, 3)
    slab[0, ..., 0] = 1
    slab[:, ..., 1] = 0.25
    slab[:2, ..., 2] = 0.5
    assert entropy(slab).flatten().tolist() == pytest.approx([0.0, 1.0, 0.5])


def test_a_slab_stays_small_and_is_never_empty():
    assert slab_thickness((512, 512, 800), 6, 2) == 10
    assert slab_thickness((20, 20, 20), 3, 0) == 20
    assert slab_thickness((4096, 4096, 10), 100, 2) == 1
