"""Experiments with real workers: whatever is killed, nothing finished is repeated and the results are the same."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medvisionllama._files import write_json
from medvisionllama.config import read_config, write_config
from medvisionllama.evaluation.evaluate import read_table, write_table
from medvisionllama.experiments import execute as executing
from medvisionllama.experiments import verbs
from medvisionllama.experiments.matrix import expand
from medvisionllama.experiments.store import Experiment, RunFiles
from medvisionllama.progress import Silent
from medvisionllama.reports.html import write_report
from medvisionllama.run_dir import RunDir
from medvisionllama.training.fit import RunResult

from .conftest import TINY

MATRIX = {
    "name": "tiny",
    "tasks": {"phantoms": {"data": "phantoms"}},
    "models": {"small": {"set": {key: value for key, value in TINY.items() if "block" not in key}}},
    "arms": {
        "none": {"about": "no insert", "set": {"network.insert": "none"}},
        "block": {"about": "random", "set": {"network.block.weights": "random"}, "also": ["block_removed"]},
        "mlp": {"about": "as large", "match": {"arm": "block", "by": "trainable"}},
    },
    "reference": "none",
    # Dropout on, so that a generator that is not put back where it was would be seen.
    "set": {"train.max_steps": 30, "train.save_seconds": 0.05, "network.dropout": 0.1},
}


def write(path: Path, **changes: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    file = path / "matrix.yaml"
    file.write_text(yaml.safe_dump({**MATRIX, **changes}, sort_keys=False))
    return file


def launcher(matrix: Path, out: Path, data: Path, *more: object) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "medvisionllama", "experiment", "run", matrix, "--out", out),
        *("--data", data.parent, "--slots", 2, "--threads", 1, *more),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def workers_of(out: Path) -> list[int]:
    """Processes that work on an experiment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if "medvisionllama.experiments.worker" in command and str(out.resolve()) in command:
                found.append(int(entry.name))
    return found


def results(out: Path) -> dict[str, list[list[str]]]:
    """Every table that the runs measured."""
    return {
        f"{path.parent.name}/{path.name}": list(csv.reader(path.open()))
        for path in sorted(out.glob("runs/*/evaluation*.csv"))
    }


