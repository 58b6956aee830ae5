"""A rival is trained, resumed, predicted and evaluated like any run."""

import json

import pytest

from medvisionllama import api
from medvisionllama.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")
# PyTorch 2.13's bf16 convolutions give gradients that are no numbers at a bottleneck of eight voxels on a CPU.
SLIM = {
    "network.base_channels": 4,
    "train.num_validations": 1,
    "train.device": "cpu",
    "train.precision": "fp32",
}


def test_rival_goes_all_the_way(phantoms, tmp_path, cli):
    run = RunDir(tmp_path / "run")
    api.train(phantoms, out=run.path, preset="unet", epochs=1, overrides=SLIM, test=False)
    assert json.loads(run.manifest.read_text())["network"]["frozen_parameters"] == 0
    outcome = cli("evaluate", run.path, "--json")
    assert outcome.code == 0, outcome.err
    assert 0 <= json.loads(outcome.out)["mean_class_dice"] <= 1


def test_rival_has_no_tokens_to_explain(phantoms, tmp_path, cli):
    api.train(phantoms, out=tmp_path / "run", preset="unet", epochs=1, overrides=SLIM, test=False)
    image = next((phantoms / "imagesTr").glob("*.nii.gz"))
    outcome = cli("explain", tmp_path / "run", image, "--out", tmp_path / "maps")
    assert outcome.code == 2
    assert "without tokens" in outcome.err
