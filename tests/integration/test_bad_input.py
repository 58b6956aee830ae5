"""Whatever is wrong: one line that says what and where, exit code 2, nothing half written."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from .conftest import settings

Damage = Callable[[Path], None]


@pytest.fixture
def dataset(phantoms, tmp_path):
    return Path(shutil.copytree(phantoms, tmp_path / "dataset"))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    array = change(np.array(image.dataobj))
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


def label(data: Path) -> Path:
    return data / "labelsTr" / "phantom_003.nii.gz"


def scan(data: Path) -> Path:
    return data / "imagesTr" / "phantom_003.nii.gz"


def edit_json(data: Path, **changes: object) -> None:
    path = data / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_voxel(path: Path, value: float, dtype: type = np.float32) -> None:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[2, 3, 4] = value
        return array

    rewrite(path, change)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing label": (lambda data: label(data).unlink(), "phantom_003.nii.gz"),
    "missing image": (lambda data: scan(data).unlink(), "does not exist"),
    "label of another shape": (lambda data: rewrite(label(data), lambda a: a[:-1]), "has shape"),
    "label of another affine": (
        lambda data: rewrite(label(data), lambda a: a, np.diag([2.0, 2, 2, 1])),
        "another affine",
    ),
    "truncated image": (lambda data: truncate(scan(data)), "damaged or truncated"),
    "truncated label": (lambda data: truncate(label(data)), "damaged or truncated"),
    "text instead of an image": (
        lambda data: scan(data).write_text("hello") and None,
        "damaged or truncated",
    ),
    "empty file": (lambda data: scan(data).write_bytes(b"") and None, "damaged or truncated"),
    "NaN voxel": (lambda data: set_voxel(scan(data), np.nan), "NaN or infinite"),
    "infinite voxel": (lambda data: set_voxel(scan(data), np.inf), "NaN or infinite"),
    "unknown label value": (lambda data: set_voxel(label(data), 9, np.uint8), "label value 9"),
    "fractional label": (lambda data: set_voxel(label(data), 0.5), "whole numbers"),
    "negative label": (lambda data: set_voxel(label(data), -1), "0..65535"),
    "five dimensions": (
        lambda data: rewrite(scan(data), lambda a: np.stack([np.stack([a, a], -1)] * 2, -1)),
        "allowed: 3-D",
    ),
    "more channels than declared": (
        lambda data: rewrite(scan(data), lambda a: np.stack([a, a], -1)),
        "2 channels",
    ),
    "case named but absent": (
        lambda data: edit_json(
            data, training=[{"image": "./imagesTr/no.nii.gz", "label": "./labelsTr/no.nii.gz"}]
        ),
        "does not exist",
    ),
    "path outside the folder": (
        lambda data: edit_json(
            data, training=[{"image": "../../etc/x.nii.gz", "label": "./labelsTr/no.nii.gz"}]
        ),
        "outside the folder",
    ),
    "no cases": (lambda data: edit_json(data, training=[]), "no labelled cases"),
    "case twice": (
        lambda data: edit_json(
            data,
            training=[{"image": "imagesTr/phantom_000.nii.gz", "label": "labelsTr/phantom_000.nii.gz"}] * 2,
        ),
        "listed twice",
    ),
    "entry without a label": (
        lambda data: edit_json(data, training=[{"image": "imagesTr/phantom_000.nii.gz"}]),
        "needs the keys",
    ),
    "dataset.json that is no JSON": (
        lambda data: (data / "dataset.json").write_text("{") and None,
        "not readable JSON",
    ),
    "two patients": (
        lambda data: edit_json(
            data, training=json.loads((data / "dataset.json").read_text())["training"][:2]
        ),
        "at least 3 patients",
    ),
    "singular affine": (lambda data: break_affine(scan(data)), "not invertible"),
}


def break_affine(path: Path) -> None:
    image = nib.load(path)
    affine = np.diag([0.0, 1, 1, 1])
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    nib.save(image, path)


def one_line(text: str) -> str:
    """The error among what was printed on standard error."""
    lines = [line for line in text.splitlines() if line.startswith("medvisionllama: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@pytest.mark.parametrize("name", DAMAGES)
def test_broken_dataset_is_refused_in_one_line_and_nothing_is_written(name, dataset, tmp_path, cli):
    damage, expected = DAMAGES[name]
    damage(dataset)
    outcome = cli("train", dataset, "--out", tmp_path / "run", "--epochs", 1, *settings())
    assert outcome.code == 2
    assert expected in one_line(outcome.err)
    assert not (tmp_path / "run").exists()


def test_a_readable_dataset_is_not_refused(dataset, tmp_path, cli):
    assert cli("train", dataset, "--out", tmp_path / "run", "--epochs", 1, *settings()).code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "huge"], "the presets are: small"),
        (["--set", "network.inserts=none"], "did you mean network.insert"),
        (["--set", "network.insert=llama"], "network.insert"),
        (["--set", "network.width"], "has no '='"),
        (["--set", "network.width=25"], "num_heads"),
        (["--set", "network.insert_after=99"], "insert_after=99"),
        (["--set", "train.batch_size=0"], "greater than 0"),
        (["--set", "network.block.source=nowhere"], "catalogue"),
        (["--set", "network.block.layers=[99]"], "layer 99"),
        (
            ["--set", "network.block.weights=pretrained", "--set", "network.block.source=llama-3.1-8b"],
            "downloads are off",
        ),
        (["--set", "data.patient_pattern=("], "regular expression"),
        (["--set", "data.geometry=resize"], "data.crop_size"),
        (["--fold", "7"], "fold 7"),
        (["--fold", "1", "--set", "data.fold=2"], "data.fold is given twice, as 1 by an option and as 2"),
        (["--cases", "50"], "fold 0 has 5 training cases"),
        (["--cases", "2", "--fraction", "0.5"], "both say how much trains"),
        (["--set", "data.splits=nowhere.json"], "does not exist"),
        (["--set", "train.device=cuda"], "no GPU"),
    ],
)
def test_wrong_settings_are_refused(arguments, expected, phantoms, tmp_path, cli, monkeypatch):
    import torch

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, *settings(), *arguments)
    assert outcome.code == 2
    assert expected in one_line(outcome.err)
    assert not (tmp_path / "run").exists()


def test_empty_and_absent_folders_are_refused(tmp_path, cli):
    (tmp_path / "empty").mkdir()
    assert "no dataset" in one_line(cli("train", tmp_path / "empty", "--out", tmp_path / "run").err)
    assert "not a folder" in one_line(cli("train", tmp_path / "absent", "--out", tmp_path / "run").err)
    assert "not a run folder" in one_line(
        cli("predict", tmp_path / "empty", "x.nii.gz", "--out", tmp_path / "masks").err
    )
    assert "no run to resume" in one_line(
        cli("train", tmp_path / "empty", "--out", tmp_path / "run", "--resume").err
    )


def test_masks_without_labels_are_told_what_is_missing(tmp_path, cli):
    masks = tmp_path / "my masks"
    masks.mkdir()
    line = one_line(cli("evaluate", masks).err)
    assert line.endswith(f"give their labels too: medvisionllama evaluate '{masks}' LABELS")


def test_a_class_below_background_is_refused(dataset_folder, tmp_path, cli):
    root = dataset_folder(num_cases=4)
    for old, new in (("imagesTr", "images"), ("labelsTr", "labels")):
        (root / old).rename(root / new)
    (root / "dataset.json").unlink()
    (root / "names.json").write_text(json.dumps({"classes": {"-1": "air", "1": "liver"}}))
    outcome = cli("train", root, "--out", tmp_path / "run", "--epochs", 1, *settings())
    assert outcome.code == 2
    assert "names the class 'air' as -1" in one_line(outcome.err)


def test_another_division_is_not_written_over_one(phantoms, tmp_path, cli):
    file = tmp_path / "splits.json"
    for _ in range(2):
        assert cli("data", "split", phantoms, "--out", file, "--seed", 1).code == 0
    before = file.read_bytes()
    refused = cli("data", "split", phantoms, "--out", file, "--seed", 2)
    assert refused.code == 2
    assert "holds another division" in one_line(refused.err)
    assert file.read_bytes() == before


def test_a_file_that_is_no_division_is_left_alone(phantoms, tmp_path, cli):
    file = tmp_path / "notes.json"
    file.write_text("my notes")
    refused = cli("data", "split", phantoms, "--out", file)
    assert refused.code == 2
    assert "or something else; choose another --out" in one_line(refused.err)
    assert file.read_text() == "my notes"


def test_a_run_goes_on_with_its_own_preset(trained_folds, phantoms, cli):
    outcome = cli("train", phantoms, "--out", trained_folds / "fold0", "--resume", "--preset", "unet")
    assert outcome.code == 2
    assert "was begun with preset small" in one_line(outcome.err)


def test_missing_arguments_exit_with_2(cli, tmp_path):
    assert cli("train").code == 2
    assert cli("predict", tmp_path).code == 2
    assert cli("nonsense").code == 2


def test_full_disk_is_one_line_and_leaves_no_partial_file(phantoms, tmp_path, cli, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("medvisionllama._files.os.fsync", full)
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, *settings())
    assert outcome.code == 2
    assert "disk is full" in one_line(outcome.err)
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert not list((tmp_path / "cache").rglob("facts.json"))
    assert not list(tmp_path.rglob(".partial-*"))


def test_disk_that_fills_while_training_keeps_the_last_save(phantoms, tmp_path, cli, monkeypatch):
    import medvisionllama._files as files

    assert (
        cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 2, "--no-test", *settings()).code == 0
    )
    before = (tmp_path / "run" / "last" / "state.safetensors").read_bytes()
    real = files.os.fsync
    calls = iter(range(10_000))
    # The first files of a resumed run are its settings; let those pass.
    monkeypatch.setattr(
        "medvisionllama._files.os.fsync", lambda handle: real(handle) if next(calls) < 6 else full_disk()
    )
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--resume", "--epochs", 9, "--no-test")
    assert outcome.code == 2
    assert "disk is full" in one_line(outcome.err)
    assert (tmp_path / "run" / "last" / "state.safetensors").read_bytes() == before
    assert not list((tmp_path / "run").rglob(".partial-*"))


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_bad_scans_are_refused_before_any_mask_is_written(phantoms, tmp_path, cli):
    assert (
        cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, "--no-test", *settings()).code == 0
    )
    scans = tmp_path / "scans"
    shutil.copytree(phantoms / "imagesTr", scans)
    rewrite(scans / "phantom_005.nii.gz", lambda a: np.stack([a, a], -1))
    outcome = cli("predict", tmp_path / "run", scans, "--out", tmp_path / "masks")
    assert outcome.code == 2
    assert "2 channels" in one_line(outcome.err)
    assert not (tmp_path / "masks").exists()


def test_pickles_in_a_run_folder_are_refused_and_do_not_run(phantoms, tmp_path, cli):
    import pickle

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    assert (
        cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, "--no-test", *settings()).code == 0
    )
    (tmp_path / "run" / "best.safetensors").write_bytes(pickle.dumps(Payload()))
    outcome = cli("predict", tmp_path / "run", phantoms / "imagesTr", "--out", tmp_path / "masks")
    assert outcome.code == 2
    assert "damaged" in one_line(outcome.err)
    (tmp_path / "run" / "last" / "state.safetensors").write_bytes(pickle.dumps(Payload()))
    assert cli("train", phantoms, "--out", tmp_path / "run", "--resume", "--epochs", 3).code == 2
    assert not (tmp_path / "owned").exists()


def test_evaluate_refuses_masks_that_do_not_fit_their_labels(phantoms, tmp_path, cli):
    masks = tmp_path / "masks"
    shutil.copytree(phantoms / "labelsTr", masks)
    rewrite(masks / "phantom_002.nii.gz", lambda a: a[1:])
    assert "own grid" in one_line(cli("evaluate", masks, phantoms / "labelsTr").err)
    (masks / "phantom_002.nii.gz").rename(masks / "stranger.nii.gz")
    assert "no label of that name" in one_line(cli("evaluate", masks, phantoms / "labelsTr").err)
