import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvisionllama.config import DataConfig
from medvisionllama.data.check.headers import check_headers
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import index_dataset, open_configured, open_dataset, patient_of
from medvisionllama.data.splits import make_splits, select
from medvisionllama.errors import DataError


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    """Make empty files in a folder, and its dataset.json; an index looks at names, and at few headers."""

    def make(*names: str, content: object = None) -> Path:
        root = tmp_path / "Task"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        if content is not None:
            root.mkdir(exist_ok=True)
            (root / "dataset.json").write_text(json.dumps(content))
        return root

    return make


def msd(*cases: str, **extra: object) -> dict[str, object]:
    entries = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
    return {"labels": {"0": "background", "1": "tumour"}, "training": entries, **extra}


def pairs(*cases: str) -> list[str]:
    return [f"{folder}/{case}.nii.gz" for case in cases for folder in ("imagesTr", "labelsTr")]


def refusal(root: Path, **arguments: str) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(root, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_msd_folder_is_indexed(dataset_folder):
    root = dataset_folder("Liver", num_cases=3, channels=("FLAIR", "T1c"), values=(2, 5))
    dataset = open_dataset(root)
    assert (dataset.name, dataset.root) == ("Liver", root)
    assert dataset.channels == ("FLAIR", "T1c")
    assert dataset.classes == {2: "Anterior", 5: "Posterior"}
    assert [case.case_id for case in dataset.cases] == ["case_000", "case_001", "case_002"]
    assert dataset.cases[1].label == root / "labelsTr" / "case_001.nii.gz"


def test_frames_of_one_patient_share_a_patient(dataset_folder):
    dataset = open_dataset(dataset_folder(num_cases=2, frames=2))
    assert dataset.patients == {
        "case_000_frame01": "case_000",
        "case_000_frame02": "case_000",
        "case_001_frame01": "case_001",
        "case_001_frame02": "case_001",
    }


def test_classes_and_channels_are_sorted_as_numbers(files):
    labels = {"10": "j", "2": "b", "0": "background"}
    modality = {str(number): f"m{number}" for number in reversed(range(11))}
    dataset = open_dataset(files(*pairs("a"), content=msd("a", labels=labels, modality=modality)))
    assert list(dataset.classes) == [2, 10]
    assert dataset.channels[2] == "m2"


def test_an_nnunet_folder_with_two_channels_is_indexed(files):
    names = ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz", "labelsTr/._a.nii.gz")
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "b": 2, "a": 1}}
    root = files(*names, content=content)
    dataset = open_dataset(root)
    assert dataset.channels == ("T1", "T2")
    assert list(dataset.classes.items()) == [(1, "a"), (2, "b")]
    assert [case.case_id for case in dataset.cases] == ["a"]
    assert dataset.cases[0].images == (root / names[0], root / names[1])
    assert dataset.cases[0].label == root / names[2]


def nnunet_with_a_list(*cases: str) -> dict[str, object]:
    return msd(*cases, channel_names={"0": "T1", "1": "T2"}, labels={"background": 0, "tumour": 1})


