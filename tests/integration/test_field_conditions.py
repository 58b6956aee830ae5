"""What datasets and habits look like in the field: names of digits, odd files, options that do not go together."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from medvisionllama import api
from medvisionllama.checkpoint import load_tensors, save_tensors
from medvisionllama.config import read_config
from medvisionllama.data.index import patient_of
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.evaluation.evaluate import read_table
from medvisionllama.inference.cleaning import Choice, write_choice
from medvisionllama.inference.inputs import collect_scans
from medvisionllama.reports.html import write_report
from medvisionllama.run_dir import RunDir

from .conftest import TINY, settings


@pytest.fixture(scope="module")
def plain(phantoms, tmp_path_factory):
    """The phantoms as images/ and labels/, named 001 to 008."""
    root = tmp_path_factory.mktemp("plain")
    for ours, theirs in (("images", "imagesTr"), ("labels", "labelsTr")):
        (root / ours).mkdir()
        for number, path in enumerate(sorted((phantoms / theirs).iterdir()), start=1):
            shutil.copy(path, root / ours / f"{number:03d}.nii.gz")
    return root


@pytest.fixture(scope="module")
def run(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "plain"
    api.train(plain, out=path, epochs=1, overrides={**TINY, "network.insert": "none"})
    return RunDir(path)


def test_cases_named_by_digits_keep_their_names(run):
    assert run.report.is_file()
    [test] = json.loads(run.splits.read_text())["test"]
    assert f"<td>{test}</td>" in run.report.read_text()


def test_patients_who_came_into_the_folder_since_are_none_of_the_run_s(plain, tmp_path, cli):
    data = shutil.copytree(plain, tmp_path / "data")
    overrides = {**TINY, "network.insert": "none", "train.max_steps": 4}
    run = api.train(data, out=tmp_path / "run", overrides=overrides).path
    before = RunDir(run).evaluation.read_text()
    for part in ("images", "labels"):
        shutil.copy(data / part / "001.nii.gz", data / part / "099.nii.gz")
    assert cli("evaluate", run).code == 0
    assert RunDir(run).evaluation.read_text() == before
    # Nor is a scan that one of its patients has had since, nor does one that is gone go unnoticed.
    [test] = RunDir(run).read_manifest()["cases"]["test"]
    for part in ("images", "labels"):
        shutil.copy(data / part / f"{test}.nii.gz", data / part / f"{test}_visit2.nii.gz")
    assert cli("evaluate", run).code == 0
    assert RunDir(run).evaluation.read_text() == before
    for part in ("images", "labels"):
        (data / part / f"{test}.nii.gz").rename(tmp_path / part)
    gone = cli("evaluate", run)
    assert gone.code == 2
    assert f"no longer holds '{test}', one of the test cases of {run}" in gone.err
    assert RunDir(run).evaluation.read_text() == before
    more = ["train", data, "--out", run, "--resume", "--set", "train.max_steps=6"]
    refused = cli(*more)
    assert refused.code == 2
    assert f"no longer holds '{test}', one of the test cases of {run}" in refused.err
    assert RunDir(run).read_manifest()["cases"]["test"] == [test]
    for part in ("images", "labels"):
        (tmp_path / part).rename(data / part / f"{test}.nii.gz")
    again = cli(*more)
    assert again.code == 0, again.err
    for part in ("images", "labels"):
        (data / part / f"{test}_visit2.nii.gz").unlink()
    named = {name for part in RunDir(run).read_manifest()["cases"].values() for name in part}
    assert "099" not in named
    assert len(named) == 8
    assert (
        cli("train", data, "--out", tmp_path / "new", "--set", f"data.splits={run / 'splits.json'}").code == 2
    )


def test_a_scan_that_a_run_leaves_out_may_be_deleted(plain, tmp_path, cli):
    data = shutil.copytree(plain, tmp_path / "data")
    command = ["train", data, "--out", tmp_path / "run", "--set", "data.exclude=[001]"]
    for name, value in {**TINY, "network.insert": "none", "train.max_steps": 4}.items():
        command += ["--set", f"{name}={value}"]
    assert cli(*command).code == 0
    for part in ("images", "labels"):
        (data / part / "001.nii.gz").unlink()
    for later in (["evaluate", tmp_path / "run"], [*command, "--resume"]):
        outcome = cli(*later)
        assert outcome.code == 0, outcome.err
    command[3] = tmp_path / "new"
    assert "no patient '001' to leave out" in cli(*command).err


def test_one_test_patient_gives_valid_json_without_an_interval(run, cli):
    content = json.loads(cli("evaluate", run.path, "--json").out)
    assert content["classes"][0]["dice_low"] is None


def test_the_page_says_the_tolerance_that_was_measured_with(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    for tolerance in (5.0, 1.0):
        api.evaluate(tmp_path / "run", tolerance_mm=tolerance)
        assert f"NSD at {tolerance:g} mm" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("gone", ["a test case", "the masks", "the dataset"])
def test_a_page_is_written_though_files_are_gone(run, plain, tmp_path, gone):
    data, copy = tmp_path / "data", RunDir(tmp_path / "run")
    shutil.copytree(plain, data)
    shutil.copytree(run.path, copy.path)
    copy.config.write_text(copy.config.read_text().replace(str(plain), str(data)))
    assert "data:image/png" in write_report(copy.path).read_text()
    [name] = read_table(copy.evaluation)["case_id"].unique()
    if gone == "a test case":
        for folder in ("images", "labels"):
            (data / folder / f"{name}.nii.gz").unlink()
    else:
        shutil.rmtree({"the masks": copy.path / "predictions", "the dataset": data}[gone])
    page = write_report(copy.path).read_text()
    assert f"<td>{name}</td>" in page


@pytest.mark.parametrize("limit", ["train.max_steps", "train.epochs"])
def test_a_limit_by_steps_is_not_cut_by_the_preset_s_minutes(phantoms, tmp_path, limit):
    overrides = {**TINY, "network.insert": "none", limit: 2}
    api.train(phantoms, out=tmp_path / "run", overrides=overrides, test=False)
    assert read_config(tmp_path / "run" / "config.yaml").train.max_minutes is None


def test_report_shows_hostile_names_as_text(plain, phantoms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    content = json.loads((data / "dataset.json").read_text())
    content["labels"]["1"] = "<script>alert(1)</script>"
    (data / "dataset.json").write_text(json.dumps(content))
    api.train(data, out=tmp_path / "run", epochs=1, overrides={**TINY, "network.insert": "none"})
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_run_can_be_used_from_any_folder(plain, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(plain.parent)
    outcome = cli(
        "train",
        plain.name,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--no-test",
        *settings(network__insert="none"),
    )
    assert outcome.code == 0, outcome.err
    monkeypatch.chdir(tmp_path)
    assert cli("evaluate", "run").code == 0


def test_nifti2_scans_get_nifti2_masks(run, plain, tmp_path, cli):
    source = nib.load(plain / "images" / "001.nii.gz")
    nib.save(nib.Nifti2Image(np.asarray(source.dataobj), source.affine), tmp_path / "two.nii.gz")
    assert cli("predict", run.path, tmp_path / "two.nii.gz", "--out", tmp_path / "masks").code == 0
    mask = nib.load(tmp_path / "masks" / "two.nii.gz")
    assert isinstance(mask, nib.Nifti2Image)
    assert np.array_equal(mask.affine, source.affine)


def test_a_scan_named_twice_is_segmented_once(run, plain, tmp_path, cli):
    scans = plain / "images"
    outcome = cli("predict", run.path, scans / "001.nii.gz", scans, "--out", tmp_path / "masks", "--json")
    assert len(json.loads(outcome.out)) == 8


def test_a_numbered_series_keeps_its_names(tmp_path, write_nifti):
    for name in ("img_0000", "img_0001"):
        write_nifti(tmp_path / f"{name}.nii.gz", np.zeros((4, 4, 4), np.float32))
    assert [scan.case_id for scan in collect_scans([tmp_path], channels=["MRI"])] == ["img_0000", "img_0001"]
    assert [scan.case_id for scan in collect_scans([tmp_path / "img_0000.nii.gz"], channels=["MRI"])] == [
        "img"
    ]


def test_names_of_one_stored_file_are_scans_of_their_own(tmp_path, write_nifti):
    stored = write_nifti(tmp_path / "store" / "x.nii.gz", np.zeros((4, 4, 4), np.float32))
    (tmp_path / "scans").mkdir()
    for name in ("p1", "p2"):
        (tmp_path / "scans" / f"{name}.nii.gz").symlink_to(stored)
    twice = [tmp_path / "scans", tmp_path / "scans" / ".." / "scans" / "p1.nii.gz"]
    assert [scan.case_id for scan in collect_scans(twice, channels=["MRI"])] == ["p1", "p2"]


def test_channel_files_are_put_in_order_and_gaps_are_refused(tmp_path, write_nifti, run, cli):
    paths = [write_nifti(tmp_path / f"a_{n:04d}.nii.gz", np.zeros((4, 4, 4), np.float32)) for n in (1, 0, 2)]
    [scan] = collect_scans(paths[:2], channels=["T1", "T2"])
    assert [path.name for path in scan.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    with pytest.raises(ValueError, match="must end in _0000 to _0001"):
        collect_scans([paths[1], paths[2]], channels=["T1", "T2"])
    unnumbered = write_nifti(tmp_path / "a.nii.gz", np.zeros((4, 4, 4), np.float32))
    with pytest.raises(DataError, match="must end in _0000 to _0001"):
        collect_scans([unnumbered, paths[0]], channels=["T1", "T2"])


def test_4d_scans_with_numbers_in_their_names_stay_apart(tmp_path, write_nifti):
    for name in ("case_0001", "case_0002"):
        write_nifti(tmp_path / f"{name}.nii.gz", np.zeros((4, 4, 4, 2), np.float32))
    assert [scan.case_id for scan in collect_scans([tmp_path], channels=["T1", "T2"])] == [
        "case_0001",
        "case_0002",
    ]


def test_numbered_scans_of_one_site_are_patients_of_their_own():
    assert patient_of("mri_scan_001") == "mri_scan_001"
    assert patient_of("patient003_frame15") == "patient003"
    assert patient_of("sub-07_ses-2") == "sub-07"


@pytest.mark.parametrize(
    "change", [["--fold", "1"], ["--set", "network.width=48"], ["--set", "train.seed=3"]]
)
def test_resume_refuses_what_would_make_it_another_run(change, run, plain, cli):
    outcome = cli("train", plain, "--out", run.path, "--resume", *change)
    assert outcome.code == 2
    assert "is fixed when a run begins" in outcome.err


def test_the_same_command_with_resume_goes_on(phantoms, tmp_path, cli):
    command = ("train", phantoms, "--out", tmp_path / "run", "--cases", 4, "--no-test", *settings())
    command = (*command, "--set", "network.insert=none", "--set", "train.batch_size=1")
    assert cli(*command, "--epochs", 1).code == 0
    assert cli(*command, "--epochs", 2, "--resume").code == 0
    outcome = cli(*command, "--epochs", 2, "--resume", "--set", "train.batch_size=2")
    assert outcome.code == 2
    assert (
        "train.batch_size is fixed when a run begins (1) and cannot change by --resume (to 2)" in outcome.err
    )


def test_a_network_without_tokens_needs_no_block(phantoms, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    without = ("--set", "network.tokens=false", "--set", "network.block.source=organisation/absent")
    outcome = cli(
        *("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, "--no-test", *settings(), *without)
    )
    assert outcome.code == 0, outcome.err


def test_a_block_that_does_not_exist_is_known_before_the_scans_are_prepared(phantoms, tmp_path, cli):
    wrong = ("--set", "network.block.layers=99")
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, *settings(), *wrong)
    assert outcome.code == 2
    assert "layer 99 does not exist" in outcome.err
    assert "preparing scans" not in outcome.err


def test_resume_takes_a_longer_limit_and_another_learning_rate(run, plain, tmp_path, cli):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    num_cases, batch = len(copy.read_manifest()["cases"]["train"]), read_config(copy.config).train.batch_size
    outcome = cli(
        "train", plain, "--out", copy.path, "--resume", "--epochs", 3, "--set", "train.learning_rate=0.001"
    )
    assert outcome.code == 0, outcome.err
    assert copy.read_history()[-1]["step"] == round(3 * num_cases / batch)


def test_a_page_says_if_its_test_is_not_of_what_predicts_now(run, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    api.evaluate(copy.path)
    assert "Out of date" not in copy.report.read_text()
    chosen = Choice(largest_component=True, num_cases=1, weights_sha256=copy.weights_sha256(), candidates=())
    write_choice(copy, chosen)
    assert "measured with another removal of components" in write_report(copy.path).read_text()
    api.evaluate(copy.path)
    assert "Out of date" not in copy.report.read_text()
    tensors, facts = load_tensors(copy.best)
    save_tensors(copy.best, {name: tensor + 1e-3 for name, tensor in tensors.items()}, facts)
    assert "measured with earlier weights" in write_report(copy.path).read_text()


def test_masks_of_a_merged_run_are_scored_against_merged_labels(plain, tmp_path, cli):
    overrides = {**TINY, "network.insert": "none", "data.labels": "foreground"}
    api.train(plain, out=tmp_path / "run", epochs=1, overrides=overrides, test=False)
    assert cli("predict", tmp_path / "run", plain / "images", "--out", tmp_path / "masks").code == 0
    rows = json.loads(cli("evaluate", tmp_path / "masks", plain / "labels", "--merged", "--json").out)[
        "cases"
    ]
    assert {row["class"] for row in rows} == {"foreground"}
    label = np.asarray(nib.load(plain / "labels" / f"{rows[0]['case_id']}.nii.gz").dataobj)
    assert rows[0]["volume_ml"] == pytest.approx((label > 0).sum() / 1000)
    # Its 255 would be measured as background.
    mask = tmp_path / "masks" / f"{rows[0]['case_id']}.nii.gz"
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.full(image.shape, 255, np.uint8), image.affine), mask)
    outcome = cli("evaluate", tmp_path / "masks", plain / "labels", "--merged")
    assert outcome.code == 2
    assert "holds the value 255" in outcome.err


def test_evaluation_of_a_run_takes_tolerance_and_file(run, tmp_path, cli):
    strict = json.loads(
        cli("evaluate", run.path, "--tolerance-mm", 0.5, "--out", tmp_path / "t.csv", "--json").out
    )
    loose = json.loads(cli("evaluate", run.path, "--tolerance-mm", 20, "--json").out)
    assert (tmp_path / "t.csv").is_file()
    assert sum(row["nsd"] for row in strict["cases"]) < sum(row["nsd"] for row in loose["cases"])


def test_splits_of_another_dataset_are_refused(plain, phantoms, tmp_path, cli):
    assert cli("data", "split", phantoms, "--out", tmp_path / "splits.json").code == 0
    outcome = cli("train", plain, "--out", tmp_path / "run", *settings(data__splits=tmp_path / "splits.json"))
    assert outcome.code == 2
    assert "splits" in outcome.err


def test_modality_can_be_given_where_the_folder_cannot_say(plain, tmp_path):
    overrides = {**TINY, "network.insert": "none", "data.modality": ["CT"]}
    api.train(plain, out=tmp_path / "run", epochs=1, overrides=overrides, test=False)
    [rule] = json.loads((tmp_path / "run" / "plan.json").read_text())["normalisation"]
    assert rule["kind"] == "dataset"
    assert rule["low"] < rule["mean"] < rule["high"]


def test_wrong_kinds_of_paths_are_one_line(run, plain, tmp_path, cli):
    (tmp_path / "file").write_text("x")
    for arguments in (
        ["train", plain, "--out", tmp_path / "file"],
        ["predict", run.path, plain / "images", "--out", tmp_path / "mask.nii.gz"],
        ["predict", run.path, plain / "images", "--out", tmp_path / "file"],
        ["evaluate", run.path, "--out", tmp_path],
    ):
        outcome = cli(*arguments)
        assert outcome.code == 2, arguments
        assert "Traceback" not in outcome.err
        assert "medvisionllama: " in outcome.err


def test_a_folder_in_place_of_a_file_is_told_before_the_work(run, plain, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "."):
        for arguments in (
            ["evaluate", run.path, "--out", folder],
            ["evaluate", run.path / "predictions" / "absent", plain / "labels", "--out", folder],
            ["data", "check", plain / "absent", "--html", folder],
        ):
            outcome = cli(*arguments)
            assert outcome.code == 2, arguments
            assert f"medvisionllama: {folder} is a folder, and a file is written; name one" in outcome.err


def test_a_dataset_that_has_moved_is_named_with_what_to_do(run, tmp_path, cli):
    moved = shutil.copytree(run.path, tmp_path / "run")
    config = moved / "config.yaml"
    config.write_text(
        re.sub(r"  path: .*plain.*", f"  path: {tmp_path / 'gone'}", config.read_text(), count=1)
    )
    for verb in ("evaluate", "explain"):
        outcome = cli(verb, moved, "--split", "test")
        assert outcome.code == 2
        assert f"the dataset of {moved} is no longer at {tmp_path / 'gone'}" in outcome.err
        assert f"correct data.path in {config}" in outcome.err


def test_seeds_and_minutes_that_cannot_be_leave_nothing(plain, tmp_path, cli):
    for arguments in (
        ["data", "split", plain, "--out", tmp_path / "s.json", "--seed", -1],
        ["demo", "--out", tmp_path / "demo", "--seed", -1],
        ["demo", "--out", tmp_path / "demo", "--seed", 10**19],
        ["demo", "--out", tmp_path / "demo", "--minutes", "nan"],
    ):
        outcome = cli(*arguments)
        assert outcome.code == 2, arguments
        assert "Traceback" not in outcome.err
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="0 or more"):
        api.split(plain, out=tmp_path / "s.json", seed=-1)


def test_version_is_printed(cli):
    from medvisionllama import __version__

    assert cli("--version").out.strip() == __version__


def test_squeezed_scans_are_turned_in_their_own_millimetres(plain, tmp_path):
    shape = {"data.geometry": "resize", "data.crop_size": [16, 24, 16]}
    api.train(
        plain,
        out=tmp_path / "run",
        epochs=1,
        overrides={**TINY, **shape, "network.insert": "none"},
        test=False,
    )
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["spacing_mm"] == [20 / 16, 1.0, 1.0]


def test_cropped_slicer_segmentations_train_as_whole_labels_do(plain, tmp_path, cli):
    import SimpleITK as sitk

    data = tmp_path / "slicer"
    shutil.copytree(plain / "images", data / "images")
    (data / "labels").mkdir()
    for path in sorted((plain / "labels").iterdir()):
        label = sitk.ReadImage(str(path))
        box = sitk.LabelShapeStatisticsImageFilter()
        box.Execute(label > 0)
        x, y, z, dx, dy, dz = box.GetBoundingBox(1)
        cropped = label[x : x + dx, y : y + dy, z : z + dz]
        sitk.WriteImage(cropped, str(data / "labels" / path.name.replace(".nii.gz", ".seg.nrrd")))
    assert cli("data", "check", data).code == 0
    overrides = {**TINY, "network.insert": "none"}
    for source, out in ((plain, "whole"), (data, "cropped")):
        api.train(source, out=tmp_path / out, epochs=1, overrides=overrides)
    tables = [(tmp_path / out / "evaluation.csv").read_text() for out in ("whole", "cropped")]
    assert tables[0] == tables[1]
