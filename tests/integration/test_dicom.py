"""DICOM in, DICOM out: through the command line, on real series and on odd folders."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from dicom_files import affine_of, classic, read_seg, save
from medvisionllama import Predictor, api
from medvisionllama.data.formats.dicom import open_series
from medvisionllama.data.formats.dicom_labels import segment_labels
from medvisionllama.data.readers import read_header
from medvisionllama.errors import DataError
from medvisionllama.evaluation.evaluate import read_table

from .conftest import TINY

FAST = {**TINY, "network.insert": "none", "train.num_validations": 1, "train.warmup_steps": 0}

real = pytest.mark.data


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    # Voxels as large as those of the series keep the test fast.
    overrides = {
        **FAST,
        "data.spacing_mm": (4.0, 4.0, 4.0),
        "data.crop_size": (32, 32, 32),
        "inference.overlap": 0.1,
    }
    api.train(phantoms, out=path, epochs=2, overrides=overrides, test=False)
    return path


@real
def test_a_study_gives_a_dicom_mask_for_each_series(run, data_root, tmp_path, cli):
    outcome = cli("predict", run, data_root / "dicom" / "study1", "--out", tmp_path / "masks", "--json")
    assert outcome.code == 0, outcome.err
    records = json.loads(outcome.out)
    assert len(records) == 2
    predictor = Predictor.from_run(run)
    names = predictor.plan.mask_classes
    folders = [data_root / "dicom" / "study1" / name for name in ("13_HCropVolume", "FLAIR")]
    for folder in folders:
        series = open_series(folder)
        [record] = [record for record in records if record["case"] == folder.name]
        assert record["source"]["series_uid"] == series.series_uid
        expected = predictor.predict(series).mask.array
        written = read_seg(tmp_path / "masks" / f"{folder.name}.dcm", read_header(series), names)
        np.testing.assert_array_equal(written, expected)
        found = {name for name, volume in record["volumes_ml"].items() if volume}
        assert found == {names[value] for value in np.unique(expected) if value}
        assert set(segment_labels(tmp_path / "masks" / f"{folder.name}.dcm").values()) <= set(names.values())


@real
def test_a_dicom_mask_and_a_nifti_mask_hold_the_same(run, data_root, tmp_path, cli):
    flair = data_root / "dicom" / "study1" / "FLAIR"
    for kind in ("dicom", "nifti"):
        assert cli("predict", run, flair, "--out", tmp_path / kind, "--format", kind).code == 0
    series = open_series(flair)
    header = read_header(series)
    seg = read_seg(tmp_path / "dicom" / "FLAIR.dcm", header, {1: "head", 2: "tail"})
    nifti = nib.load(tmp_path / "nifti" / "FLAIR.nii.gz")
    np.testing.assert_array_equal(np.asarray(nifti.dataobj), seg)
    np.testing.assert_allclose(nifti.affine, header.affine, atol=1e-4)


@real
def test_a_nifti_mask_is_not_taken_for_the_dicom_mask_that_is_asked_for(run, data_root, tmp_path, cli):
    arguments = ("predict", run, data_root / "dicom" / "study1" / "FLAIR", "--out", tmp_path / "m")
    assert cli(*arguments, "--format", "nifti").code == 0
    outcome = cli(*arguments, "--resume")
    assert outcome.code == 2
    assert "give --format nifti to keep it" in outcome.err
    assert [path.name for path in (tmp_path / "m").glob("FLAIR*")] == ["FLAIR.nii.gz"]
    assert cli(*arguments, "--resume", "--format", "nifti").code == 0


@real
def test_a_missing_slice_is_named_and_nothing_is_written(run, data_root, tmp_path, cli):
    folder = tmp_path / "FLAIR"
    shutil.copytree(data_root / "dicom" / "study1" / "FLAIR", folder)
    middle = open_series(folder).files[10]
    middle.unlink()
    outcome = cli("predict", run, folder, "--out", tmp_path / "masks")
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert "slice 11 of series" in line
    assert "missing" in line
    assert not (tmp_path / "masks").exists()


@real
def test_a_series_that_makes_no_volume_does_not_stop_the_others_of_its_study(run, data_root, tmp_path, cli):
    study = tmp_path / "study"
    shutil.copytree(data_root / "dicom" / "study1", study)
    open_series(study / "FLAIR").files[10].unlink()
    outcome = cli("predict", run, study, "--out", tmp_path / "masks")
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert "slice 11 of series" in line
    assert [path.name for path in (tmp_path / "masks").glob("*.dcm")] == ["13_HCropVolume.dcm"]


def test_a_dicom_mask_of_a_nifti_scan_is_refused(run, phantoms, tmp_path, cli):
    scan = phantoms / "imagesTr" / "phantom_000.nii.gz"
    outcome = cli("predict", run, scan, "--out", tmp_path / "masks", "--format", "dicom")
    assert outcome.code == 2
    assert "no DICOM series" in outcome.err
    assert not (tmp_path / "masks").exists()


@real
def test_a_single_slice_and_a_mask_are_no_scans(run, data_root, tmp_path, cli):
    slice_file = data_root / "dicom" / "study1" / "FLAIR" / "000005.dcm"
    outcome = cli("predict", run, slice_file, "--out", tmp_path / "masks")
    assert outcome.code == 2
    assert "folder" in outcome.err
    assert cli("predict", run, slice_file.parent, "--out", tmp_path / "masks").code == 0
    again = cli("predict", run, tmp_path / "masks", "--out", tmp_path / "again")
    assert again.code == 2
    assert "no scan there" in again.err


def test_a_dataset_of_dicom_series_trains_and_its_masks_fit_labels_of_another_orientation(tmp_path, cli):
    """Images as a scanner sends them; labels as a drawing program saves them, with axes mirrored and exchanged."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    for number in range(5):
        label = np.zeros((16, 20, 24), np.uint8)  # z, y, x
        z, y, x = rng.integers(2, 5, 3)
        label[z : z + 8, y : y + 10, x : x + 12] = 1
        stored = (rng.normal(40, 10, label.shape) + 200 * label).astype(np.int16)
        datasets = classic(stored, spacing=(1.0, 1.0, 1.0))
        for dataset in datasets:
            dataset.Modality = "CT"
        save(datasets, data / "images" / f"case_{number}")
        turned = nib.Nifti1Image(label.transpose(2, 1, 0), affine_of(spacing=(1.0, 1.0, 1.0))).as_reoriented(
            nib.orientations.axcodes2ornt(("S", "A", "R"))
        )
        (data / "labels").mkdir(exist_ok=True)
        nib.save(turned, data / "labels" / f"case_{number}.nii.gz")
    assert cli("data", "check", data).code == 0
    arguments = [
        f"--set={key}={value}"
        for key, value in {**FAST, "train.ema_decay": 0, "train.learning_rate": 0.01}.items()
    ]
    outcome = cli("train", data, "--out", tmp_path / "run", "--epochs", 80, *arguments)
    assert outcome.code == 0, outcome.err
    plan = Predictor.from_run(tmp_path / "run").plan
    assert plan.channels == ("CT",)
    assert plan.normalisation[0].kind == "dataset"
    table = read_table(tmp_path / "run" / "evaluation.csv")
    assert table["dice"].astype(float).min() > 0.5


