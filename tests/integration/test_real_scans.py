"""The main job on real scans: many channels, thick slices, odd orientations. Skipped without the data."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medvisionllama import Predictor, api
from medvisionllama.run_dir import RunDir

from .conftest import TINY

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory, data_root):
    path = tmp_path_factory.mktemp("real") / "run"
    api.train(
        data_root / "Task04_Hippocampus",
        out=path,
        cases=6,
        epochs=2,
        overrides={**TINY, "train.num_validations": 1, "inference.overlap": 0.1, "inference.flip": False},
    )
    return RunDir(path)


def test_hippocampus_is_scored_on_its_twenty_test_patients(hippocampus):
    table = pd.read_csv(hippocampus.evaluation, keep_default_na=False)
    assert table["case_id"].nunique() == 20
    assert list(table["class"].unique()) == ["Anterior", "Posterior", "foreground"]
    assert json.loads(hippocampus.manifest.read_text())["num_cases"] == {
        "train": 6,
        "validation": 36,
        "test": 20,
    }


@pytest.fixture(scope="module")
def coarse(tmp_path_factory, phantoms):
    """A run that works at 4 mm, so that a whole trunk is segmented in seconds."""
    path = tmp_path_factory.mktemp("coarse") / "run"
    overrides = {
        **TINY,
        "network.insert": "none",
        "data.spacing_mm": (4.0, 4.0, 4.0),
        "data.crop_size": (32, 32, 32),
        "inference.overlap": 0.1,
    }
    api.train(phantoms, out=path, epochs=1, overrides=overrides, test=False)
    return path


def test_every_format_and_orientation_comes_back_on_its_own_grid(coarse, data_root, tmp_path):
    scans = sorted((data_root / "formats").rglob("image.nii.gz"))
    codes = {nib.aff2axcodes(nib.load(path).affine) for path in scans}
    assert len(scans) >= 5
    assert len(codes) >= 3, "the scans of formats/ do not differ in orientation"
    for scan in scans:
        [record] = api.predict(coarse, scan, out=tmp_path / scan.parent.name)
        written, image = nib.load(record["mask"]), nib.load(scan)
        assert written.shape == image.shape
        assert np.array_equal(written.affine, image.affine)
        label = nib.load(scan.with_name("label.nii.gz"))
        assert written.shape == label.shape


def test_frames_of_one_heart_stay_together_and_thick_slices_are_kept_apart(data_root, tmp_path):
    overrides = {**TINY, "train.num_validations": 1, "data.max_crop_voxels": 20_000, "inference.overlap": 0.1}
    result = api.train(
        data_root / "Task101_ACDC", out=tmp_path / "run", cases=4, epochs=1, overrides=overrides, test=False
    )
    run = RunDir(result.path)
    cases = json.loads(run.manifest.read_text())["cases"]
    patients = {part: {name.partition("_frame")[0] for name in names} for part, names in cases.items()}
    assert not patients["train"] & patients["validation"]
    assert not patients["train"] & patients["test"]
    assert not patients["validation"] & patients["test"]
    plan = Predictor.from_run(run.path).plan
    assert [stride[2] for stride in plan.strides[:2]] == [1, 1]
    assert plan.flip_axes == ()


def test_two_channels_of_a_4d_scan_are_both_used(data_root, tmp_path):
    overrides = {
        **TINY,
        "train.num_validations": 1,
        "data.crop_size": [32, 32, 32],
        "data.geometry": "resize",
        "network.insert": "none",
    }
    result = api.train(data_root / "Task103_BRATS2015x6", out=tmp_path / "run", epochs=1, overrides=overrides)
    predictor = Predictor.from_run(result.path)
    assert predictor.plan.channels == ("FLAIR", "T1c")
    table = pd.read_csv(RunDir(result.path).evaluation, keep_default_na=False)
    assert set(table["class"]) == {"necrosis", "edema", "non-enhancing", "enhancing", "foreground"}
    mask = nib.load(next((result.path / "predictions" / "test").glob("*.nii.gz")))
    assert mask.shape == (240, 240, 155)
