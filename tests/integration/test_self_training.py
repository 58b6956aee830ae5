"""Scans without labels train with the masks that the network gives them."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

from medvisionllama import api
from medvisionllama.config import read_config
from medvisionllama.data.phantom import write_phantoms
from medvisionllama.run_dir import RunDir
from medvisionllama.training.prepare import divide

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
