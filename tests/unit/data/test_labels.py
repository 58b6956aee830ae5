"""A cropped segmentation lands where it was cut from, and nothing else is moved."""

from pathlib import Path

import numpy as np
import pytest

from medvisionllama.data.labels import check_class_names, label_on_grid, offset_in, on_one_grid, whole_label
from medvisionllama.data.volume import Volume
from medvisionllama.errors import DataError

WHOLE = (10, 12, 14)
AFFINE = np.array([[1.5, 0.2, 0, 5], [-0.2, 1.5, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1.0]])
SEGMENTATION = Path("a.seg.nrrd")


def cut(label, start, size):
    x, y, z = (slice(first, first + length) for first, length in zip(start, size, strict=True))
    affine = AFFINE.copy()
    affine[:3, 3] = (AFFINE @ [*start, 1])[:3]
    return Volume(label[x, y, z], affine)


@pytest.mark.parametrize(
    ("start", "size"), [((0, 0, 0), (3, 4, 5)), ((7, 8, 9), (3, 4, 5)), ((2, 3, 4), (1, 1, 1))]
)
def test_a_part_is_put_back_where_it_was(start, size):
    label = np.zeros(WHOLE, np.uint8)
    x, y, z = (slice(first, first + length) for first, length in zip(start, size, strict=True))
    label[x, y, z] = np.random.default_rng(0).integers(1, 5, size)
    found = whole_label(SEGMENTATION, cut(label, start, size), WHOLE, AFFINE)
    np.testing.assert_array_equal(found.array, label)
    np.testing.assert_array_equal(found.affine, AFFINE)


@pytest.mark.parametrize(
    ("shift", "zoom"), [((0.5, 0, 0), 1), ((-50, 0, 0), 1), ((50, 0, 0), 1), ((0, 0, 0), 1.1)]
)
def test_what_is_no_part_stays_as_it_is(shift, zoom):
    part = cut(np.ones(WHOLE, np.uint8), (2, 3, 4), (3, 4, 5))
    part.affine[:3, 3] += shift
    part.affine[:3, :3] *= zoom
    assert offset_in(part.shape, part.affine, WHOLE, AFFINE) is None
    assert whole_label(SEGMENTATION, part, WHOLE, AFFINE) is part


def test_a_cropped_nifti_label_is_a_mistake_and_stays_one():
    part = cut(np.ones(WHOLE, np.uint8), (0, 0, 0), (9, 12, 14))
    assert whole_label(Path("a.nii.gz"), part, WHOLE, AFFINE) is part


@pytest.mark.parametrize("name", ["a.nii.gz", "a.seg.nrrd"])
def test_a_label_of_other_axes_is_turned_onto_the_grid_of_its_image(name):
    label = np.random.default_rng(0).integers(0, 3, WHOLE).astype(np.uint8)
    # Stored as inferior, posterior, right: axis 0 of the file is -z, axis 1 is -y, axis 2 is x.
    turn = np.array([[0, 0, 1, 0], [0, -1, 0, 11], [-1, 0, 0, 13], [0, 0, 0, 1.0]])
    stored = np.ascontiguousarray(label.transpose(2, 1, 0)[::-1, ::-1])
    found = label_on_grid(Path(name), Volume(stored, AFFINE @ turn), WHOLE, AFFINE)
    np.testing.assert_array_equal(found.array, label)
    np.testing.assert_allclose(found.affine, AFFINE)


@pytest.mark.parametrize(
    "label",
    [
        cut(np.ones(WHOLE, np.uint8), (0, 0, 0), (9, 12, 14)),
        Volume(np.ones(WHOLE, np.uint8), AFFINE + np.eye(4, k=3)),
    ],
    ids=["cropped", "moved by a millimetre"],
)
def test_a_label_of_another_grid_is_refused(label):
    with pytest.raises(DataError, match=r"a\.nii\.gz is not on the grid of its image"):
        label_on_grid(Path("a.nii.gz"), label, WHOLE, AFFINE)


@pytest.mark.parametrize("second", [((4, 1, 3), (5, 6, 7)), ((2, 3, 4), (3, 4, 5)), ((0, 0, 0), WHOLE)])
def test_two_crops_of_one_grid_meet_on_the_smallest_that_holds_both(second):
    label = np.random.default_rng(0).integers(0, 3, WHOLE).astype(np.uint8)
    first = cut(label, (2, 3, 4), (3, 4, 5))
    other = cut(label, *second)
    ours, theirs = on_one_grid(first, other)
    ends = [np.add(*place) for place in (((2, 3, 4), (3, 4, 5)), second)]
    smallest = np.maximum(*ends) - np.minimum((2, 3, 4), second[0])
    assert ours.shape == theirs.shape == tuple(smallest)
    np.testing.assert_allclose(ours.affine, theirs.affine)
    both = (ours.array > 0) & (theirs.array > 0)
    np.testing.assert_array_equal(ours.array[both], theirs.array[both])
    assert ours.array.sum() == first.array.sum()
    assert theirs.array.sum() == other.array.sum()


def test_crops_of_other_voxels_stay_as_they_are():
    first = cut(np.ones(WHOLE, np.uint8), (2, 3, 4), (3, 4, 5))
    second = cut(np.ones(WHOLE, np.uint8), (2, 3, 4), (3, 4, 6))
    second.affine[:3, 3] += 0.4
    assert on_one_grid(first, second) == (first, second)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-tumour", "@liver", "liver\x1b[2J", "liver\n"])
def test_names_that_a_table_or_a_terminal_would_obey_are_refused(name):
    with pytest.raises(DataError, match="begins as a formula does in a table"):
        check_class_names({1: "edge=1", 2: name}, Path("dataset.json"))
    check_class_names({1: "edge=1", 2: "Zyste\u00a0Ü 肝"}, Path("dataset.json"))