@real
def test_dicom_masks_are_evaluated_against_labels(run, data_root, tmp_path, cli):
    study = data_root / "dicom" / "study1"
    assert cli("predict", run, study, "--out", tmp_path / "seg").code == 0
    assert cli("predict", run, study, "--out", tmp_path / "labels", "--format", "nifti").code == 0
    (tmp_path / "labels" / "labels.txt").unlink()
    outcome = cli("evaluate", tmp_path / "seg", tmp_path / "labels", "--json")
    assert outcome.code == 0, outcome.err
    cases = json.loads(outcome.out)["cases"]
    assert {row["class"] for row in cases} == {"head", "tail", "foreground"}
    assert {row["dice"] for row in cases} == {1.0}
    (tmp_path / "seg" / "labels.txt").unlink()
    refused = cli("evaluate", tmp_path / "seg", tmp_path / "labels")
    assert refused.code == 2
    assert "labels.txt" in refused.err


@real
def test_a_mask_of_another_scan_of_the_same_name_is_not_taken_for_this_one_s(run, data_root, tmp_path, cli):
    ours = data_root / "dicom" / "study1" / "FLAIR"
    theirs = tmp_path / "other" / "FLAIR"
    save(classic(np.random.default_rng(0).integers(0, 500, (12, 16, 16)).astype(np.int16)), theirs)
    assert cli("predict", run, ours, "--out", tmp_path / "m").code == 0
    outcome = cli("predict", run, theirs, "--out", tmp_path / "m", "--resume")
    assert outcome.code == 2
    assert "the mask of another series" in outcome.err


