"""Of two organs the one in the labels' place stays, wherever masks are made."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from medvisionllama import Predictor
from medvisionllama.data.volume import Volume
from medvisionllama.inference.cleaning import read_choice
from medvisionllama.inference.predictor import Prediction
from medvisionllama.run_dir import RunDir


@pytest.fixture
def run(trained_folds, tmp_path):
    return RunDir(shutil.copytree(trained_folds / "fold0", tmp_path / "run"))


@pytest.fixture
def scan(phantoms):
    return sorted((phantoms / "imagesTr").iterdir())[0]


@pytest.fixture
def two_organs(monkeypatch):
    """Let the network find two of a size: the larger one in a corner, as no label lies."""

    def segment(self, scan, **options):
        mask = np.zeros(scan.ras_shape, np.uint8)
        x, y, z = (size // 2 for size in mask.shape)
        mask[x - 2 : x + 2, y - 2 : y + 2, z - 2 : z + 2] = 1
        mask[:5, :4, :4] = 1
        return Prediction(Volume(mask, scan.ras_affine))

    monkeypatch.setattr(Predictor, "segment", segment)


def voxels(path):
    return int((np.asarray(nib.load(path).dataobj) == 1).sum())


def test_a_run_knows_where_its_labels_lie(run):
    places = json.loads(run.plan.read_text())["places"]
    assert set(places["classes"]) == {"1", "2"}
    # Phantoms differ in place by a voxel or two, and all lie about the middle.
    assert np.abs(places["foreground"]["mean_mm"]).max() < 5
    assert 1 < min(places["foreground"]["std_mm"]) < max(places["foreground"]["std_mm"]) < 10


def test_predict_keeps_what_lies_where_labels_do(run, scan, two_organs, cli, tmp_path):
    out = tmp_path / "masks"
    assert cli("predict", run.path, scan, "--out", out, "--largest").code == 0
    assert voxels(out / scan.name) == 4 * 4 * 4


def test_the_api_and_evaluate_keep_it_too(run, scan, two_organs, cli):
    assert cli("evaluate", run.path, "--split", "validation", "--choose-cleaning").code == 0
    choice = read_choice(run)
    assert choice.largest_foreground or choice.largest_component
    for mask in (run.path / "predictions" / "validation").iterdir():
        assert voxels(mask) == 4 * 4 * 4
    assert (Predictor.from_run(run.path).predict(scan).mask.array == 1).sum() == 4 * 4 * 4
    assert cli("evaluate", run.path, "--split", "test").code == 0
    for mask in (run.path / "predictions" / "test").iterdir():
        assert voxels(mask) == 4 * 4 * 4