def test_an_nnunet_folder_may_have_a_training_list(files):
    names = [f"imagesTr/a_{n:04d}.nii.gz" for n in (0, 1)]
    root = files(*names, "labelsTr/a.nii.gz", content=nnunet_with_a_list("a"))
    dataset = open_dataset(root)
    assert (dataset.channels, dataset.classes) == (("T1", "T2"), {1: "tumour"})
    assert [path.name for path in dataset.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_channel_names_alone_make_no_nnunet_folder(files):
    content = msd("a", channel_names={"0": "T1"}, modality={"0": "T1"})
    dataset = open_dataset(files(*pairs("a"), content=content))
    assert (dataset.channels, dataset.classes) == (("T1",), {1: "tumour"})
    assert dataset.cases[0].images[0].name == "a.nii.gz"


@pytest.mark.parametrize(
    "content",
    [msd("a", labels={"0": "b", "-1": "x"}), {"channel_names": {"0": "T1"}, "labels": {"b": 0, "x": -1}}],
)
def test_a_negative_class_is_refused(files, content):
    words = refusal(files(*pairs("a"), "imagesTr/a_0000.nii.gz", content=content))
    assert "dataset.json: the class 'x' has the value -1; allowed: 0" in words


def test_paths_of_windows_are_read(files):
    entry = {"image": ".\\imagesTr\\a.nii.gz", "label": "labelsTr\\a.nii.gz"}
    root = files(*pairs("a"), "../outside.nii.gz", content=msd(training=[entry]))
    assert open_dataset(root).cases[0].images == (root / "imagesTr" / "a.nii.gz",)
    entry["image"] = "imagesTr\\..\\..\\outside.nii.gz"
    (root / "dataset.json").write_text(json.dumps(msd(training=[entry])))
    assert "outside the folder" in refusal(root)


def test_a_plain_folder_is_indexed(files, write_nifti):
    root = files("images/b.nii.gz", "images/a.nii", "labels/a.nii.gz", "labels/b.nii.gz", "images/notes.txt")
    write_nifti(root / "images" / "a.nii", np.zeros((3, 4, 5), np.float32))
    dataset = open_dataset(root)
    assert [case.case_id for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[0].images == (root / "images" / "a.nii",)
    assert (dataset.channels, dataset.classes) == (("channel 0",), {})


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX"])
def test_folders_of_the_system_are_no_cases(files, write_nifti, name):
    root = files("images/a.nii.gz", "labels/a.nii.gz")
    write_nifti(root / "images" / "a.nii.gz", np.zeros((3, 4, 5), np.float32))
    for folder in ("images", "labels"):
        (root / folder / name).mkdir()
        (root / folder / name / "a.nii.gz").touch()
    assert list(open_dataset(root).patients) == ["a"]


def test_a_plain_folder_of_4d_scans_has_their_channels(files, write_nifti):
    root = files("images/a.nii.gz", "labels/a.nii.gz")
    write_nifti(root / "images" / "a.nii.gz", np.zeros((3, 4, 5, 2), np.float32))
    assert open_dataset(root).channels == ("channel 0", "channel 1")


@pytest.mark.parametrize("names", [None, {"channels": ["CT"]}])
def test_the_first_scan_alone_does_not_say_how_many_channels_there_are(files, write_nifti, names):
    root = files(*(f"{folder}/{name}.nii.gz" for folder in ("images", "labels") for name in "abc"))
    for name, shape in (("a", (3, 4, 5, 2)), ("b", (3, 4, 5)), ("c", (3, 4, 5))):
        write_nifti(root / "images" / f"{name}.nii.gz", np.zeros(shape, np.float32))
        write_nifti(root / "labels" / f"{name}.nii.gz", np.ones((3, 4, 5), np.uint8))
    if names:
        (root / "names.json").write_text(json.dumps(names))
    _, findings = check_headers(open_dataset(root))
    assert [(finding.code, finding.cases) for finding in findings] == [("channel-count", ("a",))]


def test_a_plain_folder_with_two_channels_is_indexed(files):
    root = files("images/a_0001.nii.gz", "images/a_0000.nii.gz", "labels/a.nii.gz")
    dataset = open_dataset(root)
    assert dataset.channels == ("channel 0", "channel 1")
    assert [path.name for path in dataset.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_a_byte_order_mark_in_dataset_json_is_harmless(files):
    root = files(*pairs("a"), content=msd("a"))
    (root / "dataset.json").write_bytes(b"\xef\xbb\xbf" + (root / "dataset.json").read_bytes())
    assert len(open_dataset(root).cases) == 1


def test_a_missing_folder_is_refused(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "absent")


def test_an_empty_folder_is_refused_with_the_layouts(tmp_path):
    message = refusal(tmp_path)
    assert "dataset.json" in message
    assert "images/ and labels/" in message


@pytest.mark.parametrize("missing", ["imagesTr/b.nii.gz", "labelsTr/b.nii.gz"])
def test_an_absent_file_of_an_msd_folder_is_refused_by_name(files, missing):
    root = files(*pairs("a", "b"), content=msd("a", "b"))
    (root / missing).unlink()
    assert missing in refusal(root)


def test_the_lists_of_nnunet_s_first_version_name_cases_and_not_files(files):
    names = [f"imagesTr/a_{n:04d}.nii.gz" for n in (0, 1)]
    content = msd("a", modality={"0": "T1", "1": "T2"})
    dataset = open_dataset(files(*names, "labelsTr/a.nii.gz", content=content))
    (case,) = dataset.cases
    assert (case.case_id, dataset.channels) == ("a", ("T1", "T2"))
    assert [path.name for path in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


@pytest.mark.parametrize("names", [("kidney", "kidney"), ("foreground", "lesion")])
def test_a_run_s_classes_must_have_names_that_tables_tell_apart(files, names):
    labels = dict(zip("012", ("background", *names), strict=True))
    root = files(*pairs("a"), content=msd("a", labels=labels))
    with pytest.raises(DataError, match=r"both called 'kidney'|is called 'foreground'"):
        open_configured(DataConfig(path=root))
    # Merged, and to be converted, they may have any.
    assert open_configured(DataConfig(path=root, labels="foreground")) == open_dataset(root)


def test_an_absent_channel_of_an_nnunet_folder_is_refused_by_name(files):
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1}}
    assert "a_0001" in refusal(files("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", content=content))


def test_an_nnunet_folder_without_labels_folder_is_refused(files):
    content = {"channel_names": {"0": "T1"}, "labels": {"a": 1}}
    assert "labelsTr" in refusal(files("imagesTr/a_0000.nii.gz", content=content))


def test_regions_of_nnunet_are_refused(files):
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "whole": [1, 2]}}
    assert "region" in refusal(files("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", content=content))


