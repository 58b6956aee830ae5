"""A run that is killed and resumed ends with the weights of the run that was left alone, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medvisionllama import api
from medvisionllama.checkpoint import load_facts
from medvisionllama.errors import CheckpointError
from medvisionllama.progress import Lines
from medvisionllama.run_dir import RunDir, revisions
from medvisionllama.training import fit as module
from medvisionllama.training.loop import TrainingLoop

from .conftest import TINY, settings, wait_for

EPOCHS = 40


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    # Dropout on, so that the test sees a generator that is not put back where it was.
    extra = settings(train__save_seconds=0.05, network__dropout=0.1, unlabelled__scans="unused")
    extra += ["--cases", "3"]
    command = [
        sys.executable,
        "-m",
        "medvisionllama",
        "train",
        data,
        "--out",
        out,
        "--epochs",
        EPOCHS,
        "--no-test",
        *more,
    ]
    command += [] if more else extra
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def undisturbed(phantoms, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(phantoms, path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return RunDir(path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(number, undisturbed, phantoms, tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(phantoms, run.path)
    wait_for(run.state, process)
    state = load_facts(undisturbed.state)["state"]
    delay = random.SystemRandom().uniform(0, 0.4 * (state["elapsed_seconds"] - state["begun_seconds"]))
    time.sleep(delay)
    process.send_signal(number)
    process.communicate()
    assert process.returncode in {-signal.SIGKILL, 130}, (
        f"the run ended before the signal; delay {delay:.2f} s"
    )
    before = run.read_manifest()
    # Threads that make batches ahead change nothing either.
    resumed = start(phantoms, run.path, "--resume", "--set", "train.batch_threads=3")
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors.decode()
    for path in ("best", "state"):
        ours, theirs = (load_file(getattr(which, path)) for which in (run, undisturbed))
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"after a kill at {delay:.2f} s: {different[:3]}"
    steps = [(record["step"], record["dice"]) for record in run.read_history()]
    assert steps == [(record["step"], record["dice"]) for record in undisturbed.read_history()]
    after = run.read_manifest()
    assert (after["created"], before["resumed"]) == (before["created"], [])
    assert len(after["resumed"]) == 1
    assert revisions(after) == [before["git_revision"]] * 2
    # Nothing is left to train, so this is no session of it.
    api.train(phantoms, out=run.path, resume=True, test=False)
    assert run.read_manifest()["resumed"] == after["resumed"]


def test_a_shorter_limit_ends_a_run_where_it_was_saved(phantoms, tmp_path, monkeypatch):
    step, run = TrainingLoop._step, RunDir(tmp_path / "run")

    def crash_after_a_validation(self):
        if self.state.validated_step:
            raise RuntimeError("power cut")
        return step(self)

    monkeypatch.setattr(TrainingLoop, "_step", crash_after_a_validation)
    overrides = {**TINY, "train.max_steps": 6, "train.num_validations": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        api.train(phantoms, out=run.path, overrides=overrides)
    with pytest.raises(CheckpointError, match="has not ended"):
        api.evaluate(run.path)
    # Nothing is left to do by this limit, and the save is of before it.
    limit = {"train.max_steps": load_facts(run.state)["state"]["validated_step"]}
    assert api.train(phantoms, out=run.path, overrides=limit, resume=True).finished
    assert run.evaluation.is_file()


def test_ctrl_c_is_heard_in_a_validation_which_the_run_that_goes_on_makes(phantoms, tmp_path, monkeypatch):
    validate, calls = module.validate_cases, []

    def interrupted_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return validate(*arguments, **options)

    def train(name, *, resume=False):
        overrides = {**TINY, "train.max_steps": 6, "train.num_validations": 3}
        out = tmp_path / name
        return api.train(phantoms, out=out, overrides=overrides, resume=resume, test=False)

    whole = RunDir(train("whole").path)
    monkeypatch.setattr(module, "validate_cases", interrupted_once)
    stopped = train("stopped")
    assert (stopped.finished, stopped.steps) == (False, 4)
    run = RunDir(stopped.path)
    assert len(run.read_history()) == 1
    scan = next((phantoms / "imagesTr").iterdir())
    lines = []
    api.predict(run.path, scan, out=tmp_path / "early", progress=Lines(lines.append))
    assert any(f"{run.path} has not ended" in line for line in lines)
    with pytest.raises(CheckpointError, match=r"has not ended.* --resume"):
        api.evaluate(run.path)
    assert not run.evaluation.exists()
    # Validation is looked at all along.
    assert len(api.evaluate(run.path, split="validation"))
    assert train("stopped", resume=True).finished
    lines.clear()
    api.predict(run.path, scan, out=tmp_path / "late", progress=Lines(lines.append))
    assert not any("has not ended" in line for line in lines)
    assert len(api.evaluate(run.path))
    for path in ("best", "state"):
        ours, theirs = (load_file(getattr(which, path)) for which in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [(record["step"], record["dice"]) for record in run.read_history()]
    assert steps == [(record["step"], record["dice"]) for record in whole.read_history()]