def test_a_new_series_in_a_folder_does_not_keep_others_from_their_masks(run, tmp_path, cli):
    stored = np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)
    for name in ("p1", "p2"):
        save(classic(stored), tmp_path / "in" / name)
    command = ("predict", run, tmp_path / "in", "--out", tmp_path / "m", "--resume", "--json")
    assert cli(*command).code == 0
    mask = (tmp_path / "m" / "p1.dcm").read_bytes()
    shutil.rmtree(tmp_path / "in" / "p1")
    for name in ("p1", "p3"):
        save(classic(stored), tmp_path / "in" / name)
    outcome = cli(*command)
    assert outcome.code == 2
    first, made = json.loads(outcome.out)
    assert "is the mask of another series" in first["error"]
    assert (made["case"], "error" in made) == ("p3", False)
    assert (tmp_path / "m" / "p1.dcm").read_bytes() == mask


@pytest.mark.parametrize("arrives", ["slices", "copy"])
def test_a_series_that_is_still_being_sent_gets_no_mask(run, tmp_path, monkeypatch, arrives):
    datasets = classic(np.random.default_rng(0).integers(0, 500, (12, 16, 16)).astype(np.int16))
    folder, segment = tmp_path / "CT", Predictor.segment
    save(datasets[:8], folder)

    def segmented(self, scan, **options):
        if arrives == "slices":
            save(datasets[8:], folder, names=[f"late{number}" for number in range(4)])
        else:
            shutil.copy(next(folder.iterdir()), folder / "again")
        return segment(self, scan, **options)

    monkeypatch.setattr(Predictor, "segment", segmented)
    [record] = api.predict(run, folder, out=tmp_path / "m", keep_going=True)
    if arrives == "slices":
        assert "changed while it was segmented" in record["error"]
        assert not list((tmp_path / "m").glob("*.dcm"))
    else:
        assert "error" not in record


def test_a_series_that_is_moved_away_does_not_stop_the_others(run, tmp_path, monkeypatch):
    stored = np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)
    for name in ("p1", "p2"):
        save(classic(stored), tmp_path / "in" / name)
    segment = Predictor.segment

    def segmented(self, scan, **options):
        monkeypatch.setattr(Predictor, "segment", segment)
        (tmp_path / "in" / "p1").rename(tmp_path / "elsewhere")
        return segment(self, scan, **options)

    monkeypatch.setattr(Predictor, "segment", segmented)
    first, second = api.predict(run, tmp_path / "in", out=tmp_path / "m", keep_going=True)
    assert "was the scan moved?" in first["error"]
    assert "error" not in second


def test_files_that_nobody_gave_are_no_new_slices(run, tmp_path):
    datasets = classic(np.random.default_rng(0).integers(0, 500, (12, 16, 16)).astype(np.int16))
    files = save(datasets, tmp_path / "CT", names=[f"{number:02d}" for number in range(12)])
    [record] = api.predict(run, files[:8], out=tmp_path / "m", keep_going=True)
    assert "error" not in record


