from dataclasses import replace

import numpy as np
import pytest

from medvisionllama.data.check.case_rules import value_findings
from medvisionllama.data.check.findings import TITLES, Finding, raise_first
from medvisionllama.data.check.listing import scans_in
from medvisionllama.data.check.outliers import find_outliers
from medvisionllama.data.check.patients import patient_findings, patient_name_findings
from medvisionllama.data.check.rules import (
    class_findings,
    ct_findings,
    duplicate_findings,
    intensity_findings,
    outlier_findings,
)
from medvisionllama.data.index import Case, patient_of
from medvisionllama.errors import DataError


def codes(findings):
    return [finding.code for finding in findings]


def box(size=2, value=1, shape=(6, 7, 8)):
    label = np.zeros(shape, np.uint8)
    label[1 : 1 + size, 1 : 1 + size, 1 : 1 + size] = value
    return label


def test_a_case_without_fault_gives_no_finding(case_facts):
    assert value_findings(case_facts(label=box()), ("MRI",), {1: "organ"}) == []


def test_undeclared_values_are_listed_and_undeclared_classes_allow_all(case_facts):
    case = case_facts(label=box(value=7))
    (finding,) = value_findings(case, ("MRI",), {1: "organ"})
    assert finding.code == "label-undeclared"
    assert "label value 7, which the dataset does not declare (0 background, 1 organ)" in finding.message
    assert value_findings(case, ("MRI",), {}) == []


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(-1024, 3071, False), (-100, 200, False), (0, 4095, True), (-60_000, 10, True), (-1000, 90_000, True)],
)
def test_ct_must_be_in_hounsfield_units(case_facts, low, high, found):
    image = np.linspace(low, high, 6 * 7 * 8).reshape(6, 7, 8)
    assert ("ct-not-hu" in codes(value_findings(case_facts(image=image), ("CT",), {}))) is found
    assert "ct-not-hu" not in codes(value_findings(case_facts(image=image), ("MRI",), {}))


def test_an_outlier_is_both_far_and_unusual():
    usual = {str(number): 10.0 for number in range(9)}
    assert find_outliers({**usual, "far": 21}, factor=2) == {"far": (21, pytest.approx(10))}
    assert find_outliers({**usual, "near": 19}, factor=2) == {}
    # The same distance among values that vary as much is nothing unusual.
    wide = {str(number): 10.0 * 3 ** (number % 5 - 2) for number in range(10)}
    assert find_outliers({**wide, "far": 21}, factor=2) == {}


def test_there_are_no_outliers_among_a_few_or_among_zeros():
    assert find_outliers({**{str(n): 1.0 for n in range(6)}, "far": 100}, factor=2) == {}
    assert find_outliers({**{str(n): 1.0 for n in range(9)}, "none": 0.0}, factor=2) == {}


def test_volumes_are_compared_class_by_class_in_millilitres(case_facts):
    cases = [case_facts(f"c{n}", label=box(2), affine=np.diag([10.0, 10, 10, 1])) for n in range(8)]
    cases.append(case_facts("large", label=box(4), affine=np.diag([10.0, 10, 10, 1])))
    (finding,) = outlier_findings(cases, {1: "or{gan}"})
    assert finding.cases == ("large",)
    assert "or{gan} has 64 ml, the median is 8 ml" in finding.message


def test_duplicates_within_a_patient_are_less_than_across(case_facts):
    same = [case_facts("a", patient="p", seed=1), case_facts("b", patient="p", seed=1)]
    assert codes(duplicate_findings(same)) == ["duplicate-within-patient"]
    (finding,) = duplicate_findings([*same, case_facts("c", seed=1), case_facts("d", seed=2)])
    assert (finding.code, finding.severity) == ("duplicate-across-patients", "error")
    assert finding.cases == ("a", "b", "c")


def test_equal_labels_count_only_if_large_and_on_different_images(case_facts):
    def pair(label, seeds=(1, 2)):
        return [case_facts(str(n), label=label, seed=seed) for n, seed in enumerate(seeds)]

    assert codes(duplicate_findings(pair(box(4)))) == ["duplicate-label"]
    assert duplicate_findings(pair(box(3))) == []
    assert codes(duplicate_findings(pair(box(4), (1, 1)))) == ["duplicate-across-patients"]


