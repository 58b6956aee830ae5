"""Train, predict, evaluate, report: through the command line, on files."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from medvisionllama import Predictor, api, load_config
from medvisionllama.checkpoint import frozen, trainable
from medvisionllama.config import read_config, write_config
from medvisionllama.errors import CheckpointError
from medvisionllama.llm import FrozenBlock
from medvisionllama.run_dir import RunDir

from .conftest import TINY

SETTINGS = {**TINY, "network.block.lora_rank": 2}


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    """A finished run of the tiny network, made once."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    api.train(phantoms, out=path, epochs=6, overrides=SETTINGS)
    return RunDir(path)


@pytest.fixture
def around_another_block(run, tmp_path):
    """A copy of the run whose settings name another layer, of the same shapes and other values."""
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunDir(tmp_path / "run")
    write_config(read_config(copy.config, {"network.block.layers": [0]}), copy.config)
    return copy


def test_run_folder_holds_everything_the_design_names(run):
    for path in (
        run.config,
        run.plan,
        run.splits,
        run.manifest,
        run.history,
        run.best,
        run.state,
        run.evaluation,
        run.report,
    ):
        assert path.is_file(), path


def test_training_learns(run):
    history = run.read_history()
    assert history[-1]["loss"] < history[0]["loss"]


def test_saved_weights_are_the_trainable_ones_and_the_block_is_what_was_loaded(run):
    predictor = Predictor.from_run(run.path)
    with safe_open(run.best, framework="pt") as file:
        saved = set(file.keys())
    assert saved == set(trainable(predictor.network))
    assert not saved & set(frozen(predictor.network))
    loaded = FrozenBlock.from_pretrained("smollm2-135m", weights="random", seed=0)
    assert json.loads(run.manifest.read_text())["network"]["block"]["sha256"] == loaded.sha256()
    assert predictor.network.insert.block.sha256() == loaded.sha256()


def test_a_run_refuses_to_predict_around_another_block(around_another_block, phantoms, tmp_path):
    scan = phantoms / "imagesTr" / "phantom_000.nii.gz"
    with pytest.raises(CheckpointError, match="another frozen block"):
        api.predict(around_another_block.path, scan, out=tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_a_run_refuses_to_go_on_around_another_block_and_stays_as_it_was(around_another_block, phantoms):
    path = around_another_block.path
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert around_another_block.state in before
    with pytest.raises(CheckpointError, match="another frozen block"):
        api.train(phantoms, out=path, epochs=8, resume=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_test_cases_are_scored_once_per_class_and_merged(run):
    table = pd.read_csv(run.evaluation, keep_default_na=False)
    test = json.loads(run.splits.read_text())["test"]
    assert set(table["patient_id"]) == set(test)
    assert list(table["class"].unique()) == ["head", "tail", "foreground"]


def test_report_is_self_contained_and_shows_the_result(run):
    page = run.report.read_text()
    assert "<link" not in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    # Two charts, and the one test case once, not as best, median and worst.
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<b>the only case</b>") == 1
    mean = pd.read_csv(run.evaluation).query("`class` != 'foreground'")["dice"].mean()
    assert f"{mean:.3f}" in page


def test_masks_have_the_scan_s_geometry_and_no_free_text(run, phantoms, tmp_path, cli):
    scans = tmp_path / "scans"
    scans.mkdir()
    source = nib.load(phantoms / "imagesTr" / "phantom_000.nii.gz")
    source.header["descrip"] = b"name of a patient"
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("I", "P", "L")))
    turned.set_sform(turned.affine, code=1)
    nib.save(turned, scans / "turned.nii.gz")
    outcome = cli("predict", run.path, scans, "--out", tmp_path / "masks", "--json")
    assert outcome.code == 0, outcome.err
    [record] = json.loads(outcome.out)
    mask = nib.load(record["mask"])
    assert mask.shape == turned.shape
    assert np.array_equal(mask.affine, turned.affine)
    assert mask.get_data_dtype() == np.uint8
    assert mask.header["sform_code"] == 1
    assert b"patient" not in mask.header["descrip"].tobytes()