@pytest.mark.parametrize(
    ("present", "absent"), [("images/b.nii.gz", "labels/b.nii.gz"), ("labels/b.nii.gz", "images/b.nii.gz")]
)
def test_a_plain_image_or_label_without_partner_is_refused(files, present, absent):
    assert absent in refusal(files("images/a.nii.gz", "labels/a.nii.gz", present))


def test_plain_cases_with_different_channels_are_refused(files):
    names = ("images/a_0000.nii.gz", "images/a_0001.nii.gz", "images/b_0000.nii.gz")
    words = refusal(files(*names, "labels/a.nii.gz", "labels/b.nii.gz"))
    assert "'b' has the channel files _0000, the case 'a' _0000, _0001;" in words


def test_another_channel_in_the_place_of_the_second_is_refused(files):
    names = ("images/a_0000.nii.gz", "images/a_0001.nii.gz", "images/b_0000.nii.gz", "images/b_0002.nii.gz")
    words = refusal(files(*names, "labels/a.nii.gz", "labels/b.nii.gz"))
    assert "'b' has the channel files _0000, _0002, the case 'a' _0000, _0001;" in words


def test_a_gap_between_channels_is_refused(files):
    names = ("images/a_0000.nii.gz", "images/a_0012.nii.gz")
    words = refusal(files(*names, "labels/a.nii.gz"))
    assert "'a' has the channel files _0000, _0012; number channels without gaps" in words


def test_a_year_at_the_end_of_a_name_is_no_channel(files):
    root = files("images/p0.nii.gz", "images/p0_2021.nii.gz", "labels/p0.nii.gz")
    assert "the case 'p0_2021' has no file in labels/; add labels/p0_2021.nii.gz" in refusal(root)
    files("images/p0_0000.nii.gz", "images/q_2021.nii.gz", "labels/q.nii.gz")
    dataset, found = index_dataset(root)
    assert [[path.name for path in case.images] for case in dataset.cases] == [["p0.nii.gz"]]
    assert [one.cases for one in found] == [("p0_0000",), ("p0_2021",), ("q",), ("q_2021",)]


def test_numbers_that_labels_have_are_no_channels(files, write_nifti):
    root = files(
        *(f"{name}/case_000{n}.nii.gz" for n in range(3) for name in ("images", "labels")),
        "images/case_0003.nii.gz",
        "labels/case.nii.gz",
    )
    for path in root.glob("*/*"):
        write_nifti(path, np.zeros((3, 3, 3)), dtype=np.uint8)
    dataset, found = index_dataset(root)
    assert sorted(dataset.patients) == ["case_0000", "case_0001", "case_0002"]
    assert {name for one in found for name in one.cases} == {"case_0003", "case"}