def test_constant_images_are_no_duplicates(case_facts):
    assert duplicate_findings([case_facts(name, image=np.ones((4, 4, 4))) for name in "ab"]) == []


@pytest.mark.parametrize(
    ("lows", "channel", "found"),
    [
        ((-1024, -1000, -2000), "channel 0", True),
        ((-1024, -1000, 0), "MRI", True),
        ((-1024, 0, 0), "MRI", False),
        ((-3, -3, -3), "MRI", False),
        ((-1024, -1000, -2000), "CT", False),
    ],
)
def test_ct_that_nobody_calls_so_is_named(case_facts, lows, channel, found):
    cases = [
        case_facts(str(n), image=np.linspace(low, 1500, 6 * 7 * 8).reshape(6, 7, 8))
        for n, low in enumerate(lows)
    ]
    assert codes(ct_findings(cases, (channel,))) == ["ct-undeclared"] * found


def test_a_name_that_a_shell_would_take_apart_is_quoted(case_facts):
    same = [case_facts(name, seed=1) for name in ("Pat 03 (a)", "Pat 04 (b)")]
    (finding,) = duplicate_findings(same)
    assert "(--exclude 'Pat 04 (b)' here, --set 'data.exclude=Pat 04 (b)' in train)" in finding.message


def test_a_mixture_of_scales_is_one_finding_and_needs_more_than_one_odd_case(case_facts):
    def cases(factors):
        return [
            case_facts(f"c{n}", image=factor * np.random.default_rng(n).normal(100, 10, (6, 7, 8)))
            for n, factor in enumerate(factors)
        ]

    assert codes(intensity_findings(cases([1] * 8 + [50]), ("MRI",))) == ["intensity-outlier"]
    assert codes(intensity_findings(cases([1] * 6 + [50] * 4), ("MRI",))) == ["intensity-mixture"]
    assert codes(intensity_findings(cases([1] * 6 + [50] * 4), ("CT",))) == ["ct-mixture"]
    assert intensity_findings(cases([1] * 6 + [3] * 4), ("MRI",)) == []


def test_classes_that_are_never_met_are_named_once(case_facts):
    found = class_findings([case_facts(label=box())], {1: "organ", 2: "tumour"})
    assert codes(found) == ["class-unseen"]
    assert "class 2 (tumour)" in found[0].message
    empty = class_findings([case_facts(label=box(0))], {1: "organ"})
    assert codes(empty) == ["all-labels-empty"]


def test_nameless_values_that_only_some_labels_hold_are_pointed_out(case_facts):
    ones, many = case_facts("a", label=box()), case_facts("b", label=255 * box().astype(np.uint8))
    [found] = class_findings([ones, ones, many], {})
    assert (found.code, found.severity) == ("values-uneven", "warning")
    assert "1 (1 lack it), 255 (2 lack it)" in found.message
    assert "if one class is written in two ways (1 and 255)" in found.message
    both = case_facts("c", label=box() + 1)
    assert class_findings([both, both], {}) == []
    assert class_findings([ones, many], {1: "a", 255: "b"}) == []


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        (["p01_a", "p01_b", "p02_a", "p02_b"], True),
        (["p01.1", "p01.2", "p02.1", "p02.2", "p03.1"], True),
        (["P01_a", "p01_b", "P02_a", "p02_b"], True),
        (["P001", "P001_2", "P002", "P002_2", "P003"], True),
        (["P001", "P001b", "P002", "P002b", "P003"], True),
        ([f"hippocampus_{n:03d}" for n in range(9)], False),
        ([f"brats_2013_pat000{n}_1" for n in range(5)], False),
        ([f"site1_{n:03d}" for n in range(40)], False),
    ],
)
def test_names_that_differ_in_their_ending_may_be_one_patient(names, alike):
    findings = patient_name_findings(cases_of(names))
    assert codes(findings) == (["patient-names"] if alike else [])
    for found in findings:
        pattern = found.message.rsplit("as '", 1)[1].removesuffix("'")
        first, second, third = (patient_of(name, pattern).casefold() for name in names[:3])
        assert first == second != third


