"""The command line itself: light to start, verbs that only look."""

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from medvisionllama import api
from medvisionllama.config import PRESETS
from medvisionllama.data.index import open_dataset
from medvisionllama.data.splits import make_splits
from medvisionllama.training.fit import RunResult

from .conftest import FAST, settings


@pytest.mark.parametrize("module", ["medvisionllama", "medvisionllama.cli.main"])
def test_starting_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'monai', 'transformers', 'numpy', 'pandas'}} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    "verb", [[], ["demo"], ["train"], ["predict"], ["evaluate"], ["data"], ["data", "split"], ["llm", "pull"]]
)
def test_every_verb_explains_itself(verb, cli):
    outcome = cli(*verb, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_listed_with_their_meaning(preset, cli):
    listed = cli("train", "--help-settings", "--preset", preset).out
    assert "network.insert = " in listed
    assert "What sits between encoder and decoder." in listed


def test_fingerprint_describes_a_dataset(phantoms, cli):
    facts = json.loads(cli("data", "fingerprint", phantoms, "--json").out)
    assert facts["cases"] == facts["patients"] == 8
    assert facts["classes"] == {"1": "head", "2": "tail"}
    assert facts["planned_crop"] == [24, 24, 16]


def test_a_division_can_be_looked_at_without_a_file(phantoms, tmp_path, cli):
    file = tmp_path / "splits.json"
    assert cli("data", "split", phantoms, "--out", file).code == 0
    written = json.loads(file.read_text())
    shown = cli("data", "split", phantoms)
    assert shown.code == 0
    assert "give --out to write them" in shown.out
    assert f"test: {', '.join(written['test'])}" in shown.out.splitlines()
    [third] = [line for line in shown.out.splitlines() if line.startswith("fold 3 validates: ")]
    assert third.split(": ")[1].split(", ") == written["folds"][3]["validation"]
    assert json.loads(cli("data", "split", phantoms, "--json").out) == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["splits.json"]


def test_split_file_is_obeyed_by_a_run(phantoms, tmp_path, cli):
    splits = tmp_path / "splits.json"
    assert cli("data", "split", phantoms, "--out", splits, "--seed", 7).code == 0
    arguments = ["--epochs", 1, "--no-test", *settings(data__splits=splits)]
    assert cli("train", phantoms, "--out", tmp_path / "run", *arguments).code == 0
    assert (tmp_path / "run" / "splits.json").read_text() == splits.read_text()


def test_catalogue_is_listed_and_unknown_names_are_refused(cli):
    assert "smollm2-135m" in cli("llm", "list").out
    assert "hidden_size" in cli("llm", "show", "llama-3.1-8b").out
    refused = cli("llm", "pull", "gpt-9")
    assert refused.code == 2
    assert "known: smollm2-135m" in refused.err


def test_offline_refuses_to_fetch(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    outcome = cli("llm", "pull", "smollm2-135m", "--offline")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert outcome.code == 2
    assert "downloads are off" in outcome.err


def test_the_minutes_of_the_demo_begin_with_its_block_there(tmp_path, monkeypatch):
    done = []

    def train(*_, **__):
        done.append("train")
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "medvisionllama.networks.factory.check_insert", lambda config: done.append(config.block.source)
    )
    monkeypatch.setattr("medvisionllama.api.runs.train", train)
    with pytest.raises(KeyboardInterrupt):
        api.demo(out=tmp_path / "demo")
    assert done == ["smollm2-135m", "train"]


def test_every_verb_on_data_is_a_function_of_the_same_name(phantoms, tmp_path):
    import medvisionllama

    assert medvisionllama.fingerprint(phantoms)["patients"] == 8
    assert medvisionllama.plan(phantoms).crop_size == (24, 24, 16)
    splits = medvisionllama.split(phantoms, out=tmp_path / "splits.json", exclude=["phantom_000"])
    assert "phantom_000" not in {*splits.test, *splits.folds[0].train, *splits.folds[0].validation}
    assert medvisionllama.check(phantoms, fast=True).ok


def test_the_command_to_go_on_with_keeps_the_test_cases_shut_and_can_be_pasted(cli, monkeypatch, tmp_path):
    out = tmp_path / "my run"
    monkeypatch.setattr("medvisionllama.api.train", lambda *_, **__: RunResult(out, False, 5, 1.0, 0.5))
    stopped = cli("train", "my data", "--out", out, "--no-test")
    assert stopped.code == 130
    assert f"medvisionllama train 'my data' --out '{out}' --resume --no-test\n" in stopped.err
    assert "--no-test" not in cli("train", "data", "--out", out).err


def test_training_tells_machines_what_the_test_cases_scored(phantoms, tmp_path, cli):
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--epochs", 1, "--json", *settings())
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    scored = json.loads(cli("evaluate", tmp_path / "run", "--json").out)
    # The one is read from a table of six digits.
    assert facts["test"]["mean_class_dice"] == pytest.approx(scored["mean_class_dice"], abs=1e-6)
    assert [row["class"] for row in facts["test"]["classes"]] == ["head", "tail", "foreground"]


def test_a_class_that_is_never_found_is_named_at_the_end_of_training(phantoms, tmp_path, cli, monkeypatch):
    def validate(*arguments, **options):
        return {"dice": 0.4, "dice_per_class": {"left": 0.8, "right": 0.0}, "never_found": ["right"]}

    monkeypatch.setattr("medvisionllama.training.fit.validate_cases", validate)
    extra = settings(**FAST, **{"train.max_steps": 2})
    outcome = cli("train", phantoms, "--out", tmp_path / "run", "--no-test", *extra)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("'right' was found in none of the") == 1


def test_a_faulty_test_case_costs_neither_the_report_nor_the_run(phantoms, tmp_path, cli):
    data, run = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "run"
    patients = open_dataset(data).patients
    label = data / "labelsTr" / f"{make_splits(patients, seed=0).test[0]}.nii.gz"
    whole = nib.load(label)
    voxels = whole.get_fdata().astype(np.uint8)
    voxels[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(voxels, whole.affine), label)
    outcome = cli("train", data, "--out", run, *settings(**FAST, **{"train.max_steps": 2}))
    assert outcome.code == 2
    assert "; the run itself is trained: correct the test case, then give" in " ".join(outcome.err.split())
    assert (run / "report.html").exists()
    assert not (run / "evaluation.csv").exists()
    nib.save(nib.Nifti1Image(voxels * (voxels != 9), whole.affine), label)
    assert cli("evaluate", run, "--split", "test").code == 0
    assert (run / "evaluation.csv").exists()