@pytest.mark.parametrize("more", [("--overwrite",), ("--overwrite", "--resume")])
def test_a_mask_of_another_patient_s_series_is_not_overwritten(run, tmp_path, cli, more):
    stored = np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)
    for patient in ("p1", "p2"):
        save(classic(stored), tmp_path / patient / "CT")
    mask = tmp_path / "m" / "CT.dcm"
    command = ("predict", run, "--out", mask.parent, *more)
    assert cli(*command, tmp_path / "p1" / "CT").code == 0
    first, uid = mask.read_bytes(), open_series(tmp_path / "p1").series_uid
    outcome = cli(*command, tmp_path / "p2" / "CT")
    assert outcome.code == 2
    assert f"{mask} is the mask of another series ({uid}) than series Scan" in outcome.err
    assert "choose another --out" in outcome.err
    assert mask.read_bytes() == first
    # What is damaged is nobody's mask.
    mask.write_bytes(first[:200])
    assert cli(*command, tmp_path / "p2" / "CT").code == 0


@real
def test_the_folder_one_stands_in_has_a_name(run, data_root, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(data_root / "dicom" / "study1" / "FLAIR")
    assert cli("predict", run, ".", "--out", tmp_path / "m").code == 0
    assert (tmp_path / "m" / "FLAIR.dcm").is_file()


def test_a_damaged_series_beside_a_scan_stops_only_itself(run, phantoms, tmp_path, cli):
    folder = tmp_path / "mixed"
    save(classic(np.ones((8, 8, 8), np.int16)), folder / "sub")
    damaged = next((folder / "sub").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:400])
    shutil.copy(phantoms / "imagesTr" / "phantom_000.nii.gz", folder)
    outcome = cli("predict", run, folder, "--out", tmp_path / "m")
    assert outcome.code == 2
    assert "damaged or truncated" in outcome.err
    assert (tmp_path / "m" / "phantom_000.nii.gz").is_file()


def test_a_damaged_file_stops_the_series_of_its_folder_alone(run, tmp_path, cli):
    stored = np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)
    for name in ("P1", "P2", "P3"):
        save(classic(stored), tmp_path / "in" / name)
    torn = next((tmp_path / "in" / "P2").iterdir())
    torn.write_bytes(torn.read_bytes()[:400])
    # Nothing of this one is whole.
    shutil.copytree(tmp_path / "in" / "P2", tmp_path / "in" / "P4")
    for file in (tmp_path / "in" / "P4").iterdir():
        file.write_bytes(file.read_bytes()[:400])
    outcome = cli("predict", run, tmp_path / "in", "--out", tmp_path / "m", "--json")
    assert outcome.code == 2
    records = {record["case"]: record.get("error", "") for record in json.loads(outcome.out)}
    assert [not records[name] for name in ("P1", "P2", "P3", "P4")] == [True, False, True, False]
    assert f"{torn} is damaged or truncated" in records["P2"]
    assert str(tmp_path / "in" / "P4") in records["P4"]
    assert {path.name for path in (tmp_path / "m").glob("*.dcm")} == {"P1.dcm", "P3.dcm"}