@pytest.fixture(scope="module")
def undisturbed(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = launcher(write(folder), folder / "out", phantoms)
    output, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"3 done now, 0 before, 0 failed" in output
    return folder / "out"


def test_an_experiment_trains_evaluates_and_records_every_run(undisturbed):
    found = verbs.status(undisturbed)
    assert set(found.states.values()) == {"done"}
    for run in found.runs:
        files = found.experiment.files(run.run_id)
        facts = files.read_done()
        assert facts is not None
        assert facts["steps"] == 30
        assert set(facts["test_dice"]) == {run.arm} | ({"block-block-removed"} if run.also else set())
        assert not set(facts["patients"]["train"]) & set(facts["patients"]["test"])
        assert "training: done" in files.log.read_text()
        assert not (files.path / "last").exists(), "what only an unfinished run needs is gone"
    sizes = {run.arm: found.experiment.files(run.run_id).read_done() or {} for run in found.runs}
    assert sizes["mlp"]["trainable"] == pytest.approx(sizes["block"]["trainable"], rel=0.02)
    assert sizes["block"]["frozen"] > 0 == sizes["mlp"]["frozen"]


def test_finished_runs_are_not_repeated(undisturbed, phantoms):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    process = launcher(undisturbed.parent / "matrix.yaml", undisturbed, phantoms)
    output, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"0 done now, 3 before" in output
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before


def test_killed_launchers_and_workers_change_no_result(undisturbed, phantoms, tmp_path):
    matrix, out = write(tmp_path), tmp_path / "out"
    chance = random.SystemRandom()
    killed = []
    for victim in ("worker", "launcher", "launcher"):
        process = launcher(matrix, out, phantoms)
        began = time.monotonic()
        delay = chance.uniform(0.0, 2.5)
        while time.monotonic() - began < 300 and not workers_of(out) and process.poll() is None:
            time.sleep(0.05)
        # Most of a worker's first seconds are imports: wait for a run to begin, then for a random moment.
        while time.monotonic() - began < 300 and not list(out.glob("runs/*/config.yaml")):
            time.sleep(0.05)
        time.sleep(delay)
        if victim == "worker":
            for pid in workers_of(out)[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(f"worker after {delay:.2f} s")
            time.sleep(1.0)
        process.kill()
        process.communicate()
        killed.append(f"launcher after {delay:.2f} s")
        # A launcher that was killed leaves nobody behind.
        deadline = time.monotonic() + 120
        while workers_of(out) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not workers_of(out), killed
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/done.json")}
    process = launcher(matrix, out, phantoms)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished run was repeated"
    assert results(out) == results(undisturbed), killed
    for run_id in (path.name for path in (out / "runs").iterdir()):
        ours, theirs = (
            [(record["step"], record["loss"], record["dice"]) for record in map(json.loads, path.open())]
            for path in (
                out / "runs" / run_id / "history.jsonl",
                undisturbed / "runs" / run_id / "history.jsonl",
            )
        )
        assert ours == theirs, killed


def test_two_launchers_share_a_folder_and_no_run_is_trained_twice(phantoms, tmp_path):
    arms = {name: MATRIX["arms"][name] for name in ("none", "block")}
    settings = {"set": {"train.max_steps": 4}}
    matrix, out = write(tmp_path, seeds=[0, 1], arms=arms, **settings), tmp_path / "out"
    both = [launcher(matrix, out, phantoms, "--slots", 1, "--json") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs[0][1].decode() + outputs[1][1].decode()
    counts = [json.loads(output) for output, _ in outputs]
    # What the other finished while this one worked counts too, so each sees all four.
    assert all(count["done"] + count["skipped"] == 4 and not count["failed"] for count in counts)
    logs = [path.read_text() for path in out.glob("runs/*/log.txt")]
    assert len(logs) == 4
    assert all(log.count("training: done") == 1 for log in logs)


def test_a_failing_run_is_recorded_with_its_traceback_and_stops_nothing(phantoms, tmp_path):
    arms = {**MATRIX["arms"], "broken": {"set": {"network.block.source": str(tmp_path / "no-model")}}}
    matrix, out = write(tmp_path, arms=arms, **{"set": {"train.max_steps": 3}}), tmp_path / "out"
    process = launcher(matrix, out, phantoms, "--retries", 1)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert b"3 done now, 0 before, 1 failed" in output
    assert b"broken" in errors
    found = verbs.status(out)
    broken = next(run.run_id for run in found.runs if run.arm == "broken")
    assert found.states[broken] == "failed"
    failures = RunFiles(out / "runs" / broken).read_failures()
    assert len(failures) == 2
    assert "no-model" in failures[0]["error"]
    assert "Traceback" in failures[0]["traceback"]
    page = verbs.report(out, pages=False)
    assert "no-model" in page.read_text()


def test_ctrl_c_saves_everything_and_the_same_command_goes_on(undisturbed, phantoms, tmp_path):
    matrix, out = write(tmp_path), tmp_path / "out"
    process = launcher(matrix, out, phantoms)
    deadline = time.monotonic() + 300
    while not list(out.glob("runs/*/last/state.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors.decode()
    assert b"goes on" in errors
    assert not workers_of(out)
    assert not list(out.glob("runs/*/failures.jsonl"))
    process = launcher(matrix, out, phantoms)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert results(out) == results(undisturbed)


def killed(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("limit", "prepared"), [({"train.max_minutes": 1}, 7), ({"train.max_steps": 2}, 0)])
def test_the_minutes_of_a_run_begin_with_its_scans_prepared(limit, prepared, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    found = []

    def fit(config, **options):
        found.append(len(list((tmp_path / "cache").rglob("facts.json"))))
        return RunResult(config.out, finished=False, steps=0, seconds=0.0, validation_dice=None)

    monkeypatch.setattr(executing, "fit", fit)
    experiment = Experiment.create(
        tmp_path / "out", write(tmp_path, **{"set": limit}), data_root=phantoms.parent
    )
    run = next(run for run in expand(experiment.matrix) if run.arm == "none")
    assert not executing.execute(experiment, run, progress=Silent())
    # All eight but the one that is kept for the test.
    assert found == [prepared]


def test_a_begun_run_has_the_device_that_the_matrix_asks_for_now(phantoms, tmp_path, monkeypatch):
    asked = []

    def fit(config, **options):
        asked.append(config.train.device)
        write_config(config, RunDir(config.out).config)
        return RunResult(config.out, finished=False, steps=0, seconds=0.0, validation_dice=None)

    monkeypatch.setattr(executing, "fit", fit)
    for device in ({"train.device": "cuda"}, {}):
        matrix = write(tmp_path, models={"small": {}}, **{"set": {"train.max_steps": 2, **device}})
        experiment = Experiment.create(tmp_path / "out", matrix, data_root=phantoms.parent)
        run = next(run for run in expand(experiment.matrix) if run.arm == "none")
        assert not executing.execute(experiment, run, progress=Silent())
    assert asked == ["cuda", "auto"]


def test_a_run_is_scored_anywhere_and_its_record_names_what_trained_it(phantoms, tmp_path, monkeypatch):
    def study(device):
        arms = {"none": {"set": {"network.insert": "none", "train.device": device}}}
        matrix = write(tmp_path, arms=arms, **{"set": {"train.max_steps": 2, "train.num_validations": 1}})
        experiment = Experiment.create(tmp_path / "out", matrix, data_root=phantoms.parent)
        return experiment, *expand(experiment.matrix)

    with monkeypatch.context() as patch:
        patch.setattr(executing, "evaluate_run", killed)
        with pytest.raises(KeyboardInterrupt):
            executing.execute(*study("cpu"), progress=Silent())
    experiment, run = study("cuda")
    assert executing.execute(experiment, run, progress=Silent())
    files = experiment.files(run.run_id)
    hardware = RunDir(files.path).read_manifest()["hardware"]
    assert (files.read_done() or {})["machine"].startswith(f"{hardware['processor']}, ")
    assert read_config(files.config).train.device == "cuda"


def test_a_done_run_keeps_nothing_of_any_network_that_only_an_unfinished_one_needs(phantoms, tmp_path):
    settings = {"network.insert": "none", "train.members": 2, "unlabelled.scans": "unused"}
    matrix = write(
        tmp_path,
        arms={"none": {"set": settings}},
        fractions=[0.5],
        **{"set": {"train.max_steps": 4, "train.num_validations": 1}},
    )
    experiment = Experiment.create(tmp_path / "out", matrix, data_root=phantoms.parent)
    (run,) = expand(experiment.matrix)
    assert executing.execute(experiment, run, progress=Silent())
    folder = experiment.files(run.run_id).path
    assert len(list(folder.rglob("best.safetensors"))) == 2
    assert not [path for name in ("last", "pseudo_labels") for path in folder.rglob(name)]


def test_a_page_names_the_gpu_of_a_machine_only_if_it_trained(undisturbed, tmp_path):
    run = next(run for run in verbs.status(undisturbed).runs if run.arm == "none")
    run_dir = RunDir(shutil.copytree(undisturbed / "runs" / run.run_id, tmp_path / "run"))
    manifest = run_dir.read_manifest()
    hardware = {**manifest["hardware"], "gpu": "NVIDIA H200"}
    assert hardware["device"] == "cpu"
    for device, times in (("cpu", 0), ("cuda", 3)):
        session = {**manifest, "hardware": {**hardware, "device": device}}
        write_json(run_dir.manifest, {**session, "resumed": [session]})
        assert write_report(run_dir.path).read_text().count("NVIDIA H200") == times


def test_a_trained_run_is_evaluated_where_its_data_is_now(phantoms, tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(phantoms, old / "phantoms")
    settings = {"train.max_steps": 2, "train.num_validations": 1}
    matrix = write(tmp_path, **{"set": settings})
    experiment = Experiment.create(tmp_path / "out", matrix, data_root=old)
    run = next(run for run in expand(experiment.matrix) if run.arm == "none")
    with monkeypatch.context() as patch:
        patch.setattr(executing, "evaluate_run", killed)
        with pytest.raises(KeyboardInterrupt):
            executing.execute(experiment, run, progress=Silent())
    files = experiment.files(run.run_id)
    trained = files.trained.read_bytes()
    old.rename(new)
    moved = Experiment.open(experiment.path, data_root=new)
    assert executing.execute(moved, run, progress=Silent())
    assert files.trained.read_bytes() == trained, "it was trained again"
    facts = files.read_done() or {}
    assert set(facts["test_dice"]) == {"none"}
    # Whatever looks at the run later, as its page does, finds the scans too.
    assert read_config(files.config).data.path == new / "phantoms"


def test_a_further_evaluation_measures_nothing_again_that_is_as_it_was(phantoms, tmp_path):
    settings = {"train.max_steps": 2, "train.num_validations": 1}

    def study(**changes):
        arms = {"block": {"set": {"network.block.weights": "random"}, **changes}}
        matrix = write(tmp_path, arms=arms, reference="block", **{"set": settings})
        experiment = Experiment.create(tmp_path / "out", matrix, data_root=phantoms.parent)
        return experiment, *expand(experiment.matrix)

    experiment, run = study()
    assert executing.execute(experiment, run, progress=Silent())
    files = experiment.files(run.run_id)
    facts, table = files.read_done() or {}, RunDir(files.path).evaluation
    # As code of before would have measured it.
    write_table(read_table(table).assign(dice=0.4321), table)
    write_json(files.done, {**facts, "test_dice": {"block": 0.4321}, "evaluation_seconds": 1000.0})
    old = table.read_bytes()
    assert executing.execute(*study(also=["block_removed"]), progress=Silent())
    found = files.read_done() or {}
    assert (table.read_bytes(), found["test_dice"]["block"]) == (old, 0.4321)
    assert set(found["test_dice"]) == {"block", "block-block-removed"}
    assert found["evaluation_seconds"] > 1000
    # A table that says something else than the record is not what was measured.
    write_table(read_table(table).assign(dice=0.9), table)
    assert executing.execute(*study(also=["block_removed"]), progress=Silent())
    again = files.read_done() or {}
    measured = {**found["test_dice"], "block": pytest.approx(facts["test_dice"]["block"])}
    assert again["test_dice"] == measured
    # Nor is what would be cleaned otherwise by now to stand beside what is cleaned so.
    scored = RunDir(files.path).scored
    write_json(scored, {**json.loads(scored.read_text()), "cleaning": {}})
    write_table(read_table(table).assign(dice=0.4321), table)
    write_json(files.done, {**again, "test_dice": {**again["test_dice"], "block": 0.4321}})
    assert executing.execute(*study(also=["block_removed"]), progress=Silent())
    assert (files.read_done() or {})["test_dice"] == measured


def test_report_and_status_read_the_folder(undisturbed, cli):
    shown = cli("experiment", "status", undisturbed)
    assert (shown.code, "3 done" in shown.out) == (0, True)
    states = json.loads(cli("experiment", "status", undisturbed, "--json").out)["states"]
    assert set(states.values()) == {"done"}
    written = cli("experiment", "report", undisturbed)
    assert written.code == 0, written.err
    page = Path(written.out.strip().splitlines()[-1])
    assert page == undisturbed / "results" / "index.html"
    with (page.parent / "comparisons.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
    assert {row["arm"] for row in rows} == {"block", "block-block-removed", "mlp"}
    with (page.parent / "runs.csv").open() as file:
        validated = {row["arm"] for row in csv.DictReader(file) if row["validation_dice"]}
    assert validated == {"block", "mlp", "none"}, "what has its block removed has not been validated"
    for run in verbs.status(undisturbed).runs:
        assert f"../runs/{run.run_id}/report.html" in page.read_text()
        assert (undisturbed / "runs" / run.run_id / "report.html").is_file()
    against = cli("experiment", "report", undisturbed, "--reference", "block", "--no-pages")
    assert (
        Path(against.out.strip().splitlines()[-1]) == undisturbed / "results" / "against-block" / "index.html"
    )


def test_plan_tells_sizes_hours_and_disk_and_writes_nothing(phantoms, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matrix = write(tmp_path / "m")
    shown = cli("experiment", "plan", matrix, "--data", phantoms.parent)
    assert shown.code == 0, shown.err
    assert "3 runs (0 of them done), about 0.0 hours" in shown.out
    assert "trainable of block: 1.00" in shown.out
    assert "of prepared scans in the cache" in shown.out
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    found = json.loads(
        cli("experiment", "plan", matrix, "--data", phantoms.parent, "--no-probe", "--json").out
    )
    assert found["num_runs"] == 3
    assert found["hours"] is None


BAD = {
    "a matrix that is not there": (["plan", "nowhere.yaml"], "does not exist"),
    "a folder without an experiment": (["status", "."], "holds no experiment"),
    "a pattern that fits nothing": (["run", "m/matrix.yaml", "--only", "x-*"], "fits no run"),
    "data that is not there": (["run", "m/matrix.yaml", "--data", "nowhere"], "--data"),
    "an address without a cluster": (["run", "m/matrix.yaml", "--address", "a:1"], "--backend ray"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, phantoms, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDVISIONLLAMA_DATA", str(phantoms.parent))
    write(tmp_path / "m")
    ended = cli("experiment", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("experiments/*/runs"))


def test_runs_of_another_split_are_not_compared(undisturbed, phantoms, tmp_path, cli):
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    run = next(run for run in verbs.status(copy).runs if run.arm == "mlp")
    files = Experiment.open(copy).files(run.run_id)
    facts = files.read_done() or {}
    files.done.write_text(json.dumps({**facts, "splits_sha256": "0" * 64}))
    ended = cli("experiment", "report", copy, "--no-pages")
    assert ended.code == 2
    assert "split" in ended.err