def test_orientation_does_not_change_the_answer(run, phantoms, tmp_path):
    source = nib.load(phantoms / "imagesTr" / "phantom_001.nii.gz")
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("S", "R", "A")))
    nib.save(turned, tmp_path / "turned.nii.gz")
    predictor = Predictor.from_run(run.path)
    straight = predictor.predict(phantoms / "imagesTr" / "phantom_001.nii.gz").mask
    other = predictor.predict(tmp_path / "turned.nii.gz").mask
    back = nib.as_closest_canonical(nib.Nifti1Image(other.array, other.affine)).get_fdata()
    assert np.array_equal(
        nib.as_closest_canonical(nib.Nifti1Image(straight.array, straight.affine)).get_fdata(), back
    )


def test_predict_then_evaluate_folders(run, phantoms, tmp_path, cli):
    assert cli("predict", run.path, phantoms / "imagesTr", "--out", tmp_path / "masks").code == 0
    outcome = cli("evaluate", tmp_path / "masks", phantoms / "labelsTr", "--json")
    assert outcome.code == 0, outcome.err
    content = json.loads(outcome.out)
    assert {row["class"] for row in content["cases"]} == {"head", "tail", "foreground"}
    assert len(content["cases"]) == 8 * 3


def test_predict_refuses_to_overwrite_scans_and_masks(run, phantoms, tmp_path, cli):
    scans = tmp_path / "scans"
    scans.mkdir()
    scan = scans / "a.nii.gz"
    shutil.copy(phantoms / "imagesTr" / "phantom_000.nii.gz", scan)
    before = scan.read_bytes()
    outcome = cli("predict", run.path, scan, "--out", scans)
    assert outcome.code == 2
    assert "one of the scans" in outcome.err
    assert scan.read_bytes() == before
    assert cli("predict", run.path, scan, "--out", tmp_path / "masks").code == 0
    assert "already exists" in cli("predict", run.path, scan, "--out", tmp_path / "masks").err
    assert cli("predict", run.path, scan, "--out", tmp_path / "masks", "--overwrite").code == 0


@pytest.mark.parametrize(
    "arm", [{"network.insert": "none"}, {"network.tokens": False}, {"data.labels": "foreground"}]
)
def test_controls_and_merged_labels_run_on_the_same_split(arm, run, phantoms, tmp_path):
    other = api.train(phantoms, out=tmp_path / "other", epochs=1, overrides={**TINY, **arm})
    assert RunDir(other.path).splits.read_text() == run.splits.read_text()
    table = pd.read_csv(RunDir(other.path).evaluation, keep_default_na=False)
    assert set(table["class"]) == ({"foreground"} if "data.labels" in arm else {"head", "tail", "foreground"})


def test_published_presets_train_at_a_size_that_fits_a_test(phantoms, tmp_path):
    shrink = {"data.crop_size": [24, 24, 16], "network.depth": 2, "network.width": 16, "train.batch_size": 2}
    for preset in ("paper", "reference"):
        source = {
            "network.block.source": "smollm2-135m",
            "network.block.weights": "random",
            # A plateau waits for several.
            "train.num_validations": 1 if preset == "paper" else 5,
        }
        place = {"network.insert_after": 1} if preset == "paper" else {}
        result = api.train(
            phantoms, out=tmp_path / preset, preset=preset, epochs=1, overrides={**shrink, **source, **place}
        )
        assert result.finished


def test_a_folder_that_holds_a_run_is_not_overwritten(run, phantoms, cli):
    outcome = cli("train", phantoms, "--out", run.path)
    assert outcome.code == 2
    assert "--resume" in outcome.err


def test_config_of_a_run_builds_the_same_config_again(run, phantoms):
    places = {"data.path": phantoms.resolve(), "out": run.path.resolve()}
    assert read_config(run.config) == load_config("small", {**SETTINGS, **places, "train.epochs": 6})


def test_resume_refuses_a_changed_dataset(run, phantoms, tmp_path, cli):
    copy_of_run, copy_of_data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run.path, copy_of_run)
    shutil.copytree(phantoms, copy_of_data)
    case = json.loads(run.manifest.read_text())["cases"]["train"][0]
    image = nib.load(copy_of_data / "imagesTr" / f"{case}.nii.gz")
    nib.save(
        nib.Nifti1Image(image.get_fdata(dtype=np.float32) + 1, image.affine),
        copy_of_data / "imagesTr" / f"{case}.nii.gz",
    )
    outcome = cli("train", copy_of_data, "--out", copy_of_run, "--resume", "--epochs", 8)
    assert outcome.code == 2
    assert "the data changed since" in outcome.err