def cases_of(names, patient=lambda name: name):
    return [Case(name, patient(name), (), None) for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ["P07_LEFT", "P07_RIGHT", "P08_LEFT"],
        ["left_07", "right_07", "left_08"],
        ["SC-HF-07_L", "SC-HF-07_R", "SC-HF-08_L"],
        ["A12_baseline_ct", "A12_followup_ct", "A13_baseline_ct"],
        ["A12-week-0", "A12-week-12", "A13-week-0"],
        ["A12_1_ct", "A12_2_ct", "A13_1_ct", "A13_2_ct"],
        ["A12_T1w", "A12_T2w", "A13_T1w", "A13_T2w"],
        ["p01-1", "p01-2", "p02-1", "p02-2", "p03-1"],
        ["1001_10001", "1001_10002", "1002_10003", "1002_10004"],
        ["OAS30001_MR_d0129", "OAS30001_MR_d0757", "OAS30002_MR_d0371", "OAS30002_MR_d0653"],
        ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000", "BraTS-GLI-00002-001"],
        ["20200115_P001", "20210301_P001", "20200115_P002"],
        ["4711_20200115_3", "4711_20200720_4", "4712_20200115_1"],
        ["P001_15.01.2020", "P001_20.07.2020", "P002_15.01.2020"],
        ["P001", "P001_followup", "P002"],
        ["Pat 3", "Pat 3 (post)", "Pat 4"],
        ["P001 1", "P001 2", "P002 1", "P002 2"],
        ["P001 (1)", "P001 (2)", "P002 (1)", "P002 (2)"],
        ["Smith_J", "Smith_J_2021-09-10_2", "Miller_K"],
        ["P001", "P001_20200720_2", "P002"],
        ["PAT_01012001_20200115_3", "PAT_01012001_20200720_4", "PAT_02022002_20200115_1"],
    ],
)
def test_names_that_differ_in_a_side_or_a_visit_are_rather_one_patient(names):
    (found,) = patient_name_findings(cases_of(names))
    assert (found.code, found.severity) == ("patients-alike", "warning")
    assert f"as {names[0]} and {names[1]};" in found.message
    assert "--set data.patient_pattern" in found.message
    assert {names[0], names[1]} <= set(found.cases)
    pattern = found.message.rsplit("as '", 1)[1].removesuffix("'")
    joined = [patient_of(name, pattern) for name in names]
    assert joined[0] == joined[1] != joined[2 if len(names) == 3 else -1]


@pytest.mark.parametrize(
    "names",
    [
        [f"OAS1_{n:04d}_MR1" for n in range(1, 40)],
        [f"site{site}_{n:03d}_T1w" for site in (1, 2, 3) for n in range(3)],
        [f"ct_train_{n}" for n in range(5)] + [f"mr_train_{n}" for n in range(5)],
        ["liver_left", "liver_right", "spleen_1"],
        [f"brats_2013_pat{n:04d}_1" for n in range(6)],
        [f"hippocampus_{n:03d}" for n in range(6)],
        [f"case_{n:04d}" for n in range(3)],
        [f"FLARE22_Tr_{n:04d}" for n in range(5)],
        [f"BraTS-GLI-{n:05d}-000" for n in range(5)],
        [f"{n}_{10 * n}" for n in range(1001, 1009)],
        [f"site{site}_{n:03d}" for site in (1, 2, 3) for n in range(3)],
        ["liver_1", "liver_2", "spleen_1", "spleen_2"],
        ["p01_1", "p01_2", *(f"p{n:02d}_1" for n in range(2, 9))],
        ["site2_20200115_001", "site2_20200720_002", "site3_20200115_003"],
        [f"LiTS17_20200115_P{n:03d}" for n in range(9)],
        ["KH1_20200115_P001", "KH1_20200116_P002", "KH1_20200117_P003"],
        ["liver_20200115_4711", "liver_20200116_4712", "liver_20200117_4713"],
    ],
)
def test_names_that_number_patients_are_no_sides_or_visits(names):
    assert "patients-alike" not in codes(patient_name_findings(cases_of(names)))