def test_channels_without_a_label_are_one_case_without_a_label(files):
    names = [f"images/{case}_{channel:04d}.nii.gz" for case in "ab" for channel in (0, 1)]
    words = refusal(files(*names, "labels/a.nii.gz"))
    assert "the case 'b' has no file in labels/; add labels/b.nii.gz" in words
    assert "more" not in words


def test_a_channel_file_in_two_formats_is_left_out_with_its_case(files):
    names = [f"images/{case}_{channel:04d}.nii.gz" for case in "ab" for channel in (0, 1)]
    root = files(*names, "images/b_0001.nii", "labels/a.nii.gz", "labels/b.nii.gz")
    dataset, found = index_dataset(root, exclude=["b"])
    assert (sorted(dataset.patients), found) == (["a"], [])


def test_a_lone_channel_may_have_its_number_or_not(files, write_nifti):
    root = files("images/a.nii.gz", "images/b_0000.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    write_nifti(root / "images" / "a.nii.gz", np.zeros((3, 3, 3)), dtype=np.uint8)
    assert sorted(open_dataset(root).patients) == ["a", "b"]


@pytest.mark.parametrize("path", ["../outside.nii.gz", "imagesTr/../../outside.nii.gz", "{absolute}"])
def test_a_path_that_leaves_the_folder_is_refused(files, path):
    root = files(*pairs("a"), "../outside.nii.gz")
    path = path.format(absolute=root.parent / "outside.nii.gz")
    content = {"labels": {}, "training": [{"image": path, "label": "labelsTr/a.nii.gz"}]}
    (root / "dataset.json").write_text(json.dumps(content))
    assert "outside the folder" in refusal(root)


def test_a_link_that_leaves_the_folder_is_refused(files):
    root = files(*pairs("a"), "../outside.nii.gz", content=msd("a"))
    (root / "imagesTr" / "a.nii.gz").unlink()
    (root / "imagesTr" / "a.nii.gz").symlink_to(root.parent / "outside.nii.gz")
    assert "outside the folder" in refusal(root)


def test_a_case_listed_twice_is_refused(files):
    assert "'a' is listed twice" in refusal(files(*pairs("a"), content=msd("a", "a")))


@pytest.mark.parametrize(
    "content",
    [
        {"training": []},
        {"channel_names": {"0": "T1"}, "labels": {"a": 1}},
    ],
)
def test_a_dataset_without_cases_is_refused(files, content):
    root = files(content=content)
    (root / "labelsTr").mkdir()
    assert "no labelled cases" in refusal(root)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([1, 2], "object"),
        ({"name": "x"}, "channel_names"),
        ({"training": {"image": "a"}}, "'training' must be a list"),
        ({"training": ["imagesTr/a.nii.gz"]}, "training[0]"),
        ({"training": [{"image": "imagesTr/a.nii.gz"}]}, "training[0]"),
        (msd("a", modality=["MRI"]), "'modality'"),
        (msd("a", modality={"first": "MRI"}), "'modality'"),
        (msd("a", labels=["tumour"]), "'labels'"),
        (msd("a", labels={"tumour": "1"}), "'labels'"),
        ({"channel_names": {"T1": "0"}, "labels": {"a": 1}}, "'channel_names'"),
        ({"channel_names": ["T1"], "labels": {"a": 1}}, "'channel_names'"),
    ],
)
def test_a_dataset_json_of_another_form_is_refused(files, content, word):
    message = refusal(files(*pairs("a"), "imagesTr/a_0000.nii.gz", content=content))
    assert "dataset.json" in message
    assert word in message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00"])
