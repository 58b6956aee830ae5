"""What a check and an index say of names and folders: those that do not meet, and one finding of each kind."""

import json
import shutil

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from dicom_files import classic, save
from medvisionllama import check, load_config
from medvisionllama.cli._progress import TerminalProgress
from medvisionllama.data.check.division import division_findings
from medvisionllama.data.check.listing import scans_in
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.formats.dicom_grid import grid_of
from medvisionllama.data.formats.dicom_series import find_series, person_of
from medvisionllama.data.index import index_dataset, open_dataset
from medvisionllama.data.splits import Fold, Splits
from medvisionllama.errors import DataError
from medvisionllama.inference.dicom_seg import write_seg
from medvisionllama.inference.writers import write_mask
from medvisionllama.progress import Silent
from medvisionllama.training.prepare import divide, prepare_data, unlabelled_cases


@pytest.fixture
def plain(tmp_path, write_nifti):
    """`plain(*names)`: a folder of noise; what lies below labels is a box."""

    def make(*names):
        root = tmp_path / "task"
        for number, name in enumerate(names):
            array = np.random.default_rng(number).normal(100, 10, (6, 7, 8)).astype(np.float32)
            if "label" in name.lower():
                array = np.zeros((6, 7, 8), np.uint8)
                array[1:4, 1:4, 1 : 3 + number % 5] = 1
            write_nifti(root / name, array)
        return root

    return make


