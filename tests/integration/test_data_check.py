"""`data check` on datasets broken one way each, on whole ones, and on the real scans."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from medvisionllama import check
from medvisionllama.data.check import headers

from .broken import ERRORS, NOTES, WARNINGS
from .conftest import settings
from .damage import both, change, disagree, label, scan, to_nnunet, to_plain, truncate, voxel

SEED = 5
TABLE = {**ERRORS, **WARNINGS, **NOTES}


def break_dataset(name, dataset_folder):
    broken = TABLE[name]
    root = dataset_folder(num_cases=broken.num_cases, channels=broken.channels, frames=broken.frames, seed=1)
    if broken.channels == ("CT",):
        for path in (root / "imagesTr").iterdir():
            change(path, lambda array: array - 300)
    broken.damage(root)
    return root, broken, [option.replace("ROOT", str(root)) for option in broken.options]


def found_by(cli, *arguments):
    outcome = cli("data", "check", *arguments, "--json")
    assert "Traceback" not in outcome.err
    return outcome.code, json.loads(outcome.out)["findings"]


@pytest.mark.parametrize("name", TABLE)
def test_what_is_broken_is_found_and_decides_the_exit_code(name, dataset_folder, cli):
    root, broken, options = break_dataset(name, dataset_folder)
    code, findings = found_by(cli, root, *options)
    matching = [finding for finding in findings if finding["code"] == broken.code]
    assert matching, findings
    severity = "error" if name in ERRORS else "warning" if name in WARNINGS else "note"
    assert any(broken.words in finding["message"] for finding in matching), matching
    assert {finding["severity"] for finding in matching} == {severity}
    assert all("\n" not in finding["message"] for finding in findings)
    others = {finding["severity"] for finding in findings} - {severity}
    assert code == (2 if name in ERRORS else 0), (others, findings)


@pytest.mark.parametrize("name", [name for name, broken in ERRORS.items() if broken.train])
def test_train_refuses_what_it_can_see_and_writes_nothing(name, dataset_folder, tmp_path, cli):
    root, broken, options = break_dataset(name, dataset_folder)
    names = {"--splits": "data.splits", "--patient-pattern": "data.patient_pattern"}
    extra = ["--set", f"{names[options[0]]}={options[1]}"] if options else []
    outcome = cli("train", root, "--out", tmp_path / "run", "--epochs", 1, *settings(), *extra)
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert len(lines) == 1, outcome.err
    assert (broken.train_words or broken.words) in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_table_covers_what_the_issue_asks():
    assert len(TABLE) >= 40
    assert len([broken for broken in ERRORS.values() if broken.train]) >= 30


@pytest.mark.parametrize(
    ("layout", "channels"),
    [("msd", ("MRI",)), ("msd", ("T1", "T2")), ("nnunet", ("T1", "T2")), ("plain", ("MRI",))],
)
def test_a_whole_dataset_gives_no_error_and_no_warning(layout, channels, dataset_folder, cli):
    # Boxes at random places: with this seed no two cases have the same.
    root = dataset_folder(num_cases=10, channels=channels, seed=SEED)
    if layout != "msd":
        to_nnunet(root) if layout == "nnunet" else to_plain(root)
    code, findings = found_by(cli, root)
    assert code == 0
    assert [finding for finding in findings if finding["severity"] != "note"] == []


def test_phantoms_give_no_error_and_no_warning(phantoms):
    report = check(phantoms)
    assert report.ok
    assert report.of("warning") == []


def test_all_problems_of_all_cases_are_listed(dataset_folder, cli):
    root = dataset_folder(num_cases=6, seed=1)
    truncate(scan(root, "case_000"))
    label(root, "case_001").unlink()
    scan(root, "case_004").write_text("x")
    _, findings = found_by(cli, root)
    errors = {tuple(finding["cases"]) for finding in findings if finding["severity"] == "error"}
    assert errors == {("case_000",), ("case_001",), ("case_004",)}


def test_a_long_list_is_cut_and_counted_and_the_summary_comes_last(dataset_folder, cli):
    root = dataset_folder(num_cases=9, seed=1)
    for path in (root / "labelsTr").iterdir():
        truncate(path)
    outcome = cli("data", "check", root, "--rows", 2)
    assert outcome.code == 2
    assert "error: files that cannot be read (9)" in outcome.out
    assert "and 7 more" in outcome.out
    assert outcome.out.count("damaged or truncated") == 2
    assert outcome.out.splitlines()[-1].startswith("9 cases of 9 patients: 9 errors, 0 warnings")


def test_a_file_that_may_not_be_read_is_named_and_the_others_are_checked(dataset_folder, cli, monkeypatch):
    root, read = dataset_folder(num_cases=4), headers.read_header
    shut = sorted((root / "imagesTr").iterdir())[1]

    def refuse(path):
        if path == shut:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(headers, "read_header", refuse)
    outcome = cli("data", "check", root, "--json")
    assert outcome.code == 2
    report = json.loads(outcome.out)
    [found] = [one for one in report["findings"] if one["code"] == "unreadable"]
    assert f"{shut} cannot be read (Permission denied)" in found["message"]


def test_a_page_that_cannot_be_written_is_told_before_the_work(dataset_folder, cli, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    outcome = cli("data", "check", dataset_folder(num_cases=4), "--html", tmp_path / "new" / "check.html")
    assert outcome.code == 2
    assert f"cannot be written, as {tmp_path} is read-only" in outcome.err
    assert outcome.out == ""


def test_the_fast_check_reads_headers_only(dataset_folder, cli):
    root = dataset_folder(num_cases=6, seed=1)
    voxel(scan(root), np.nan)
    assert cli("data", "check", root, "--fast").code == 0
    change(label(root), lambda array: array[:-1])
    outcome = cli("data", "check", root, "--fast")
    assert outcome.code == 2
    assert "(headers only)" in outcome.out


def test_train_says_what_to_look_at_and_goes_on(dataset_folder, tmp_path, cli):
    root = dataset_folder(num_cases=6, seed=1)
    both(root, disagree)
    outcome = cli("train", root, "--out", tmp_path / "run", "--epochs", 1, "--no-test", *settings())
    assert outcome.code == 0
    assert "look at this:" in outcome.err
    assert "(and 1 more); see all with: medvisionllama data check" in outcome.err


def test_a_folder_of_scans_and_a_single_scan_are_checked_as_images(dataset_folder, tmp_path, cli):
    root = dataset_folder(num_cases=3, seed=1)
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(scan(root, "case_000"), folder / "a.nii.gz")
    shutil.copy(scan(root, "case_001"), folder / "deep" / "b.nii.gz")
    code, findings = found_by(cli, folder)
    assert code == 0
    assert "2 scans were checked as images" in findings[0]["message"]
    truncate(folder / "a.nii.gz")
    code, findings = found_by(cli, folder / "a.nii.gz")
    assert code == 2
    assert findings[0]["code"] == "unreadable"


def test_an_absent_folder_and_one_without_scans_are_refused(tmp_path, cli):
    for path, words in ((tmp_path / "absent", "not a folder"), (tmp_path, "holds no dataset")):
        outcome = cli("data", "check", path)
        assert outcome.code == 2
        assert words in outcome.err


def test_the_page_holds_findings_pictures_and_a_figure_and_no_reference_elsewhere(
    dataset_folder, tmp_path, cli
):
    root = dataset_folder(num_cases=6, seed=1)
    hostile = json.loads((root / "dataset.json").read_text())
    hostile["name"] = "<script>alert(1)</script>"
    (root / "dataset.json").write_text(json.dumps(hostile))
    truncate(scan(root, "case_005"))
    page = tmp_path / "check.html"
    assert cli("data", "check", root, "--html", page).code == 2
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 5
    assert text.count("data:image/png;base64,") == 1
    assert "damaged or truncated" in text
    assert "<script>alert" not in text
    assert "http" not in text.replace("https://", "http://").replace("data:", "")


def test_cases_with_findings_come_first_on_the_page(dataset_folder, tmp_path):
    root = dataset_folder(num_cases=6, seed=1)
    voxel(scan(root, "case_004"), np.nan)
    check(root, html=tmp_path / "check.html")
    table = (tmp_path / "check.html").read_text().partition('id="cases"')[2]
    assert table.index("case_004") < table.index("case_000")


def test_a_label_stored_with_other_axes_is_trained_on_and_scored(phantoms, tmp_path, cli):
    import nibabel as nib

    root = shutil.copytree(phantoms, tmp_path / "turned")
    for path in (root / "labelsTr").iterdir():
        nib.save(nib.load(path).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), path)
    assert check(root).ok
    outcome = cli("train", root, "--out", tmp_path / "run", "--epochs", 1, *settings())
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "evaluation.csv").is_file()


@pytest.mark.data
def test_the_hippocampus_set_is_whole_and_its_mixture_of_scales_is_noted(data_root):
    report = check(data_root / "Task04_Hippocampus")
    assert report.num_cases == 200
    assert report.codes == {"label-float": 2, "intensity-mixture": 1}
    mixture = next(finding for finding in report.findings if finding.code == "intensity-mixture")
    assert "maxima from 112 to 1704295" in mixture.message


@pytest.mark.data
def test_the_acdc_set_holds_one_patient_twice(data_root):
    # The images of patients 074 and 076 are equal voxel by voxel, their labels are not.
    report = check(data_root / "Task101_ACDC")
    errors = report.of("error")
    assert {finding.code for finding in errors} == {"duplicate-across-patients"}
    assert {finding.cases for finding in errors} == {
        (f"patient074_frame{frame}", f"patient076_frame{frame}") for frame in ("01", "12")
    }
    assert report.of("warning") == []


@pytest.mark.data
@pytest.mark.parametrize("task", ["Task104_SunnybrookLV", "Task103_BRATS2015x6"])
def test_other_real_sets_give_no_error_and_no_warning(data_root, task):
    report = check(data_root / task)
    assert report.ok
    assert report.of("warning") == []


@pytest.mark.data
def test_scans_of_odd_orientations_are_checked_as_images(data_root):
    report = check(data_root / "formats", fast=True)
    assert report.ok
    assert report.codes["mixed-orientations"] == 1


@pytest.mark.data
def test_a_leak_ends_when_one_of_its_patients_is_left_out(data_root, cli):
    outcome = cli("data", "check", data_root / "Task101_ACDC", "--exclude", "patient076")
    assert outcome.code == 0
    assert "78 cases of 39 patients: 0 errors" in outcome.out