def test_a_series_that_several_arguments_share_is_one_scan(run, tmp_path):
    datasets = classic(np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16))
    halves = [tmp_path / "x" / "1", tmp_path / "x" / "2"]
    save(datasets[::2], halves[0])
    save(datasets[1::2], halves[1])
    for inputs in (halves, sorted(path for half in halves for path in half.iterdir())):
        [record] = api.predict(run, inputs, out=tmp_path / "m", overwrite=True)
        assert (record["case"], record["source"]["folder"]) == ("x", str(tmp_path / "x"))
        assert (
            len(pydicom.dcmread(record["mask"]).ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 8
        )


def test_a_folder_that_cannot_be_listed_is_told_in_one_line(run, tmp_path, cli, unlistable):
    for name in ("P001", "P002"):
        save(classic(np.ones((8, 8, 8), np.int16)), tmp_path / "cohort" / name)
    unlistable("P002")
    outcome = cli("predict", run, tmp_path / "cohort", "--out", tmp_path / "m")
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert "not allowed to read" in line
    assert str(tmp_path / "cohort" / "P002") in line


@pytest.mark.parametrize("old", [".nii.gz", ".dcm"])
def test_the_mask_of_before_goes_when_it_was_the_other_kind_of_file(run, tmp_path, monkeypatch, old):
    save(classic(np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)), tmp_path / "CT")
    before = tmp_path / "m" / f"CT{old}"

    def refuse(*_):
        raise DataError("a header that the standard does not like")

    for suffix in (old, {".dcm": ".nii.gz", ".nii.gz": ".dcm"}[old]):
        with monkeypatch.context() as patch:
            if suffix != ".dcm":
                patch.setattr("medvisionllama.inference.batch.write_seg", refuse)
            [record] = api.predict(run, tmp_path / "CT", out=tmp_path / "m", overwrite=True)
        assert Path(record["mask"]).name == f"CT{suffix}"
    beside = {"labels.txt", "predictions.jsonl"}
    assert {path for path in before.parent.iterdir() if path.name not in beside} == {Path(record["mask"])}
    assert Path(record["mask"]) != before
    # What stands in place of a DICOM mask that cannot be is kept, and so is a DICOM mask.
    assert api.predict(run, tmp_path / "CT", out=tmp_path / "m", resume=True) == []


@pytest.mark.parametrize("maps", [False, True])
def test_a_file_of_the_user_named_as_a_mask_might_be_stays(run, tmp_path, maps):
    save(classic(np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)), tmp_path / "CT")
    own = tmp_path / "m" / "CT.nii.gz"
    own.parent.mkdir()
    own.write_bytes(b"drawn by hand")
    [record] = api.predict(run, tmp_path / "CT", out=tmp_path / "m", overwrite=True, uncertainty=maps)
    assert Path(record["mask"]).name == "CT.dcm"
    assert own.read_bytes() == b"drawn by hand"
    assert api.predict(run, tmp_path / "CT", out=tmp_path / "m", resume=True, uncertainty=maps) == []


@pytest.mark.parametrize("more", [{"overwrite": True}, {"resume": True}])
def test_a_mask_that_cannot_be_dicom_takes_no_file_of_the_user_s_place(run, tmp_path, monkeypatch, more):
    save(classic(np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)), tmp_path / "CT")
    own = tmp_path / "m" / "CT.nii.gz"
    own.parent.mkdir()
    own.write_bytes(b"drawn by hand")

    def refuse(*_):
        raise DataError("a header that the standard does not like")

    monkeypatch.setattr("medvisionllama.inference.batch.write_seg", refuse)
    with pytest.raises(DataError, match="where it would go as NIfTI, is no mask of ours"):
        api.predict(run, tmp_path / "CT", out=tmp_path / "m", **more)
    assert own.read_bytes() == b"drawn by hand"


@pytest.mark.parametrize("maps", [False, True])
def test_a_dicom_mask_stays_where_the_new_one_has_no_place(run, tmp_path, monkeypatch, maps):
    save(classic(np.random.default_rng(0).integers(0, 500, (8, 16, 16)).astype(np.int16)), tmp_path / "CT")
    api.predict(run, tmp_path / "CT", out=tmp_path / "m")
    (tmp_path / "m" / "CT.nii.gz").write_bytes(b"drawn by hand")
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def refuse(*_):
        raise DataError("a header that the standard does not like")

    monkeypatch.setattr("medvisionllama.inference.batch.write_seg", refuse)
    with pytest.raises(DataError, match="where it would go as NIfTI, is no mask of ours"):
        api.predict(run, tmp_path / "CT", out=tmp_path / "m", overwrite=True, uncertainty=maps)
    assert {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()} == before