def test_patients_that_differ_in_capital_letters_are_named():
    names = ["p001_frame01", "P001_frame02", "p002_frame01", "p002_frame02", "p003_frame01"]
    (found,) = patient_name_findings(cases_of(names, patient_of))
    assert (found.code, found.cases) == ("patients-alike", ("p001_frame01", "P001_frame02"))
    assert "in small and capital letters only, as P001 and p001;" in found.message
    assert patient_name_findings(cases_of(names[2:], patient_of)) == []


def test_a_visit_in_brackets_is_a_visit():
    names = [f"Pat {number:02d} ({when})" for number in (3, 4) for when in ("pre", "post")]
    (found,) = patient_name_findings(cases_of(names, patient_of))
    assert (found.code, found.cases) == ("patients-alike", tuple(names))
    pattern = found.message.rsplit("as '", 1)[1].removesuffix("'")
    assert [patient_of(name, pattern) for name in names] == ["Pat 03", "Pat 03", "Pat 04", "Pat 04"]


def test_letters_small_or_capital_hide_no_visit():
    names = ["p001_1", "P001_2", "p002_1", "P002_2", "p003_1"]
    (found,) = patient_name_findings(cases_of(names))
    assert (found.code, found.cases) == ("patients-alike", tuple(names[:4]))


def test_a_patient_with_far_more_scans_than_others_may_be_several():
    study = [f"LiTS17_scan_{n:03d}" for n in range(12)]
    others = ["p01_scan_1", "p01_scan_2", "p02_scan_1", "p03_scan_1"]
    (found,) = patient_name_findings(cases_of([*study, *others], patient_of))
    assert (found.code, found.cases) == ("patient-crowded", tuple(study))
    assert "12 scans count as one patient, LiTS17 (LiTS17_scan_000" in found.message
    assert "--set data.patient_pattern" in found.message
    frames = [f"p{patient}_frame{n}" for patient in range(3) for n in range(30)]
    assert patient_name_findings(cases_of(frames, patient_of)) == []


def test_fewer_than_three_patients_cannot_be_divided():
    assert codes(patient_findings(cases_of(["a1", "a2"]))) == ["too-few-patients"]
    assert patient_findings(cases_of(["a1", "a2", "a3"])) == []


def test_every_code_has_one_severity_and_errors_raise():
    assert {Finding(code, "x").severity for code in TITLES} == {"error", "warning", "note"}
    raise_first([Finding("label-empty", "x")], None)
    with pytest.raises(DataError, match=r"^one$"):
        raise_first([Finding("label-empty", "x"), Finding("unreadable", "one")], None)


def test_scans_are_files_we_read_and_folders_of_slices(tmp_path):
    names = [
        "a.nii.gz",
        "b/c.mha",
        "study/one/1.dcm",
        "study/one/2.dcm",
        "study/two/x",
        "notes.txt",
        ".h.nii",
    ]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(128) + (b"DICM" if name.endswith("x") else b"text"))
    found = {path.relative_to(tmp_path).as_posix() for path in scans_in(tmp_path)}
    assert found == {"a.nii.gz", "b/c.mha", "study/one", "study/two"}
    assert scans_in(tmp_path / "a.nii.gz") == [tmp_path / "a.nii.gz"]


def test_a_finding_on_a_channel_names_the_file_that_holds_it(case_facts):
    one, two = case_facts("a"), case_facts("b", image=np.full((6, 7, 8), np.nan))
    both = replace(one, images=(*one.images, *two.images), channels=(*one.channels, *two.channels))
    (finding,) = value_findings(both, ("T1", "T2"), {})
    assert finding.code == "image-not-finite"
    assert str(finding.file).endswith("b.nii.gz")
    assert "b.nii.gz channel 1 (T2): 336 voxels are NaN" in finding.message
