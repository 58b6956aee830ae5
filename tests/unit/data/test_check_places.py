import numpy as np
import pytest

from medvisionllama.data.check.places import (
    axis_order_findings,
    identity_findings,
    mirror_findings,
    orientation_findings,
    side_findings,
    storage_findings,
)
from medvisionllama.data.check.storage import Storage

MM = Storage(np.eye(4), None, "mm")
UNSET = Storage(None, None, "mm")


def codes(findings):
    return [finding.code for finding in findings]


def label(*places, shape=(20, 6, 6)):
    """Slabs of class 1, 2, ... that begin at these places along x."""
    array = np.zeros(shape, np.uint8)
    for value, place in enumerate(places, start=1):
        array[place : place + 3] = value
    return array


def image(shape=(20, 6, 6)):
    return np.random.default_rng(0).normal(size=shape)


def test_a_mirrored_label_among_many_is_found(case_facts):
    cases = [case_facts(f"c{n}", image=image(), label=label(2 + n % 2)) for n in range(11)]
    assert mirror_findings(cases) == []
    (finding,) = mirror_findings([*cases, case_facts("odd", image=image(), label=label(15))])
    assert finding.cases == ("odd",)
    assert "0.82 of the way left to right, in the other cases at 0.20" in finding.message


def test_organs_that_come_on_both_sides_and_labels_in_the_middle_raise_no_alarm(case_facts):
    either = [case_facts(f"c{n}", image=image(), label=label(2 if n % 2 else 15)) for n in range(12)]
    assert mirror_findings(either) == []
    middle = [case_facts(f"c{n}", image=image(), label=label(8)) for n in range(11)]
    assert mirror_findings([*middle, case_facts("odd", image=image(), label=label(9))]) == []


@pytest.mark.parametrize(
    "names", [("left kidney", "right kidney"), ("Kidney_L", "kidney r"), ("lung-left", "Lung-Right")]
)
def test_named_sides_are_compared_between_cases(case_facts, names):
    classes = dict(enumerate(names, start=1))
    cases = [case_facts(f"c{n}", image=image(), label=label(2, 14)) for n in range(6)]
    assert side_findings(cases, classes) == []
    odd = case_facts("odd", image=image(), label=label(14, 2))
    (finding,) = side_findings([*cases, odd], classes)
    assert (finding.code, finding.cases) == ("sides-swapped", ("odd",))
    all_odd = [case_facts(f"c{n}", image=image(), label=label(14, 2)) for n in range(6)]
    assert codes(side_findings(all_odd, classes)) == ["sides-unusual"]
    assert side_findings([*cases, odd], {1: "anterior", 2: "posterior"}) == []


def test_sizes_that_fit_after_exchanging_axes_are_found(case_facts):
    cases = [case_facts(f"c{n}", image=image((10 + n % 2, 16, 24))) for n in range(12)]
    assert axis_order_findings(cases) == []
    (finding,) = axis_order_findings([*cases, case_facts("odd", image=image((24, 16, 10)))])
    assert finding.cases == ("odd",)
    # Another size in no other order.
    assert axis_order_findings([*cases, case_facts("long", image=image((10, 16, 40)))]) == []


def test_orientations_are_noted_only_where_they_differ(case_facts):
    plain, turned = case_facts("a"), case_facts("b", affine=np.diag([-1.0, -1, 1, 1]))
    assert orientation_findings([plain, plain]) == []
    (finding,) = orientation_findings([plain, plain, turned])
    assert finding.severity == "note"
    assert finding.cases == ("b",)
    assert "2 × RAS, 1 × LPS" in finding.message


def test_an_unset_place_is_a_warning_among_set_ones_and_a_note_if_all_are_unset(case_facts):
    assert codes(storage_findings([case_facts(storage=UNSET)] * 3)) == ["placement-unset"]
    mixed = storage_findings([case_facts(storage=MM), case_facts("b", storage=UNSET)])
    assert codes(mixed) == ["affine-unset"]
    assert mixed[0].cases == ("b",)
    assert storage_findings([case_facts(storage=MM)]) == []
    # Other formats store one matrix and no code.
    assert storage_findings([case_facts(storage=None)]) == []


def test_the_identity_is_suspicious_only_where_others_have_a_real_place(case_facts):
    real = [case_facts(f"c{n}", affine=np.diag([1.0, 1, 3, 1])) for n in range(6)]
    assert codes(identity_findings([*real, case_facts("lost")])) == ["affine-unset"]
    assert identity_findings(real) == []
    assert identity_findings([case_facts(f"c{n}") for n in range(6)]) == []
    crops = [case_facts(f"c{n}", affine=np.eye(4) + np.eye(4, k=3)) for n in range(6)]
    assert identity_findings([*crops, case_facts("first")]) == []


def test_rounding_between_two_matrices_is_no_disagreement(case_facts):
    near = Storage(np.eye(4), np.diag([1.0001, 1, 1, 1]), "mm")
    far = Storage(np.eye(4), np.diag([-1.0, 1, 1, 1]), "mm")
    assert storage_findings([case_facts(storage=near)]) == []
    assert codes(storage_findings([case_facts(storage=far)])) == ["sform-qform"]


def test_shear_is_told_from_rotation(case_facts):
    angle = np.radians(30)
    turned, sheared = np.eye(4), np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    sheared[1, 2] = np.tan(np.radians(10))
    assert storage_findings([case_facts(affine=turned)]) == []
    (finding,) = storage_findings([case_facts(affine=sheared)])
    assert "10.0 degrees off a right angle" in finding.message


@pytest.mark.parametrize(("unit", "code"), [("meter", "spacing-unit"), ("unknown", "unit-unset")])
def test_units_other_than_millimetres_are_found(case_facts, unit, code):
    assert codes(storage_findings([case_facts(storage=Storage(np.eye(4), None, unit))])) == [code]
