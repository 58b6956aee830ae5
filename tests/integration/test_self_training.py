"""Scans without labels train with the masks that the network gives them."""

import os
import shutil
import signal
from contextlib import suppress

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

from medvisionllama import api
from medvisionllama.config import load_config, read_config
from medvisionllama.data.phantom import write_phantoms
from medvisionllama.run_dir import RunDir
from medvisionllama.training.prepare import divide
from medvisionllama.training.self_training import SelfTraining

from .conftest import FAST, settings

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {**FAST, "unlabelled.scans": "unused"}


def train(data, out, **changes):
    api.train(data, out=out, cases=2, epochs=16, overrides={**SETTINGS, **changes}, test=False)
    return RunDir(out)


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    return train(phantoms, tmp_path_factory.mktemp("self-training") / "run")


def weights_differ(one, other):
    ours, theirs = load_file(one.best), load_file(other.best)
    return any(not np.array_equal(ours[name], theirs[name]) for name in ours)


def test_unlabelled_scans_change_what_is_learnt(trained, phantoms, tmp_path):
    assert weights_differ(trained, train(phantoms, tmp_path / "run", **{"unlabelled.scans": "none"}))


def test_masks_of_the_last_round_alone_are_kept(trained):
    chosen = divide(read_config(trained.config), drawn=None)[2]
    rounds = list((trained.path / "pseudo_labels").iterdir())
    assert [folder.name for folder in rounds] == ["3"]
    named = {folder.name for folder in rounds[0].iterdir()}
    assert named
    assert not named & {*chosen.train, *chosen.validation, *chosen.test}


def test_their_labels_are_never_read(trained, phantoms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    for name in (folder.name for folder in (trained.path / "pseudo_labels" / "3").iterdir()):
        path = data / "labelsTr" / f"{name}.nii.gz"
        label = nib.load(path)
        # A value that the dataset does not declare: who reads it, refuses it.
        nib.save(nib.Nifti1Image(np.full(label.shape, 77, np.uint8), label.affine), path)
    assert not weights_differ(trained, train(data, tmp_path / "run"))


def test_a_folder_of_scans_trains_too(phantoms, tmp_path, cli):
    extra = write_phantoms(tmp_path / "extra", num_cases=2, shape=(20, 24, 16), seed=5) / "imagesTr"
    options = ["--epochs", 8, "--no-test", *settings()]
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--unlabelled", extra, *options)
    assert outcome.code == 2
    assert "named like a case" in outcome.err
    for path in extra.iterdir():
        path.rename(extra / f"more_{path.name}")
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--unlabelled", extra, *options)
    assert outcome.code == 0, outcome.err
    masks = sorted((tmp_path / "run" / "pseudo_labels" / "3").iterdir())
    assert [folder.name for folder in masks] == sorted(
        path.name.removesuffix(".nii.gz") for path in extra.iterdir()
    )


def test_other_frames_of_a_test_patient_are_refused(phantoms, tmp_path, cli):
    extra = tmp_path / "extra"
    extra.mkdir()
    config = load_config("small", {"data.path": phantoms})
    _, _, selection = divide(config, drawn=None)
    options = ["--epochs", 1, "--no-test", *settings()]
    scan = phantoms / "imagesTr" / "phantom_000.nii.gz"
    for kept in (selection.test[0], selection.validation[0]):
        shutil.copy(scan, extra / f"{kept}_frame07.nii.gz")
        outcome = cli("train", phantoms, "--out", tmp_path / "run", "--unlabelled", extra, *options)
        assert outcome.code == 2
        assert f"is of the patient '{kept}', who validates, tests or is excluded from this run" in outcome.err
        (extra / f"{kept}_frame07.nii.gz").unlink()
    shutil.copy(scan, extra / f"{selection.train[0]}_frame07.nii.gz")
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--unlabelled", extra, *options)
    assert outcome.code == 0, outcome.err
    manifest = RunDir(tmp_path / "run").read_manifest()
    assert manifest["unlabelled"] == {f"{selection.train[0]}_frame07": selection.train[0]}


def killed() -> None:
    raise SystemExit


def asked_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_ends_while_it_makes_masks_is_resumed_exactly(phantoms, tmp_path, monkeypatch):
    # Each step is followed by a validation and its save, so that one comes right before the masks.
    changes = {"train.max_steps": 12, "train.num_validations": 12}
    options = {"cases": 2, "overrides": {**SETTINGS, **changes}, "test": False}
    whole = RunDir(tmp_path / "whole")
    api.train(phantoms, out=whole.path, **options)
    give = SelfTraining.give_masks
    for end in (killed, asked_to_end):

        def ended(self, network, number, end=end, **limits):
            if number == 2:
                end()
            return give(self, network, number, **limits)

        resumed = RunDir(tmp_path / end.__name__)
        with monkeypatch.context() as patch, suppress(SystemExit):
            patch.setattr(SelfTraining, "give_masks", ended)
            assert not api.train(phantoms, out=resumed.path, **options).finished
        api.train(phantoms, out=resumed.path, resume=True, **options)
        assert [record["dice"] for record in whole.read_history()] == [
            record["dice"] for record in resumed.read_history()
        ]
        assert not weights_differ(whole, resumed)


def test_classes_that_nobody_declared_are_found_in_the_labels_alone(phantoms, tmp_path):
    data = tmp_path / "plain"
    shutil.copytree(phantoms / "imagesTr", data / "images")
    shutil.copytree(phantoms / "labelsTr", data / "labels")
    run = train(data, tmp_path / "run")
    assert list((run.path / "pseudo_labels" / "3").iterdir())


def test_without_unused_cases_there_is_one_line(phantoms, tmp_path, cli):
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--set", "unlabelled.scans=unused")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "--cases" in outcome.err
    assert not (tmp_path / "run").exists()
