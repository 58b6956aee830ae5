"""Many scans at once: ensembles, maps, formats, and what happens when one of them is bad."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medvisionllama import Predictor, api
from medvisionllama._files import read_json_lines
from medvisionllama.config import read_config, write_config
from medvisionllama.data.readers import read_image
from medvisionllama.data.volume import Volume
from medvisionllama.errors import CheckpointError, ConfigError, DataError
from medvisionllama.inference import batch
from medvisionllama.inference.ledger import Ledger
from medvisionllama.inference.predictor import Prediction, check_alike
from medvisionllama.inference.writers import label_table, write_mask
from medvisionllama.run_dir import RunDir

from .conftest import FAST


@pytest.fixture(scope="module")
def runs(trained_folds):
    return [trained_folds / "fold0", trained_folds / "fold1"]


@pytest.fixture
def scans(phantoms, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(3):
        shutil.copy(phantoms / "imagesTr" / f"phantom_{number:03d}.nii.gz", folder)
    return folder


def probabilities(run, scan):
    shares = Predictor.from_run(*run).predict(scan, probabilities=True).probabilities
    return shares / 255


def test_runs_given_together_are_averaged(runs, scans):
    scan = scans / "phantom_000.nii.gz"
    alone = [probabilities([run], scan) for run in runs]
    assert not np.allclose(*alone, atol=0.02)
    np.testing.assert_allclose(probabilities(runs, scan), np.mean(alone, axis=0), atol=2 / 255)


def test_the_command_averages_too(runs, scans, tmp_path, cli):
    outcome = cli("predict", runs[0], scans, "--also", runs[1], "--out", tmp_path / "masks")
    assert outcome.code == 0, outcome.err
    expected = Predictor.from_run(*runs).predict(scans / "phantom_001.nii.gz").mask.array
    written = nib.load(tmp_path / "masks" / "phantom_001.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected)


def test_runs_of_other_classes_are_not_averaged(runs, scans, dataset_folder, tmp_path):
    other = dataset_folder("other", num_cases=6, values=(3, 5))
    api.train(other, out=tmp_path / "other", epochs=1, overrides=FAST, test=False)
    with pytest.raises(CheckpointError, match="other channels or classes"):
        api.predict(runs[0], [scans], also=[tmp_path / "other"], out=tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_runs_whose_merged_classes_differ_are_not_averaged(runs, tmp_path):
    paths = [tmp_path / "liver", tmp_path / "spleen"]
    for path in paths:
        shutil.copytree(runs[0], path)
        plan = json.loads((path / "plan.json").read_text()) | {"merged": True, "classes": {"1": path.name}}
        (path / "plan.json").write_text(json.dumps(plan))
    check_alike([paths[0], paths[0]])
    with pytest.raises(CheckpointError, match="other channels or classes"):
        check_alike(paths)


def test_maps_of_probability_and_doubt_fit_the_mask(runs, scans, tmp_path):
    [record] = api.predict(
        runs[0], [scans / "phantom_000.nii.gz"], out=tmp_path / "m", probabilities=True, uncertainty=True
    )
    mask = nib.load(record["mask"])
    shares = nib.load(record["probabilities"]).get_fdata()
    doubt = nib.load(record["uncertainty"]).get_fdata()
    assert shares.shape == (*mask.shape, 3)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=3 / 255)
    clear = np.sort(shares, axis=-1)
    clear = clear[..., -1] - clear[..., -2] > 2 / 255
    np.testing.assert_array_equal(shares.argmax(axis=-1)[clear], np.asarray(mask.dataobj)[clear])
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = -np.nansum(shares * np.log(shares), axis=-1) / np.log(3)
    np.testing.assert_allclose(doubt, expected, atol=0.05)
    assert np.array_equal(nib.load(record["uncertainty"]).affine, mask.affine)


@pytest.mark.parametrize(
    ("wanted", "ending"),
    [("auto", ".seg.nrrd"), ("nifti", ".nii.gz"), ("mha", ".mha"), ("nrrd", ".seg.nrrd")],
)
def test_an_nrrd_scan_gives_the_mask_of_the_same_scan_in_nifti(runs, scans, tmp_path, wanted, ending):
    nifti = scans / "phantom_002.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(nifti)), str(tmp_path / "phantom_002.nrrd"))
    [record] = api.predict(runs[0], [tmp_path / "phantom_002.nrrd"], out=tmp_path / "m", mask_format=wanted)
    assert record["mask"] == str(tmp_path / "m" / f"phantom_002{ending}")
    expected = Predictor.from_run(runs[0]).predict(nifti).mask
    written = sitk.ReadImage(record["mask"])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written).T, expected.array)
    original = sitk.ReadImage(str(nifti))
    np.testing.assert_allclose(written.GetOrigin(), original.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(written.GetDirection(), original.GetDirection(), atol=1e-5)


def test_one_bad_scan_is_named_and_the_others_are_segmented(runs, scans, tmp_path, cli):
    bad = scans / "phantom_001.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-30])
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "masks")
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert "phantom_001.nii.gz is damaged or truncated" in line
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.nii.gz")) == [
        "phantom_000.nii.gz",
        "phantom_002.nii.gz",
    ]


def test_an_interrupted_batch_goes_on_with_the_scans_that_are_left(runs, scans, tmp_path, cli):
    assert cli("predict", runs[0], scans / "phantom_000.nii.gz", "--out", tmp_path / "m").code == 0
    before = (tmp_path / "m" / "phantom_000.nii.gz").stat().st_mtime_ns
    assert cli("predict", runs[0], scans, "--out", tmp_path / "m").code == 2
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m", "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert [record["case"] for record in json.loads(outcome.out)] == ["phantom_001", "phantom_002"]
    assert (tmp_path / "m" / "phantom_000.nii.gz").stat().st_mtime_ns == before


def test_a_table_that_contradicts_the_dataset_of_the_labels_is_refused(tmp_path, write_nifti):
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[:2], truth[4:] = 1, 2
    masks, labels = tmp_path / "masks", tmp_path / "set" / "labelsTr"
    for folder in (masks, labels):
        write_nifti(folder / "a.nii.gz", truth)
    names = {"background": 0, "spleen": 1, "liver": 2}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": names}))
    for written in ({1: "Spleen", 2: "liver"}, {1: "Milz", 2: "Leber"}):
        (masks / "labels.txt").write_text(label_table(written))
        assert set(api.evaluate(masks, labels)["dice"]) == {1.0}
    for written, words in (
        ({1: "liver", 2: "spleen"}, "gives liver the value 1, .* the value 2"),
        ({1: "foreground"}, "give --merged"),
    ):
        (masks / "labels.txt").write_text(label_table(written))
        with pytest.raises(DataError, match=words):
            api.evaluate(masks, labels)
    # Where no dataset says how many classes there are, the labels do.
    (tmp_path / "set" / "dataset.json").unlink()
    write_nifti(masks / "a.nii.gz", (truth > 0).astype(np.uint8))
    with pytest.raises(DataError, match=r"a.nii.gz holds the value 2, .*; give --merged if"):
        api.evaluate(masks, labels)
    assert set(api.evaluate(masks, labels, merged=True)["dice"]) == {1.0}


def test_what_was_done_before_a_disk_filled_is_printed(runs, scans, tmp_path, cli, monkeypatch):
    written = []

    def write(path, *arguments, **options):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write_mask(path, *arguments, **options)

    monkeypatch.setattr("medvisionllama.inference.batch.write_mask", write)
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m", "--json")
    assert outcome.code == 2
    assert "disk is full" in outcome.err
    assert [record["mask"] for record in json.loads(outcome.out)] == [str(path) for path in written]


@pytest.fixture
def meanwhile(monkeypatch):
    """Have something happen while the first scan is segmented."""
    segment = Predictor.segment

    def arrange(happens):
        def segmented(self, scan, **options):
            monkeypatch.setattr(Predictor, "segment", segment)
            made = segment(self, scan, **options)
            happens()
            return made

        monkeypatch.setattr(Predictor, "segment", segmented)

    return arrange


def test_a_mask_that_another_process_has_made_meanwhile_is_not_replaced(runs, scans, tmp_path, meanwhile):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    meanwhile(lambda: api.predict(runs[1], scan, out=folder))
    with pytest.raises(DataError, match="already exists"):
        api.predict(runs[0], scan, out=folder)
    [line] = read_json_lines(folder / "predictions.jsonl")
    assert line["made_by"]["weights_sha256"] == [RunDir(runs[1]).weights_sha256()]
    expected = Predictor.from_run(runs[1]).predict(scan).mask.array
    np.testing.assert_array_equal(nib.load(folder / scan.name).get_fdata(), expected)


def test_a_batch_that_another_one_helps_leaves_out_what_is_made(runs, scans, tmp_path, meanwhile):
    folder = tmp_path / "m"
    (scan, *others) = sorted(scans.iterdir())
    meanwhile(lambda: api.predict(runs[0], [scan, others[1]], out=folder))
    [record] = api.predict(runs[0], scans, out=folder, resume=True)
    assert record["case"] == "phantom_001"
    lines = read_json_lines(folder / "predictions.jsonl")
    assert sorted(line["case"] for line in lines) == ["phantom_000", "phantom_001", "phantom_002"]


def test_a_table_of_other_classes_that_came_meanwhile_is_not_replaced(runs, scans, tmp_path, meanwhile):
    table = tmp_path / "m" / "labels.txt"
    table.parent.mkdir()
    meanwhile(lambda: table.write_text("of another run"))
    with pytest.raises(DataError, match="not the table of this run's classes"):
        api.predict(runs[0], scans / "phantom_000.nii.gz", out=table.parent)
    assert table.read_text() == "of another run"
    assert not list(table.parent.glob("*.nii.gz"))


def test_a_mask_that_came_after_the_ledger_was_read_is_known(runs, scans, tmp_path, monkeypatch):
    api.predict(runs[0], scans, out=tmp_path / "m")
    read, calls = Ledger.read, []
    # The first time as it was before the masks came.
    monkeypatch.setattr(Ledger, "read", lambda self: read(self) if calls else calls.append(1) or {})
    assert api.predict(runs[0], scans, out=tmp_path / "m", resume=True) == []


def test_a_scan_that_changes_while_it_is_segmented_gets_no_mask(runs, scans, tmp_path, meanwhile):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    image = nib.load(scan)
    changed = nib.Nifti1Image(image.get_fdata() + 1, image.affine)
    meanwhile(lambda: nib.save(changed, scan))
    first, *others = api.predict(runs[0], scans, out=folder, keep_going=True)
    assert "phantom_000.nii.gz changed while it was segmented" in first["error"]
    assert not (folder / scan.name).exists()
    assert not any("error" in record for record in others)
    assert len(api.predict(runs[0], scans, out=folder, resume=True)) == 1


@pytest.mark.parametrize("name", ["phantom_000.nii.gz", "phantom_002.nii.gz"])
def test_a_scan_that_is_moved_away_does_not_stop_the_others(runs, scans, tmp_path, cli, meanwhile, name):
    meanwhile((scans / name).unlink)
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m", "--json")
    assert outcome.code == 2
    failed = [record for record in json.loads(outcome.out) if "error" in record]
    assert [record["source"]["file"] for record in failed] == [str(scans / name)]
    assert "was the scan moved?" in failed[0]["error"]


def test_a_mask_that_no_line_can_be_written_for_goes_and_resume_makes_it(runs, scans, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("medvisionllama.inference.ledger.append_json", full)
        with pytest.raises(OSError, match="No space"):
            api.predict(runs[0], scans, out=tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.nii.gz"))
    assert len(api.predict(runs[0], scans, out=tmp_path / "m", resume=True)) == 3


def test_one_scan_that_has_changed_does_not_keep_new_ones_from_their_masks(runs, scans, tmp_path, cli):
    changed, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    assert cli("predict", runs[0], changed, "--out", folder).code == 0
    mask = (folder / changed.name).read_bytes()
    image = nib.load(changed)
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), changed)
    outcome = cli("predict", runs[0], scans, "--out", folder, "--resume", "--json")
    assert outcome.code == 2
    first, *others = json.loads(outcome.out)
    assert "has changed since" in first["error"]
    assert [record["case"] for record in others if "error" not in record] == ["phantom_001", "phantom_002"]
    assert (folder / changed.name).read_bytes() == mask
    # Nor does one that was exported anew, smaller.
    nib.save(nib.Nifti1Image(image.get_fdata()[:-2], image.affine), changed)
    (folder / "phantom_001.nii.gz").unlink()
    first, made = json.loads(cli("predict", runs[0], scans, "--out", folder, "--resume", "--json").out)
    assert "the mask of another scan of that name" in first["error"]
    assert (made["case"], "error" in made) == ("phantom_001", False)
    # Other networks make no mixture of a folder, whatever has changed: nothing is segmented.
    (folder / "phantom_002.nii.gz").unlink()
    assert "was made by other networks" in cli("predict", runs[1], scans, "--out", folder, "--resume").err
    assert not (folder / "phantom_002.nii.gz").exists()


def test_a_sheared_scan_is_doubted_and_its_volumes_are_right(runs, scans, tmp_path):
    image = nib.load(scans / "phantom_000.nii.gz")
    tilt = np.eye(4)
    tilt[1, 2] = np.tan(np.radians(20))
    nib.save(nib.Nifti1Image(image.get_fdata(), image.affine @ tilt), tmp_path / "tilted.nii.gz")
    straight, tilted = api.predict(
        runs[0], [scans / "phantom_000.nii.gz", tmp_path / "tilted.nii.gz"], out=tmp_path / "m"
    )
    assert not any("right angle" in line for line in straight["warnings"])
    assert any("20.0 degrees off a right angle" in line for line in tilted["warnings"])
    mask = np.asarray(nib.load(tilted["mask"]).dataobj)
    # Slices that are shifted along each other are no further apart.
    edges = np.prod(image.header.get_zooms()[:3])
    assert sum(tilted["volumes_ml"].values()) == pytest.approx((mask > 0).sum() * edges / 1000)


def test_resume_takes_no_mask_of_another_scan_of_that_name(runs, scans, tmp_path, cli):
    scan = scans / "phantom_000.nii.gz"
    assert cli("predict", runs[0], scan, "--out", tmp_path / "m").code == 0
    again = cli("predict", runs[0], scan, "--out", tmp_path / "m", "--resume")
    assert again.code == 0
    assert "1 of 1 scans have their masks" in again.err
    image = nib.load(scan)
    moved = np.diag([1.0, 1.0, 1.5, 1.0]) @ image.affine
    for other in (
        nib.Nifti1Image(image.get_fdata()[:-2], image.affine),
        nib.Nifti1Image(image.get_fdata(), moved),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        nib.save(other, tmp_path / "other" / scan.name)
        outcome = cli("predict", runs[0], tmp_path / "other" / scan.name, "--out", tmp_path / "m", "--resume")
        assert outcome.code == 2
        assert "the mask of another scan of that name" in outcome.err


def test_resume_takes_no_mask_of_another_run_or_of_other_voxels(runs, scans, tmp_path, cli):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    assert cli("predict", runs[0], scan, "--out", folder).code == 0
    mask = (folder / scan.name).read_bytes()

    def refused(*arguments: object) -> str:
        outcome = cli("predict", *arguments, "--out", folder, "--resume")
        assert outcome.code == 2
        assert (folder / scan.name).read_bytes() == mask
        return outcome.err

    assert "was made by other networks" in refused(runs[1], scan)
    assert "was made by other networks" in refused(runs[0], scan, "--also", runs[1])
    assert "from other views of each scan (mirrored, windows" in refused(runs[0], scan, "--fast")
    assert "no component is removed" in refused(runs[0], scan, "--largest")
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), scan)
    assert "has changed since" in refused(runs[0], scan)
    (folder / "predictions.jsonl").unlink()
    assert "no predictions.jsonl beside it" in refused(runs[0], scan)


@pytest.mark.parametrize(("name", "done"), [("_check_unchanged", 0), ("write_text", 1)])
def test_wherever_a_batch_is_stopped_resume_goes_on(runs, scans, tmp_path, monkeypatch, name, done):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # What comes last before a mask and its line, and first after them.
        patch.setattr(batch, name, stop)
        with pytest.raises(KeyboardInterrupt):
            api.predict(runs[0], scans, out=tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.nii.gz"))) == done
    assert len(api.predict(runs[0], scans, out=tmp_path / "m", resume=True)) == 3 - done
    assert len(api.predict(runs[0], scans, out=tmp_path / "m", resume=True)) == 0
    assert (tmp_path / "m" / "labels.txt").is_file()


def test_maps_that_are_missing_are_made_by_resume(runs, scans, tmp_path, cli):
    scan = scans / "phantom_000.nii.gz"
    assert cli("predict", runs[0], scan, "--out", tmp_path / "m").code == 0
    assert cli("predict", runs[0], scan, "--out", tmp_path / "m", "--resume", "--uncertainty").code == 0
    assert (tmp_path / "m" / "uncertainty" / "phantom_000.nii.gz").is_file()


def interrupt_at(number, patch):
    """Have Ctrl-C come when the scan of this number is segmented."""
    segment, calls = Predictor.segment, []

    def interrupted(self, scan, **options):
        calls.append(scan)
        if len(calls) == number:
            raise KeyboardInterrupt
        return segment(self, scan, **options)

    patch.setattr(Predictor, "segment", interrupted)


def test_resume_takes_no_map_of_another_prediction(runs, scans, tmp_path, cli):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    doubt = folder / "uncertainty" / scan.name
    assert cli("predict", runs[1], scan, "--out", folder, "--uncertainty").code == 0
    theirs = doubt.read_bytes()
    assert cli("predict", runs[0], scan, "--out", folder, "--overwrite").code == 0
    assert not doubt.exists()
    # As a folder may have it whose masks were overwritten before maps of other networks went with them.
    doubt.write_bytes(theirs)
    resume = ("predict", runs[0], scan, "--out", folder, "--resume", "--uncertainty")
    assert cli(*resume).code == 0
    expected = Predictor.from_run(runs[0]).predict(scan, uncertainty=True).uncertainty / 255
    np.testing.assert_allclose(nib.load(doubt).get_fdata(), expected, atol=1e-6)
    assert "1 of 1 scans have their masks" in cli(*resume).err


def test_resume_takes_no_map_that_came_with_a_mask_of_another_format(runs, scans, tmp_path):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    for run, kind in ((runs[0], "nrrd"), (runs[1], "nifti")):
        api.predict(run, scan, out=folder, mask_format=kind, uncertainty=True, overwrite=True)
    asked = {"out": folder, "mask_format": "nrrd", "uncertainty": True, "resume": True}
    [record] = api.predict(runs[0], scan, **asked)
    expected = Predictor.from_run(runs[0]).predict(scan, uncertainty=True).uncertainty / 255
    np.testing.assert_allclose(nib.load(record["uncertainty"]).get_fdata(), expected, atol=1e-6)
    assert api.predict(runs[0], scan, **asked) == []


@pytest.mark.parametrize("broken", ["inference.batch.write_mask", "inference.ledger.append_json"])
@pytest.mark.parametrize(("maker", "maps"), [(1, False), (1, True), (0, False)])
def test_an_overwrite_that_fails_leaves_all_as_it_was(
    runs, scans, tmp_path, monkeypatch, broken, maker, maps
):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    api.predict(runs[maker], scan, out=folder, probabilities=maps)
    # As somebody corrected it by hand.
    (folder / scan.name).write_bytes(b"precious")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(f"medvisionllama.{broken}", full)
        with pytest.raises(OSError, match="No space"):
            api.predict(runs[0], scan, out=folder, overwrite=True, uncertainty=maps)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(api.predict(runs[0], scan, out=folder, overwrite=True, uncertainty=maps)) == 1
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("maps", [False, True])
def test_a_mask_of_before_lies_there_until_the_new_one_does_but_never_beside_its_maps(
    runs, scans, tmp_path, monkeypatch, maps
):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    api.predict(runs[1], scan, out=folder)
    first, here, left = (folder / scan.name).read_bytes(), [], []

    def write(path, *arguments, **options):
        # What a process that is killed now would leave.
        here.append(path.exists() and path.read_bytes() == first)
        left.extend(file.read_bytes() == first for file in folder.glob(".before-*"))
        return write_mask(path, *arguments, **options)

    monkeypatch.setattr(batch, "write_mask", write)
    api.predict(runs[0], scan, out=folder, overwrite=True, uncertainty=maps)
    assert (here, left) == ([not maps], [True])
    assert not list(folder.rglob(".*"))


def test_volumes_are_counted_before_there_is_a_mask_without_a_line(runs, scans, tmp_path, monkeypatch):
    folder, without_line, count = tmp_path / "m", [], Prediction.volumes_ml.fget

    def counted(self):
        lines = read_json_lines(folder / "predictions.jsonl")
        without_line.append(len(list(folder.glob("*.nii.gz"))) - len(lines))
        return count(self)

    monkeypatch.setattr(Prediction, "volumes_ml", property(counted))
    assert len(api.predict(runs[0], scans, out=folder)) == 3
    assert set(without_line) == {0}


@pytest.mark.parametrize("before", [False, True])
def test_a_signal_that_comes_when_the_line_is_written_leaves_the_mask(
    runs, scans, tmp_path, monkeypatch, before
):
    scan, folder, sync = scans / "phantom_000.nii.gz", tmp_path / "m", os.fsync
    if before:
        api.predict(runs[1], scan, out=folder)

    def stop(file):
        sync(file)
        if len(read_json_lines(folder / "predictions.jsonl")) > before:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            api.predict(runs[0], scan, out=folder, overwrite=before)
    assert [mask.name for mask in folder.glob("*.nii.gz")] == [scan.name]
    assert not list(folder.glob(".before-*"))
    assert api.predict(runs[0], scan, out=folder, resume=True) == []


def test_maps_lie_where_a_scan_without_a_place_lies(runs, scans, tmp_path):
    image = nib.load(scans / "phantom_000.nii.gz")
    unplaced = nib.Nifti1Image(image.get_fdata(), None)
    unplaced.header.set_zooms((1.0, 1.0, 1.0))
    nib.save(unplaced, tmp_path / "scan.nii.gz")
    [record] = api.predict(
        runs[0], tmp_path / "scan.nii.gz", out=tmp_path / "m", probabilities=True, uncertainty=True
    )
    for kind in ("mask", "probabilities", "uncertainty"):
        header = nib.load(record[kind]).header
        assert (header["sform_code"], header["qform_code"]) == (0, 0), kind
        assert header.get_zooms()[:3] == (1, 1, 1)
    assert 0.1 < nib.load(record["uncertainty"]).get_fdata().max() <= 1 + 1e-6


def test_maps_of_every_earlier_prediction_go_with_its_mask(runs, scans, tmp_path):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    api.predict(runs[1], scan, out=folder, uncertainty=True)
    api.predict(runs[1], scan, out=folder, probabilities=True, resume=True)
    api.predict(runs[0], scan, out=folder, overwrite=True)
    assert not list(folder.glob("*/*.nii.gz"))


def test_a_map_that_is_not_ours_stays(runs, scans, tmp_path):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"
    api.predict(runs[0], scan, out=folder)
    own = folder / "uncertainty" / scan.name
    own.parent.mkdir()
    own.write_text("mine")
    api.predict(runs[0], scan, out=folder, overwrite=True)
    assert own.read_text() == "mine"


def test_an_interrupted_overwrite_leaves_no_mask_beside_the_map_of_another(
    runs, scans, tmp_path, monkeypatch
):
    scan, folder = scans / "phantom_000.nii.gz", tmp_path / "m"

    def stop(*_, **__):
        raise KeyboardInterrupt

    api.predict(runs[1], scan, out=folder, uncertainty=True)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_mask", stop)
        with pytest.raises(KeyboardInterrupt):
            api.predict(runs[0], scan, out=folder, uncertainty=True, overwrite=True)
    assert api.predict(runs[1], scan, out=folder, uncertainty=True, resume=True) == []
    expected = Predictor.from_run(runs[1]).predict(scan, uncertainty=True).uncertainty / 255
    written = nib.load(folder / "uncertainty" / scan.name).get_fdata()
    np.testing.assert_allclose(written, expected, atol=1e-6)


def test_an_interrupted_overwrite_goes_on_with_the_masks_that_are_left(
    runs, scans, tmp_path, cli, monkeypatch
):
    folder = tmp_path / "m"
    api.predict(runs[1], scans, out=folder)
    command = ("predict", runs[0], scans, "--out", folder)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        assert cli(*command, "--overwrite").code == 130
    first = (folder / "phantom_000.nii.gz").stat().st_mtime_ns
    assert "was made by other networks" in cli(*command, "--resume").err
    outcome = cli(*command, "--overwrite", "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert [record["case"] for record in json.loads(outcome.out)] == ["phantom_001", "phantom_002"]
    assert (folder / "phantom_000.nii.gz").stat().st_mtime_ns == first
    assert api.predict(runs[0], scans, out=folder, resume=True) == []
    # What nobody knows the maker of is replaced too, and so is the mask of voxels that have changed.
    (folder / "predictions.jsonl").unlink()
    assert len(api.predict(runs[0], scans, out=folder, overwrite=True, resume=True)) == 3
    image = nib.load(scans / "phantom_001.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), scans / "phantom_001.nii.gz")
    [record] = api.predict(runs[0], scans, out=folder, overwrite=True, resume=True)
    assert record["case"] == "phantom_001"


def test_no_output_replaces_what_nobody_gave_up(runs, scans, tmp_path, cli):
    inputs = tmp_path / "d" / "probabilities"
    shutil.copytree(scans, inputs)
    before = {path: path.read_bytes() for path in inputs.iterdir()}
    arguments = ("predict", runs[0], inputs, "--out", tmp_path / "d", "--probabilities", "--overwrite")
    assert "one of the scans" in cli(*arguments).err
    assert "one of the scans" in cli(*arguments, "--resume").err
    assert {path: path.read_bytes() for path in inputs.iterdir()} == before
    notes = tmp_path / "n" / "labels.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    outcome = cli("predict", runs[0], scans, "--out", notes.parent)
    assert outcome.code == 2
    assert "not the table of this run's classes" in outcome.err
    assert [path.name for path in notes.parent.iterdir()] == ["labels.txt"]
    assert notes.read_text() == "mine"


def test_a_name_as_long_as_the_disk_allows_is_no_hindrance(runs, scans, tmp_path, cli):
    long = scans / f"{'a' * 240}.nii.gz"
    shutil.copy(scans / "phantom_000.nii.gz", long)
    outcome = cli("predict", runs[0], long, "--out", tmp_path / "m")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "m" / long.name).is_file()


def test_a_segmentation_beside_its_scan_is_no_scan(runs, scans, tmp_path, cli):
    folder = tmp_path / "slicer"
    folder.mkdir()
    sitk.WriteImage(sitk.ReadImage(str(scans / "phantom_002.nii.gz")), str(folder / "a.nrrd"))
    assert cli("predict", runs[0], folder / "a.nrrd", "--out", folder).code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.nrrd",
        "a.seg.nrrd",
        "labels.txt",
        "predictions.jsonl",
    ]
    outcome = cli("predict", runs[0], folder, "--out", tmp_path / "m", "--json")
    assert [record["case"] for record in json.loads(outcome.out)] == ["a"]
    refused = cli("predict", runs[0], folder / "a.seg.nrrd", "--out", tmp_path / "m2")
    assert refused.code == 2
    assert "is a segmentation, not a scan" in refused.err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask_format": "nii.gz"}, "allowed: auto, nifti"),
        ({"device": "gpu"}, "allowed: auto, cpu, cuda"),
        ({"min_ml": -1.0}, "0 or more"),
    ],
)
def test_wrong_arguments_are_named_in_python_too(runs, scans, tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        api.predict(runs[0], scans, out=tmp_path / "m", **wrong)
    assert not (tmp_path / "m").exists()


def test_components_can_be_removed(runs, scans, tmp_path):
    options = {"largest": True, "min_ml": 1e6, "overwrite": True}
    [all_kept] = api.predict(runs[0], [scans / "phantom_000.nii.gz"], out=tmp_path / "m")
    [none_kept] = api.predict(runs[0], [scans / "phantom_000.nii.gz"], out=tmp_path / "m", **options)
    assert max(all_kept["volumes_ml"].values()) > 0
    assert none_kept["volumes_ml"] == {"head": 0.0, "tail": 0.0}
    assert "nothing was found" in none_kept["warnings"]


def test_few_small_voxels_have_a_volume(runs, scans, tmp_path, cli, monkeypatch):
    voxel_ml = 1.23456789e-8
    monkeypatch.setattr("medvisionllama.inference.predictor.voxel_ml", lambda affine: voxel_ml)
    [record] = api.predict(runs[0], scans / "phantom_000.nii.gz", out=tmp_path / "m")
    mask = np.asarray(nib.load(record["mask"]).dataobj)
    assert record["volumes_ml"] == {
        name: pytest.approx(int((mask == value).sum()) * voxel_ml, rel=1e-5)
        for value, name in {1: "head", 2: "tail"}.items()
    }
    name, volume = max(record["volumes_ml"].items(), key=lambda item: item[1])
    assert volume > 0
    outcome = cli("predict", runs[0], scans / "phantom_000.nii.gz", "--out", tmp_path / "n")
    assert f"{name} {volume:.4g} ml" in outcome.out


def test_python_cleans_as_the_command_does(runs, scans, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    scan = scans / "phantom_000.nii.gz"
    config = RunDir(run).config
    text = config.read_text()
    assert "min_component_ml: 0.0" in text
    config.write_text(text.replace("min_component_ml: 0.0", "min_component_ml: 1000000.0"))
    predictor = Predictor.from_run(run)
    assert not predictor.predict(scan).mask.array.any()
    assert predictor.predict(scan, cleaned=False).mask.array.any()


def test_fast_looks_at_a_scan_once(runs, scans, tmp_path, cli):
    run = shutil.copytree(runs[0], tmp_path / "run")
    scan = scans / "phantom_000.nii.gz"

    def look(flip, turn, **options):
        settings = read_config(RunDir(run).config, {"inference.flip": flip, "inference.turn": turn})
        write_config(settings, RunDir(run).config)
        return Predictor.from_run(run, **options).predict(scan, probabilities=True).probabilities / 255

    once, mirrored = look(False, False), look(True, False)
    turned = look(True, True)
    assert not np.allclose(turned, mirrored, atol=0.01)
    # A third of the mean is of what was turned.
    assert np.abs(turned - mirrored).max() < 1 / 3 + 2 / 255
    np.testing.assert_array_equal(look(True, True, fast=True), once)
    assert cli("predict", run, scan, "--out", tmp_path / "m", "--fast").code == 0
    expected = Predictor.from_run(run, fast=True).predict(scan).mask.array
    written = np.asarray(nib.load(tmp_path / "m" / "phantom_000.nii.gz").dataobj)
    np.testing.assert_array_equal(written, expected)


def test_a_file_in_place_of_the_folder_is_refused_before_the_work(runs, scans, tmp_path, cli, monkeypatch):
    (tmp_path / "m").write_text("not ours")
    monkeypatch.setattr(Predictor, "from_run", lambda *_, **__: pytest.fail("the networks were loaded"))
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m")
    assert outcome.code == 2
    assert "--out is a folder for masks, not a file" in outcome.err
    assert (tmp_path / "m").read_text() == "not ours"


def test_what_is_done_is_printed_when_ctrl_c_comes(runs, scans, tmp_path, cli, monkeypatch):
    interrupt_at(3, monkeypatch)
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m", "--json")
    assert outcome.code == 130
    assert [record["case"] for record in json.loads(outcome.out)] == ["phantom_000", "phantom_001"]
    assert "--resume" in outcome.err


def test_a_scan_that_fails_says_where_it_came_from(runs, scans, tmp_path, cli):
    bad = scans / "phantom_001.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-400])
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m", "--json")
    assert outcome.code == 2
    [failed] = [record for record in json.loads(outcome.out) if "error" in record]
    assert failed["source"] == {"file": str(bad)}


def test_doubtful_scans_are_named(runs, scans, tmp_path):
    source = nib.load(scans / "phantom_000.nii.gz")
    wide = source.affine @ np.diag([4, 4, 4, 1])
    nib.save(nib.Nifti1Image(np.full(source.shape, 7, np.int16), wide), tmp_path / "odd.nii.gz")
    [record] = api.predict(runs[0], [tmp_path / "odd.nii.gz"], out=tmp_path / "m")
    text = " ".join(record["warnings"])
    assert "far coarser than the network's grid" in text
    assert "the same everywhere" in text
    # They outlive the terminal that showed them.
    [line] = read_json_lines(tmp_path / "m" / "predictions.jsonl")
    assert line["warnings"] == record["warnings"]


def test_a_spacing_that_fits_no_memory_does_not_stop_the_others(runs, scans, tmp_path, cli):
    source = nib.load(scans / "phantom_001.nii.gz")
    vast = source.affine @ np.diag([1000, 1000, 1000, 1])
    nib.save(nib.Nifti1Image(np.asarray(source.dataobj), vast), scans / "phantom_001.nii.gz")
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m")
    assert outcome.code == 2
    assert "phantom_001.nii.gz: with voxels of 1000 × 1000 × 1000 mm" in outcome.err
    assert sorted(path.name for path in (tmp_path / "m").glob("*.nii.gz")) == [
        "phantom_000.nii.gz",
        "phantom_002.nii.gz",
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_a_scan_that_takes_too_much_memory_does_not_stop_the_others(
    runs, scans, tmp_path, cli, monkeypatch, error
):
    segment = Predictor.segment

    def hungry(self, scan, **options):
        if not hungry.calls:
            hungry.calls += 1
            raise error
        return segment(self, scan, **options)

    hungry.calls = 0
    monkeypatch.setattr(Predictor, "segment", hungry)
    outcome = cli("predict", runs[0], scans, "--out", tmp_path / "m")
    assert outcome.code == 2
    assert "out of memory" in outcome.err
    assert len(list((tmp_path / "m").glob("*.nii.gz"))) == 2


def test_a_name_that_is_no_text_can_be_shown(runs, scans, tmp_path):
    odd = (scans / "phantom_000.nii.gz").rename(scans / os.fsdecode(b"M\xfcller.nii.gz"))
    command = [sys.executable, "-m", "medvisionllama", "predict", runs[0], odd, "--out", tmp_path / "m"]
    # As in a user's locale; in that of C, Python lets such names through by itself.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "m").glob("*.nii.gz"))) == 1


def test_voxels_that_are_no_numbers_are_refused_in_python_too(runs, scans):
    scan = read_image((scans / "phantom_000.nii.gz",))
    array = scan.array.astype(np.float32)
    array[0, 1, 1, 1] = np.nan
    with pytest.raises(DataError, match="1 voxel is NaN"):
        Predictor.from_run(runs[0]).predict(Volume(array, scan.affine))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_and_leaves_whole_masks_only(sent, runs, phantoms, tmp_path):
    scans = tmp_path / "many"
    scans.mkdir()
    for number in range(150):
        shutil.copy(
            phantoms / "imagesTr" / f"phantom_{number % 8:03d}.nii.gz", scans / f"{number:03d}x.nii.gz"
        )
    command = [sys.executable, "-m", "medvisionllama", "predict", runs[0], scans, "--out", tmp_path / "m"]
    process = subprocess.Popen(
        [*map(str, command), "--probabilities"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # Programs in the background of a script are started deaf to Ctrl-C, and pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    # A mask goes again if the signal comes before its line.
    while not read_json_lines(tmp_path / "m" / "predictions.jsonl") and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    masks = sorted((tmp_path / "m").glob("[0-9]*.nii.gz"))
    assert 1 <= len(masks) < 150
    for mask in masks:
        assert np.asarray(nib.load(mask).dataobj).shape == nib.load(scans / mask.name).shape
    assert not list((tmp_path / "m").rglob(".partial-*"))


def test_names_of_slicer_decide_what_a_segment_is(tmp_path, cli):
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[1:3], mask[3:5] = 1, 2
    for folder, names, array in (
        ("p", {1: "liver", 2: "tumour"}, mask),
        ("l", {1: "Tumour", 2: "Liver"}, np.array([0, 2, 1], np.uint8)[mask]),
    ):
        (tmp_path / folder).mkdir()
        write_mask(tmp_path / folder / "a.seg.nrrd", array, np.eye(4), classes=names)
    (tmp_path / "p" / "labels.txt").write_text(label_table({1: "liver", 2: "tumour"}))
    outcome = cli("evaluate", tmp_path / "p", tmp_path / "l", "--json")
    assert outcome.code == 0, outcome.err
    assert {row["dice"] for row in json.loads(outcome.out)["cases"]} == {1.0}
    # Without a table, names that both sides have still say what is compared with what.
    (tmp_path / "p" / "labels.txt").unlink()
    rows = json.loads(cli("evaluate", tmp_path / "p", tmp_path / "l", "--json").out)["cases"]
    assert {row["class"]: row["dice"] for row in rows} == {"Tumour": 1.0, "Liver": 1.0, "foreground": 1.0}
    write_mask(tmp_path / "p" / "a.nii.gz", mask, np.eye(4))
    refused = cli("evaluate", tmp_path / "p", tmp_path / "l")
    assert refused.code == 2
    assert "both masks of a" in refused.err


def test_a_segment_of_slicer_that_is_no_class_is_not_taken_for_one(tmp_path, cli):
    label = np.zeros((6, 6, 6), np.uint8)
    label[1:3], label[3:5] = 2, 1
    for folder in ("p", "l"):
        (tmp_path / folder).mkdir()
    write_mask(tmp_path / "p" / "a.nii.gz", (label == 2).astype(np.uint8), np.eye(4))
    (tmp_path / "p" / "labels.txt").write_text(label_table({1: "liver"}))
    write_mask(tmp_path / "l" / "a.seg.nrrd", label, np.eye(4), classes={1: "body", 2: "liver"})
    refused = cli("evaluate", tmp_path / "p", tmp_path / "l")
    assert refused.code == 2
    assert "segment body is none of liver" in refused.err
    # An empty segment does no harm.
    write_mask(tmp_path / "l" / "a.seg.nrrd", label // 2 * 2, np.eye(4), classes={1: "body", 2: "liver"})
    outcome = cli("evaluate", tmp_path / "p", tmp_path / "l", "--json")
    assert {row["dice"] for row in json.loads(outcome.out)["cases"]} == {1.0}


def test_exchanged_names_beside_a_mask_without_names_are_refused(tmp_path, cli):
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[1:3], mask[3:5] = 1, 2
    for folder in ("p", "l"):
        (tmp_path / folder).mkdir()
    for case, names in (("a", {1: "liver", 2: "tumour"}), ("b", {1: "tumour", 2: "liver"})):
        write_mask(tmp_path / "l" / f"{case}.seg.nrrd", mask, np.eye(4), classes=names)
        write_mask(tmp_path / "p" / f"{case}.nii.gz", mask, np.eye(4))
    refused = cli("evaluate", tmp_path / "p", tmp_path / "l")
    assert refused.code == 2
    assert "names nothing; put a labels.txt beside the masks" in refused.err
    write_mask(tmp_path / "l" / "b.seg.nrrd", mask, np.eye(4), classes={1: "liver", 2: "tumour"})
    rows = json.loads(cli("evaluate", tmp_path / "p", tmp_path / "l", "--json").out)["cases"]
    assert {row["class"] for row in rows} == {"liver", "tumour", "foreground"}
