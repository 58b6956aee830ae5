"""Plans as users meet them: shown, set by hand, stored, and kept by a run that goes on."""

import json
import shutil

import pytest

from medvisionllama import api
from medvisionllama.run_dir import RunDir

from .conftest import TINY, settings

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {**TINY, "network.insert": "none", "train.num_validations": 1}


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    api.train(phantoms, out=path, epochs=1, overrides=PLAIN, test=False)
    return RunDir(path)


def test_plan_is_shown_with_its_reasons(phantoms, cli):
    outcome = cli("data", "plan", phantoms)
    assert outcome.code == 0, outcome.err
    assert "crops of 24×24×16 voxels: covers the median scan" in outcome.out
    assert "strides 2×2×2, 2×2×2, 2×2×2: every axis is halved" in outcome.out


def test_plan_shown_is_the_plan_of_the_run(phantoms, run, cli):
    shown = json.loads(cli("data", "plan", phantoms, "--json").out)
    stored = json.loads(run.plan.read_text())
    for name in ("spacing_mm", "crop_size", "strides", "flip_axes", "reasons"):
        assert shown[name] == stored[name]


def test_plan_obeys_what_is_set(phantoms, cli):
    chosen = ("data.strides=[[1,2,2],[2,2,2],[2,2,2]]", "data.flip_axes=x,z", "data.normalisation=-160:40")
    outcome = cli("data", "plan", phantoms, "--json", *(part for text in chosen for part in ("--set", text)))
    plan = json.loads(outcome.out)
    assert plan["strides"] == [[1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert plan["flip_axes"] == [0, 2]
    assert sum("set by you" in reason for reason in plan["reasons"].values()) == 3


def test_plan_refuses_rules_for_channels_that_are_not_there(phantoms, cli):
    outcome = cli("data", "plan", phantoms, "--set", "data.normalisation=image,image")
    assert outcome.code == 2
    assert "data.normalisation names 2 channels, the dataset has 1" in outcome.err


def test_fingerprint_gives_the_reasons_too(phantoms, cli):
    facts = json.loads(cli("data", "fingerprint", phantoms, "--json").out)
    assert facts["reasons"]["spacing_mm"] == "what every scan has"
    assert "why crop size" in cli("data", "fingerprint", phantoms).out


def test_training_says_what_was_decided(phantoms, tmp_path, cli):
    arguments = ("--epochs", 1, "--no-test", *settings(network__insert="none"))
    outcome = cli("train", phantoms, "--out", tmp_path / "run", *arguments)
    assert outcome.code == 0, outcome.err
    assert "crops of 24×24×16 voxels: covers the median scan" in outcome.err + outcome.out


def test_strides_set_by_hand_train_and_predict(phantoms, tmp_path):
    strides = [[1, 2, 2], [2, 2, 2], [2, 1, 2]]
    overrides = {**PLAIN, "data.strides": strides, "data.flip_axes": ["x", "y"]}
    api.train(phantoms, out=tmp_path / "run", epochs=1, overrides=overrides, test=False)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["strides"] == strides
    scan = min((phantoms / "imagesTr").iterdir())
    assert len(api.predict(tmp_path / "run", [scan], out=tmp_path / "masks")) == 1


def test_resume_names_what_would_be_planned_otherwise(phantoms, run, tmp_path, cli):
    changed = RunDir(tmp_path / "run")
    shutil.copytree(run.path, changed.path)
    plan = json.loads(changed.plan.read_text())
    changed.plan.write_text(json.dumps({**plan, "crop_size": [8, 8, 8]}))
    outcome = cli("train", phantoms, "--out", changed.path, "--resume", "--epochs", 2)
    assert outcome.code == 2
    assert "its plan differs in crop_size" in outcome.err
