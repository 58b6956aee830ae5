import numpy as np
import pytest

from medvisionllama.data.cache import build_cache
from medvisionllama.data.index import Case
from medvisionllama.data.places import Place, fit_places
from medvisionllama.data.planning import Plan

SPACING = (1.0, 2.0, 4.0)


def make_plan(**changes):
    settings = {
        "channels": ("MRI",),
        "classes": {1: "one", 2: "two"},
        "merged": False,
        "resize": False,
        "spacing_mm": SPACING,
        "crop_size": (8, 8, 8),
        "strides": ((1, 1, 1), (2, 2, 2), (4, 4, 4)),
        "flip_axes": (),
    }
    return Plan(**settings | changes)


@pytest.fixture
def cases_of(write_nifti, tmp_path):
    """Preprocess labels `[x, y, z]` in RAS, stored with x and y mirrored if asked for."""

    def prepare(*labels, mirrored=False, **plan):
        signs = [-1, -1, 1] if mirrored else [1, 1, 1]
        affine = np.diag([*np.multiply(SPACING, signs), 1.0])
        cases = []
        for number, label in enumerate(labels):
            stored = label[::-1, ::-1] if mirrored else label
            image = write_nifti(tmp_path / f"{number}.nii.gz", np.ones(label.shape), affine, np.float32)
            written = write_nifti(tmp_path / f"{number}-label.nii.gz", stored, affine, np.uint8)
            cases.append(Case(str(number), str(number), (image,), written))
        return build_cache(cases, make_plan(**plan), folder=tmp_path / "cache")

    return prepare


def box(start, size, *, value=1, shape=(21, 21, 11)):
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))] = value
    return label


def spread(size, edge):
    """Deviation of a row of voxels, each as wide as it is."""
    return size * edge / np.sqrt(12)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_place_is_measured_from_the_scan_s_middle_in_millimetres(cases_of, mirrored):
    # Voxels 14 to 16 have their middle 5 voxels to the right of 10; y 4 to 7 is 4.5 behind; z 5 is the middle.
    found = fit_places(cases_of(box((14, 4, 5), (3, 4, 1)), mirrored=mirrored), merged=False)
    assert found.classes == {1: found.foreground}
    assert found.foreground.mean_mm == pytest.approx((5, -9, 0))
    assert found.foreground.std_mm == pytest.approx((spread(3, 1), spread(4, 2), spread(1, 4)), rel=1e-3)


@pytest.mark.parametrize(
    "grid", [{"spacing_mm": (2.0, 4.0, 4.0)}, {"resize": True, "crop_size": (24, 12, 24)}]
)
def test_the_grid_of_training_changes_no_place(cases_of, grid):
    label = box((12, 4, 4), (6, 8, 4), shape=(24, 24, 12))
    whole, other = (fit_places(cases_of(label, **plan), merged=False).foreground for plan in ({}, grid))
    assert whole.mean_mm == pytest.approx((3, -8, 0))
    assert other.mean_mm == pytest.approx(whole.mean_mm)
    assert other.std_mm == pytest.approx(whole.std_mm)


def test_each_scan_counts_once_and_its_own_place_adds_to_the_spread(cases_of):
    found = fit_places(
        cases_of(box((2, 8, 4), (3, 4, 2)), box((16, 8, 4), (5, 4, 2))), merged=False
    ).foreground
    small, large = -7, 8
    assert found.mean_mm[0] == pytest.approx((small + large) / 2, rel=1e-3)
    within = (spread(3, 1) ** 2 + spread(5, 1) ** 2) / 2
    assert found.std_mm[0] == pytest.approx(np.sqrt(within + ((large - small) / 2) ** 2), rel=1e-3)


def test_classes_have_places_of_their_own_and_weigh_by_volume_together(cases_of):
    label = box((0, 8, 4), (2, 4, 2)) + box((15, 8, 4), (6, 4, 2), value=2)
    found = fit_places(cases_of(label), merged=False)
    assert {value: place.mean_mm[0] for value, place in found.classes.items()} == pytest.approx(
        {1: -9.5, 2: 7.5}
    )
    assert found.foreground.mean_mm[0] == pytest.approx((-9.5 * 2 + 7.5 * 6) / 8, rel=1e-3)
    merged = fit_places(cases_of(label), merged=True)
    assert merged.classes == {1: merged.foreground}


def test_empty_labels_have_no_place_and_do_not_count(cases_of):
    empty, full = np.zeros((21, 21, 11), np.uint8), box((14, 4, 5), (3, 4, 1))
    assert fit_places(cases_of(empty), merged=False) is None
    assert fit_places(cases_of(full, empty), merged=False).foreground.mean_mm == pytest.approx((5, -9, 0))


def test_distances_are_counted_in_twice_the_deviation():
    place = Place(mean_mm=(1.0, 0.0, 0.0), std_mm=(1.0, 2.0, 5.0))
    x, y, z = place.distances((5, 3, 2), (1.0, 4.0, 20.0))
    np.testing.assert_allclose(x, [2.25, 1, 0.25, 0, 0.25])
    np.testing.assert_allclose(y, [1, 0, 1])
    np.testing.assert_allclose(z, [1, 1])


def test_places_are_stored_and_are_no_decision(cases_of):
    plan = make_plan()
    measured = plan.model_copy(
        update={"places": fit_places(cases_of(box((1, 1, 1), (2, 2, 2))), merged=False)}
    )
    assert Plan.model_validate_json(measured.model_dump_json()) == measured
    assert measured.decisions == plan.decisions