def test_a_dataset_json_that_is_no_json_is_refused(files, content):
    root = files(*pairs("a"))
    (root / "dataset.json").write_bytes(content)
    assert "not readable JSON" in refusal(root)


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("patient003_frame15", "patient003"),
        ("SC-HF-I-02_ph06", "SC-HF-I-02"),
        ("A0S9V9_ED", "A0S9V9"),
        ("sub-01_ses-2_run-1", "sub-01"),
        ("p1_visit2_t03", "p1"),
        ("Pat 03 (visit 2)", "Pat 03"),
        ("P03_[T2]_ct", "P03"),
        ("P(1)", "P(1)"),
        ("liver (12)", "liver (12)"),
        ("hippocampus_003", "hippocampus_003"),
        ("brats_2013_pat0001_1", "brats_2013_pat0001_1"),
        ("treated_12", "treated_12"),
        ("scan_07", "scan_07"),
        ("_frame01", "_frame01"),
        # BIDS: whatever follows the subject.
        ("sub-01_ses-01_T1w", "sub-01"),
        ("sub-anna_T1w", "sub-anna"),
        ("sub-01-ses-02_T1w", "sub-01"),
        # A modality or a word after the visit.
        ("patient01_visit1_ct", "patient01"),
        ("P001_tp1_flair", "P001"),
        ("P001_t1_flair", "P001"),
        ("p1_timepoint2_ct", "p1"),
        ("p1_time-point-2_x", "p1"),
        ("patient1_ses-pre_T1w", "patient1"),
        ("patient12_phase_arterial", "patient12"),
        ("patient001_ED_crop", "patient001"),
        ("patient01_scan1_ct", "patient01"),
        ("patient01_scan_001", "patient01"),
        # The day of a visit.
        ("P001_20200115", "P001"),
        ("P001_2020-01-15", "P001"),
        ("P001-2021.03.20", "P001"),
        ("Smith_1999_12_31", "Smith"),
        ("P001_20200115_ct", "P001"),
        ("P001_20200115_frame01", "P001"),
        ("P001_scan1_20200115", "P001"),
        ("P001_20201315", "P001_20201315"),
        ("P001_20200132", "P001_20200132"),
        ("P001_120200115", "P001_120200115"),
        ("P001_20200115_0003", "P001_20200115_0003"),
        # A time to the second.
        ("P001_CT_20200115103045_3", "P001_CT"),
        ("P001_20200115_103045", "P001"),
        ("P001-2020-01-15T103045-5a", "P001"),
        (
            "ADNI_002_S_0413_MR_MP-RAGE__br_raw_20061115111256_1_S22684_I29704",
            "ADNI_002_S_0413",
        ),
        ("ADNI_137_S_1414_MR_MP-RAGE__br_raw_20080226130530486_1_S46193_I92752", "ADNI_137_S_1414"),
        ("137_S_1414", "137_S_1414"),
        ("KH17_20200115_0012345", "KH17_20200115_0012345"),
        # and to parts of the second.
        ("P001_CT_20200115103045486_3", "P001_CT"),
        ("P001_202001151030454861234_3", "P001_202001151030454861234_3"),
        ("P001_20200115_993045", "P001_20200115_993045"),
        ("P001_20200115103045x", "P001_20200115103045x"),
        ("LiTS_20200115103045_P001", "LiTS_20200115103045_P001"),
        ("scan_20200115103045", "scan_20200115103045"),
        ("20200115", "20200115"),
        ("_20200115", "_20200115"),
        ("scan_20200115", "scan_20200115"),
        ("MR_case_2020-01-15", "MR_case_2020-01-15"),
        ("site2_20200115", "site2_20200115"),
        ("site2_visit1_20200115", "site2_visit1_20200115"),
        # Numbers of a site or a study come before the patient's.
        ("site2_scan_001", "site2_scan_001"),
        ("site2_scan_001_frame02", "site2_scan_001"),
        ("site2_visit1_patient03", "site2_visit1_patient03"),
        ("site2_frame01", "site2"),
        ("3T_scan_001", "3T_scan_001"),
        ("mri_scan_001_frame02", "mri_scan_001"),
        ("brats2020_t1_001", "brats2020_t1_001"),
        ("2019_visit1_patient03", "2019_visit1_patient03"),
        ("LiTS17_scan_001_ct", "LiTS17_scan_001_ct"),
    ],
)
def test_the_patient_is_the_name_without_frame_phase_or_visit(case, patient):
    assert patient_of(case) == patient