def refusal(root):
    with pytest.raises(DataError) as caught:
        open_dataset(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def both(*cases, label="{}"):
    return [
        name for case in cases for name in (f"images/{case}.nii.gz", f"labels/{label.format(case)}.nii.gz")
    ]


def test_classes_that_train_would_refuse_are_pointed_out(plain):
    root = plain(*both("a", "b", "c"))
    (root / "names.json").write_text(json.dumps({"classes": {"1": "kidney", "2": "kidney"}}))
    [found] = [finding for finding in check(root, fast=True).findings if finding.code == "class-names"]
    assert found.severity == "warning"
    assert "the values 1 and 2 are both called 'kidney'" in found.message


def test_pairs_in_a_format_that_is_not_read_are_named(plain):
    root = plain(*both("a", "b", "c"), "labels/f.nii.gz")
    for name in (
        "images/d.mhd",
        "images/e.mhd",
        "images/f.mgz",
        "labels/d.mhd",
        "labels/e.mhd",
        "labels/d.raw",
    ):
        (root / name).touch()
    findings = check(root, fast=True).findings
    images, labels = [finding.message for finding in findings if finding.code == "unlisted-file"]
    assert (
        "images: 3 files are of a format that is not read (d.mhd, e.mhd, f.mgz); save them as .nii" in images
    )
    assert "labels: 2 files are" in labels
    [alone] = [finding.message for finding in findings if finding.code == "no-partner"]
    assert "the case 'f' has f.mgz alone, a format that is not read, in images/" in alone


def test_a_dataset_of_a_format_that_is_not_read_says_so(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mhd").touch()
    assert "a.mhd and the like are of a format that is not read: save them as .nii" in refusal(tmp_path)


def test_one_name_of_two_cases_is_told_with_both_files(plain):
    root = plain("p1/t1.nii.gz", "p2/t1.nii.gz", "label1.nii.gz", "label2.nii.gz")
    entries = [{"image": f"p{n}/t1.nii.gz", "label": f"label{n}.nii.gz"} for n in (1, 2)]
    content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a"}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(content))
    said = refusal(root)
    assert "p1/t1.nii.gz" in said
    assert "p2/t1.nii.gz are both the case 't1'; give them different names" in said


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_a_case_in_two_formats_is_named_with_both_files(plain, folder):
    root = plain(*both("a", "b", "c"), f"{folder}/b.nii")
    (found,) = [finding for finding in check(root).findings if finding.severity == "error"]
    assert (found.code, found.cases) == ("listed-twice", ("b",))
    assert f"{folder}/b.nii and b.nii.gz are the same case; remove one" in found.message
    assert "are the same case" in refusal(root)


@pytest.mark.parametrize("ending", ["-label", "_seg", "Segmentation", "_0"])
def test_labels_with_one_ending_are_explained_once(plain, ending):
    root = plain(*both("case_1", "case_10", "case_2", label="{}" + ending))
    (found,) = check(root).of("error")
    assert f"the labels end in {ending!r}" in found.message
    assert f"rename case_1{ending}.nii.gz to case_1.nii.gz" in found.message


def test_images_with_one_ending_are_explained_once(plain):
    root = plain("images/a_T1.nii.gz", "images/b_T1.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    (found,) = check(root).of("error")
    assert "the images end in '_T1'" in found.message
    assert "rename a_T1.nii.gz to a.nii.gz" in found.message


def test_names_that_never_meet_are_one_finding(plain):
    root = plain("images/x1.nii.gz", "images/x2.nii.gz", "labels/p.nii.gz", "labels/q.nii.gz")
    (found,) = check(root).of("error")
    assert "no image has the name of a label (images x1, x2; labels p, q)" in found.message


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        ("images", "label", "found images/ and label/; did you mean labels/?"),
        ("image", "labels", "found image/ and labels/; did you mean images/?"),
        ("Images", "Lables", "found Images/ and Lables/; did you mean images/ and labels/?"),
        ("images", "masks", "found images/ and masks/; did you mean labels/?"),
        (
            "imagesTr",
            "labelsTr",
            "found imagesTr/ and labelsTr/; did you mean images/ and labels/, or is dataset.json missing?",
        ),
    ],
)
def test_a_slip_in_a_folder_name_is_pointed_out(plain, images, labels, words):
    root = plain(f"{images}/a.nii.gz", f"{labels}/a.nii.gz")
    assert words in refusal(root)
    (found,) = check(root).of("error")
    assert words in found.message


def test_a_folder_of_datasets_is_refused_with_their_names(plain, dataset_folder):
    root = plain("one/images/a.nii.gz", "one/labels/a.nii.gz", "other/c.nii.gz")
    shutil.move(dataset_folder("two"), root / "two")
    assert "give one of these: one, two" in refusal(root)
    with pytest.raises(DataError, match="is no dataset, its folders are"):
        check(root)


def test_masks_beside_scans_are_no_scans(plain):
    names = ("a.nii.gz", "Labels_old/a.nii.gz", "deep/masks/b.nii.gz", "deep/b.nii.gz", "a.seg.nrrd")
    root = plain(*names[:-1])
    (root / "a.seg.nrrd").touch()
    report = check(root)
    assert [facts.case_id for facts in report.facts] == ["a", "deep/b"]
    assert report.ok
    # Asked for by name, they are what is checked.
    assert [path.name for path in scans_in(root / "Labels_old")] == ["a.nii.gz"]


def test_linked_folders_are_looked_into_once(plain):
    root = plain("scans/a.nii.gz", "store/b.nii.gz")
    (root / "scans" / "linked").symlink_to(root / "store")
    (root / "store" / "back").symlink_to(root / "scans")
    found = [path.relative_to(root / "scans").as_posix() for path in scans_in(root / "scans")]
    assert found == ["a.nii.gz", "linked/b.nii.gz"]


def splits_of(train, validation, test, folds=2):
    return Splits(0, tuple(test), tuple(Fold(tuple(train), tuple(validation)) for _ in range(folds)))


def test_splits_of_another_dataset_give_one_finding_of_each_kind(tmp_path):
    patients = {f"p{number:03d}": f"p{number:03d}" for number in range(200)}
    drawn = splits_of([f"p{number:03d}" for number in range(20)], ["x"], ["y"])
    found = {finding.code: finding for finding in division_findings(drawn, patients, tmp_path)}
    assert len(found) == len(division_findings(drawn, patients, tmp_path)) == 3
    assert "180 of 200 patients are in no part" in found["not-in-splits"].message
    assert "p020, p021, p022, p023 and 176 more" in found["not-in-splits"].message
    assert len(found["not-in-splits"].cases) == 180
    assert "validation part of fold 0, test part, validation part of fold 1" in found["splits"].message
    assert "2 of 22 patients are not in this dataset" in found["splits-absent"].message


def test_one_patient_outside_the_splits_is_named_with_the_fold(tmp_path):
    drawn = Splits(0, ("c",), (Fold(("a", "d"), ("b",)), Fold(("a",), ("b",))))
    (found,) = division_findings(drawn, {case: case for case in "abcd"}, tmp_path)
    assert "the patient 'd' is in no part of fold 1" in found.message
    assert found.cases == ("d",)


def test_a_pattern_that_fails_is_not_followed_by_notes_on_files(dataset_folder):
    report = check(dataset_folder(num_cases=4), patient_pattern="(")
    assert report.codes == {"layout": 1}


def test_files_of_cases_left_out_are_used(dataset_folder):
    root = dataset_folder(num_cases=5)
    assert "unlisted-file" not in check(root, exclude=["case_003"]).codes
    content = json.loads((root / "dataset.json").read_text())
    content["training"] = content["training"][:4]
    (root / "dataset.json").write_text(json.dumps(content))
    report = check(root, exclude=["case_003"])
    assert report.codes["unlisted-file"] == 2
    assert all(
        "(case_004.nii.gz)" in finding.message
        for finding in report.findings
        if finding.code == "unlisted-file"
    )
    dataset, _ = index_dataset(root, exclude=["case_003"])
    assert [case.case_id for case in dataset.excluded] == ["case_003"]


def study(folder, *, number=2, shape=(6, 8, 5)):
    """Several series of images in one folder, the files of all mixed."""
    for index in range(number):
        datasets = classic(np.random.default_rng(index).integers(0, 900, shape).astype(np.int16))
        uid = generate_uid()
        for dataset in datasets:
            dataset.SeriesInstanceUID, dataset.SeriesDescription, dataset.SeriesNumber = (
                uid,
                f"scan {index}",
                index,
            )
        save(datasets, folder, [f"{index}_{piece}" for piece in range(len(datasets))])
    return folder


def test_each_series_of_a_study_is_a_case_as_predict_has_it(tmp_path):
    root = study(tmp_path / "study", number=2)
    report = check(root)
    assert report.ok, report.findings
    assert [facts.case_id for facts in report.facts] == [series.name for series in find_series(root)]
    assert report.of("warning") == []
    (root / "0_3").unlink()
    (found,) = check(root).of("error")
    assert "series scan 0" in found.message
    assert found.to_json()["file"] == str(root)


def test_masks_and_localisers_in_a_study_are_passed_over(tmp_path):
    root = study(tmp_path / "study", number=1)
    (series,) = find_series(root)
    mask = np.zeros((5, 8, 6), np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    write_seg(root / "mask.dcm", mask, series, {1: "head"})
    scout = dcmread(root / "0_0")
    scout.SeriesInstanceUID, scout.SOPInstanceUID = generate_uid(), generate_uid()
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(root / "scout")
    report = check(root)
    assert report.ok, report.findings
    assert report.num_cases == 1


def test_a_damaged_slice_does_not_hide_the_other_scans(tmp_path, write_nifti):
    study(tmp_path / "study" / "bad", number=1)
    study(tmp_path / "study" / "good", number=1, shape=(5, 6, 7))
    path = tmp_path / "study" / "bad" / "0_2"
    path.write_bytes(path.read_bytes()[:300])
    report = check(tmp_path / "study")
    (found,) = report.of("error")
    assert found.code == "unreadable"
    assert "bad" in found.message
    assert [facts.case_id for facts in report.facts] == ["good"]


@pytest.fixture
def persons(tmp_path):
    """`persons(alpha="ID-1", ...)`: a dataset of DICOM series with these PatientIDs, and nothing else in common."""

    def write(**numbers):
        for index, (name, number) in enumerate(numbers.items()):
            stored = np.random.default_rng(index).integers(0, 900, (6, 8, 5)).astype(np.int16)
            datasets = classic(stored)
            for dataset in datasets:
                dataset.PatientID = number
            save(datasets, tmp_path / "images" / name)
            (series,) = find_series(tmp_path / "images" / name)
            header = grid_of(series)
            label = np.zeros(header.shape, np.uint8)
            label[1 : 3 + index, 2:5, 1:3] = 1
            write_mask(tmp_path / "labels" / f"{name}.nii.gz", label, header.affine)
        return tmp_path

    return write


@pytest.mark.parametrize("fast", [True, False])
def test_series_with_one_patient_number_are_one_person(persons, fast):
    root = persons(zed_alpha="ID-1", zed_bravo="ID-1", charlie="ID-2", delta="")
    report = check(root, fast=fast)
    [found] = [finding for finding in report.findings if finding.code == "person-apart"]
    assert found.cases == ("zed_alpha", "zed_bravo")
    assert "ID-1" not in str(report)
    joined = check(root, fast=fast, patient_pattern="^([a-z]+)")
    assert joined.num_patients == 3
    assert not [finding for finding in joined.findings if finding.code == "person-apart"]


def test_the_directory_of_a_cd_does_not_hide_whose_scans_they_are(persons):
    root = persons(alpha="ID-1", bravo="ID-1", charlie="ID-2")
    for name in ("alpha", "bravo"):
        # DICOMDIR sorts before the images, is DICOM, and is nobody's.
        image = next((root / "images" / name).iterdir())
        directory = dcmread(image)
        del directory.PatientID, directory.PixelData
        directory.save_as(root / "images" / name / " DICOMDIR")
    assert person_of(root / "images" / "alpha") == person_of(root / "images" / "bravo") != ""


def test_training_says_first_that_series_are_one_persons(persons, capsys):
    # The names look alike as well, and only the first warning is shown.
    root = persons(p1_left="ID-1", p1_right="ID-2", p2="ID-3", zulu="ID-3")
    config = load_config("small", {"data.path": root})
    prepare_data(config, drawn=None, progress=TerminalProgress())
    shown = capsys.readouterr().err
    assert "look at this: p2 and zulu have one PatientID but count as 2 patients" in " ".join(shown.split())
    assert "ID-3" not in shown
    # Nothing names the classes, so it is said which there are, and that sides may be confused.
    assert "label values found: 1; the dataset names no classes" in " ".join(shown.split())
    assert "left and right are mirrored; the classes have no names" in " ".join(shown.split())


@pytest.mark.parametrize("number", ["ID-1", "ID-2", "ID-3", "ANONYMOUS"])
def test_a_scan_without_a_label_is_no_test_patients_under_another_name(persons, tmp_path_factory, number):
    root = persons(alpha="ID-1", bravo="ID-2", charlie="ID-3", delta="ANONYMOUS", echo="ANONYMOUS")
    extra = tmp_path_factory.mktemp("extra")
    datasets = classic(np.zeros((6, 8, 5), np.int16))
    for dataset in datasets:
        dataset.PatientID = number
    save(datasets, extra / "zulu")
    config = load_config("small", {"data.path": root, "unlabelled.scans": extra})
    found, _, selection = divide(config, drawn=None)
    facts = fingerprint(found).facts
    owner = {"ID-1": "alpha", "ID-2": "bravo", "ID-3": "charlie"}.get(number)
    if owner in {*selection.validation, *selection.test}:
        with pytest.raises(
            DataError, match=r"zulu\) has the PatientID of a patient who validates, tests or is excluded"
        ):
            unlabelled_cases(config, found, selection, facts, Silent())
    else:
        cases = unlabelled_cases(config, found, selection, facts, Silent())
        assert [case.case_id for case in cases] == ["zulu"]


def test_a_series_without_a_label_that_makes_no_volume_is_left_out_and_said(
    persons, tmp_path_factory, capsys
):
    root = persons(alpha="ID-1", bravo="ID-2", charlie="ID-3")
    extra = tmp_path_factory.mktemp("extra")
    save(classic(np.zeros((6, 8, 5), np.int16)), extra / "whole")
    save(classic(np.zeros((6, 8, 5), np.int16))[:1], extra / "scout")
    config = load_config("small", {"data.path": root, "unlabelled.scans": extra})
    found, _, selection = divide(config, drawn=None)
    facts = fingerprint(found).facts
    cases = unlabelled_cases(config, found, selection, facts, TerminalProgress())
    assert [case.case_id for case in cases] == ["whole"]
    assert "1 of 2 scans without labels are left out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "number", "why"),
    [
        ("alpha1", "ID-9", "named like a case"),
        ("zulu", "ID-1", "PatientID of a patient who validates, tests or is excluded"),
        ("alpha1_frame02", "ID-9", "patient 'alpha1', who validates, tests or is excluded"),
    ],
)
def test_a_scan_of_an_excluded_patient_does_not_train_without_its_label(
    persons, tmp_path_factory, name, number, why
):
    root = persons(alpha1="ID-1", bravo="ID-2", charlie="ID-3", delta="ID-4")
    extra = tmp_path_factory.mktemp("extra")
    datasets = classic(np.zeros((6, 8, 5), np.int16))
    for dataset in datasets:
        dataset.PatientID = number
    save(datasets, extra / name)
    settings = {"data.path": root, "data.exclude": ["alpha1"], "unlabelled.scans": extra, "data.fold": "all"}
    config = load_config("small", settings)
    found, _, selection = divide(config, drawn=None)
    with pytest.raises(DataError, match=why):
        unlabelled_cases(config, found, selection, fingerprint(found).facts, Silent())


@pytest.mark.parametrize("number", ["", "ANONYMOUS"])
def test_a_number_that_all_series_have_tells_nothing(persons, number):
    # Files of other formats have none.
    report = check(persons(alpha=number, bravo=number, charlie=number, delta=""), fast=True)
    assert not [finding for finding in report.findings if finding.code == "person-apart"]
