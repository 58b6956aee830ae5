"""Several networks of one run: trained side by side, averaged, interrupted and gone on with together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from safetensors.torch import load_file

from medvisionllama import Predictor, api
from medvisionllama._files import file_sha256
from medvisionllama.config import load_config, read_config, write_config
from medvisionllama.data.index import open_dataset
from medvisionllama.data.splits import make_splits, write_splits
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.evaluation.explain.job import open_networks
from medvisionllama.inference.predictor import Member
from medvisionllama.run_dir import RunDir
from medvisionllama.training.members import _COMMAND, OtherMember, check_members, member_config

from .conftest import FAST, HANG_SECONDS, settings, wait_for

LONG, SHORT = 60, 4
"""Epochs: long enough that on a fast machine no network ends by itself while the first is asked to end; and enough
to tell networks apart."""
SLOW = ("--set", "train.save_seconds=0.05", "--set", "train.num_validations=3")


def tiny(members):
    values = {key.replace(".", "__"): value for key, value in FAST.items()}
    return settings(**values | {"train__members": members})


def start(data, out, *more, members=None):
    """Begin a run, or go on with one if it is not said how many networks it has."""
    command = [sys.executable, "-m", "medvisionllama", "train", data, "--out", out, "--no-test", *more]
    command += [*tiny(members), *SLOW] if members else []
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def train(data, out, *more, members=1, epochs=SHORT):
    process = start(data, out, "--epochs", epochs, *more, members=members)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return RunDir(out)


@pytest.fixture(scope="module")
def pair(phantoms, tmp_path_factory):
    """A short run of two networks; a test that writes to it copies it first."""
    return train(phantoms, tmp_path_factory.mktemp("pair") / "run", members=2)


@pytest.fixture(scope="module")
def undisturbed(phantoms, tmp_path_factory):
    """A long run of two networks that nobody disturbed."""
    return train(phantoms, tmp_path_factory.mktemp("undisturbed") / "run", members=2, epochs=LONG)


def same_weights(ours, theirs):
    a, b = load_file(ours), load_file(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_predicts_from_the_files_that_the_documents_name(pair, phantoms, tmp_path):
    scan, bare = phantoms / "imagesTr" / "phantom_000.nii.gz", tmp_path / "run"
    for folder in (pair.path, pair.member(2).path):
        to = bare / folder.relative_to(pair.path)
        to.mkdir(parents=True)
        for name in ("config.yaml", "plan.json", "best.safetensors"):
            shutil.copy(folder / name, to)
    ours, theirs = (Predictor.from_run(path).predict(scan).mask.array for path in (pair.path, bare))
    assert (ours == theirs).all()


def test_each_member_is_the_run_that_it_would_be_alone(pair, phantoms, tmp_path):
    second = pair.member(2)
    seed = read_config(second.config).train.seed
    assert seed != read_config(pair.config).train.seed
    assert not same_weights(pair.best, second.best)
    for member, its_seed in ((pair, 0), (second, seed)):
        alone = train(phantoms, tmp_path / f"alone-{its_seed}", "--set", f"train.seed={its_seed}")
        assert same_weights(member.best, alone.best)
    assert second.splits.read_text() == pair.splits.read_text()


def test_a_run_predicts_the_mean_of_its_members(pair, phantoms):
    scan = next((phantoms / "imagesTr").iterdir())
    device = torch.device("cpu")
    alone = [
        Predictor([Member.from_run(run.path, device)]).predict(scan, probabilities=True).probabilities
        for run in (pair, pair.member(2))
    ]
    together = Predictor.from_run(pair.path, device="cpu").predict(scan, probabilities=True).probabilities
    mean = (alone[0].astype(float) + alone[1]) / 2
    assert abs(together - mean).max() <= 1
    assert abs(together.astype(float) - alone[0]).max() > 1


def test_a_run_s_networks_look_at_a_scan_as_its_own_folder_says(pair, tmp_path):
    run = RunDir(shutil.copytree(pair.path, tmp_path / "run"))
    settings = read_config(run.config)
    inference = settings.inference.model_copy(update={"overlap": 0.25})
    write_config(settings.model_copy(update={"inference": inference}), run.config)
    members = Predictor.from_run(run.path, device="cpu").members
    assert [member.config.inference.overlap for member in members] == [0.25, 0.25]
    once = Predictor.from_run(run.path, device="cpu", fast=True).members
    assert [member.config.inference for member in once] == [inference.model_copy(update={"flip": False})] * 2


def test_a_class_that_one_of_the_networks_lost_is_named_with_it(phantoms, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("medvisionllama.training.fit.say_never_found", lambda run, *_: asked.append(run.path))
    values = {**FAST, "train.members": 2}
    api.train(phantoms, out=tmp_path / "run", epochs=1, overrides=values, test=False)
    assert asked == [tmp_path / "run", tmp_path / "run" / "members" / "2"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_the_first_ends_the_others_saved_and_both_go_on(
    number, undisturbed, phantoms, tmp_path
):
    run = RunDir(tmp_path / "run")
    process = start(phantoms, run.path, "--epochs", LONG, members=2)
    wait_for(run.member(2).state, process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode in {-signal.SIGKILL, 130}
    wait_until_free(run.member(2))
    assert not run.member(2).history.is_file() or len(run.member(2).read_history()) < 3
    resumed = start(phantoms, run.path, "--resume")
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors.decode()
    assert same_weights(run.best, undisturbed.best)
    assert same_weights(run.member(2).best, undisturbed.member(2).best)


def wait_until_free(run):
    """Until nobody trains in a folder: a process that was left behind would hold its lock, and go on saving."""
    saved = -1.0
    for _ in range(100):
        time.sleep(0.3)
        if run.state.stat().st_mtime == saved:
            return
        saved = run.state.stat().st_mtime
    pytest.fail("the second member trains on although the first has ended")


def test_a_member_is_ended_before_its_first_step_where_ctrl_c_is_ignored(phantoms, tmp_path):
    """As in the background of a shell script: what the member inherits must not keep it training for nobody."""
    config = load_config("small", {**FAST, "data.path": phantoms, "out": tmp_path, "train.epochs": 100_000})
    request = {"config": config.model_dump(mode="json"), "resume": False, "began": time.time()}
    ended = subprocess.run(
        [sys.executable, "-m", "medvisionllama.training.member_process"],
        input=json.dumps(request).encode() + b"\n",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        check=False,
        timeout=HANG_SECONDS,
    )
    assert ended.returncode == 130


def without_room(path):
    """A folder for a run whose second member cannot begin."""
    run = RunDir(path)
    run.member(2).path.mkdir(parents=True)
    run.member(2).config.write_text("in the way")
    return run


def test_a_member_that_fails_is_named_in_one_line_and_the_first_is_kept(phantoms, tmp_path, cli):
    run = without_room(tmp_path / "run")
    outcome = cli("train", phantoms, "--out", run.path, "--epochs", 2, "--no-test", *tiny(2))
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama:")]
    assert f"{run.member(2).path} failed" in line
    assert "already holds a run" in line
    assert "or without it with --resume --members 1" in line
    assert run.best.is_file()
    with pytest.raises(CheckpointError, match=r"members/2 has no best\.safetensors yet.*adding --members 1"):
        api.predict(run.path, phantoms / "imagesTr", out=tmp_path / "masks")
    assert api.train(phantoms, out=run.path, members=1, resume=True, test=False).finished
    assert len(api.predict(run.path, phantoms / "imagesTr", out=tmp_path / "masks")) == 8


def test_a_member_that_fails_is_named_while_the_first_still_trains(phantoms, tmp_path):
    run = without_room(tmp_path / "run")
    # Ends by itself if nothing is said.
    process = start(phantoms, run.path, "--max-minutes", 10, members=2)
    said = next(line for line in process.stderr if b"the others train on" in line)
    assert b"already holds a run" in said
    assert process.poll() is None
    wait_for(run.state, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert errors.count(b"already holds a run") == 0, "said once"


def test_a_member_that_was_killed_says_so(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    killed.kill()
    killed.wait()
    with tempfile.TemporaryFile() as errors:
        errors.write(b"UserWarning: of no weight\n")
        assert "ended by SIGKILL" in OtherMember(RunDir(tmp_path), killed, errors).last_words()


def test_a_finished_run_can_be_given_a_member_more(phantoms, tmp_path):
    run = train(phantoms, tmp_path / "run")
    before = load_file(run.best)
    api.train(phantoms, out=run.path, members=2, resume=True, test=False)
    assert len(Predictor.from_run(run.path).members) == 2
    assert all(torch.equal(value, before[name]) for name, value in load_file(run.best).items())


def test_a_member_that_joins_later_obeys_the_run_s_division(phantoms, tmp_path):
    """Drawn anew it could be another by then, and train with what tests the run."""
    file, patients = tmp_path / "splits.json", open_dataset(phantoms).patients
    write_splits(make_splits(patients, seed=3), file)
    run = train(phantoms, tmp_path / "run", "--set", f"data.splits={file}")
    write_splits(make_splits(patients, seed=4), file)
    assert file.read_text() != run.splits.read_text()
    api.train(phantoms, out=run.path, members=2, resume=True, test=False)
    assert run.member(2).splits.read_text() == run.splits.read_text()
    assert run.member(2).read_manifest()["cases"] == run.read_manifest()["cases"]


@pytest.mark.parametrize("fold", ["all", "0"])
def test_a_member_that_joins_later_knows_no_newcomer(phantoms, tmp_path, fold):
    data = shutil.copytree(phantoms, tmp_path / "data")
    run = train(data, tmp_path / "run", "--fold", fold)
    content = json.loads((data / "dataset.json").read_text())
    for part in ("image", "label"):
        shutil.copy(data / content["training"][0][part], data / f"{part}sTr" / "phantom_099.nii.gz")
    new = {part: f"{part}sTr/phantom_099.nii.gz" for part in ("image", "label")}
    content["training"].append(new)
    content["numTraining"] = len(content["training"])
    (data / "dataset.json").write_text(json.dumps(content))
    api.train(data, out=run.path, members=2, resume=True, test=False)
    assert run.member(2).read_manifest()["cases"] == run.read_manifest()["cases"]


def test_a_member_has_no_part_in_a_launcher_s_job_of_one(phantoms, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    assert (train(phantoms, tmp_path / "run", members=2).member(2).best).is_file()


def test_weights_without_a_state_to_go_on_from_are_not_trained_over(pair, phantoms, tmp_path):
    run = RunDir(shutil.copytree(pair.path, tmp_path / "run"))
    shutil.rmtree(run.state.parent)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="going on would begin anew and replace them"):
        api.train(phantoms, out=run.path, resume=True, test=False)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_refused_resume_leaves_the_run_s_files_as_they_were(pair, phantoms, tmp_path):
    run = RunDir(shutil.copytree(pair.path, tmp_path / "run"))
    run.state.write_bytes(run.state.read_bytes()[:200])
    before = run.config.read_bytes(), run.manifest.read_bytes()
    with pytest.raises(CheckpointError):
        api.train(phantoms, out=run.path, members=3, resume=True, test=False)
    assert (run.config.read_bytes(), run.manifest.read_bytes()) == before
    assert len(Predictor.from_run(run.path).members) == 2


def test_a_file_in_the_folder_one_stands_in_is_no_module_of_python(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit(77)")
    config = load_config("small", {**FAST, "data.path": tmp_path / "none", "out": tmp_path / "run"})
    request = {"config": config.model_dump(mode="json"), "resume": False, "began": time.time()}
    line = json.dumps(request).encode() + b"\n"
    ended = subprocess.run([sys.executable, *_COMMAND], input=line, cwd=tmp_path, check=False)
    assert ended.returncode in {2, 130}


def test_a_choice_of_cleaning_is_that_of_all_networks(pair, tmp_path):
    run = RunDir(shutil.copytree(pair.path, tmp_path / "run"))
    before = run.weights_sha256()
    shutil.copy(run.best, run.member(2).best)
    assert run.weights_sha256() != before
    assert run.member(2).weights_sha256() == file_sha256(run.best)


def test_an_explanation_says_that_it_is_of_the_first(pair):
    [note] = [
        note
        for note in open_networks(pair.path, random_block=False, against=None, device="cpu").notes
        if "2 networks" in note
    ]
    assert "those of the first" in note
    second = pair.member(2).path
    assert not any(
        "networks" in note for note in open_networks(second, random_block=False, against=None).notes
    )


def test_members_and_a_launcher_do_not_go_together():
    check_members(1, 2)
    check_members(2, 1)
    with pytest.raises(ConfigError, match=r"train\.members=2 starts processes of its own"):
        check_members(2, 4)


def test_runs_of_neighbouring_seeds_share_no_member(tmp_path):
    seeds = [
        member_config(load_config("small", {"out": tmp_path, "train.seed": seed}), number).train.seed
        for seed in range(20)
        for number in (2, 3)
    ]
    assert len({*seeds, *range(20)}) == 60