def test_a_pattern_names_the_patient_by_its_first_group():
    assert patient_of("site2-007-b", r"site\d-(\d+)") == "007"
    assert patient_of("site2-007-b", r"\d{3}") == "007"


def test_the_pattern_reaches_every_case(files):
    dataset = open_dataset(files(*pairs("x1_a", "x1_b"), content=msd("x1_a", "x1_b")), patient_pattern=r"x\d")
    assert set(dataset.patients.values()) == {"x1"}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(", "not a regular expression"), (r"site(\d)", "does not match the case 'a'"), (r"(b)?a", "'a'")],
)
def test_a_pattern_that_names_no_patient_is_refused(files, pattern, words):
    message = refusal(files(*pairs("a"), content=msd("a")), patient_pattern=pattern)
    assert words in message
    assert "data.patient_pattern" in message


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "num_cases", "num_patients", "num_channels", "num_classes"),
    [
        ("Task04_Hippocampus", 200, 200, 1, 2),
        ("Task101_ACDC", 80, 40, 1, 3),
        ("Task103_BRATS2015x6", 4, 4, 2, 4),
        ("Task104_SunnybrookLV", 68, 34, 1, 1),
    ],
)
def test_real_tasks_have_their_cases_patients_and_channels(
    data_root, task, num_cases, num_patients, num_channels, num_classes
):
    dataset = open_dataset(data_root / task)
    assert len(dataset.cases) == num_cases
    assert len(set(dataset.patients.values())) == num_patients
    assert (len(dataset.channels), len(dataset.classes)) == (num_channels, num_classes)
    assert fingerprint(dataset, only=()).num_channels == num_channels


@pytest.mark.data
@pytest.mark.parametrize("task", ["Task101_ACDC", "Task104_SunnybrookLV"])
def test_real_end_diastole_and_end_systole_never_part(data_root, task):
    patients = open_dataset(data_root / task).patients
    assert patients.get("patient003_frame01", "patient003") == patients.get(
        "patient003_frame15", "patient003"
    )
    counts = [list(patients.values()).count(patient) for patient in set(patients.values())]
    assert set(counts) == {2}
    splits = make_splits(patients)
    for fold in range(len(splits.folds)):
        parts = select(splits, patients, fold=fold)
        owners = [{patients[case] for case in part} for part in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, owners)) == len(set.union(*owners)) == len(counts)


def test_cases_and_patients_can_be_left_out(dataset_folder):
    root = dataset_folder(num_cases=4, frames=2)
    dataset = open_dataset(root, exclude=["case_001", "case_002_frame02"])
    assert sorted(dataset.patients) == [
        "case_000_frame01",
        "case_000_frame02",
        "case_002_frame01",
        "case_003_frame01",
        "case_003_frame02",
    ]
    with pytest.raises(DataError, match="no case and no patient 'case_9'"):
        open_dataset(root, exclude=["case_9"])


@pytest.mark.parametrize("fault", ["no label", "two formats", "two channels"])
def test_a_faulty_case_can_be_left_out(tmp_path, write_nifti, fault):
    for name in "abcd":
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", np.zeros((3, 3, 3)), dtype=np.uint8)
        write_nifti(tmp_path / "labels" / f"{name}.nii.gz", np.zeros((3, 3, 3)), dtype=np.uint8)
    if fault == "no label":
        (tmp_path / "labels" / "b.nii.gz").unlink()
    elif fault == "two formats":
        write_nifti(tmp_path / "images" / "b.nii", np.zeros((3, 3, 3)), dtype=np.uint8)
    else:
        first = tmp_path / "images" / "b.nii.gz"
        first.rename(first.with_name("b_0000.nii.gz"))
        write_nifti(first.with_name("b_0001.nii.gz"), np.zeros((3, 3, 3)), dtype=np.uint8)
    with pytest.raises(DataError):
        open_dataset(tmp_path)
    assert sorted(open_dataset(tmp_path, exclude=["b"]).patients) == ["a", "c", "d"]
