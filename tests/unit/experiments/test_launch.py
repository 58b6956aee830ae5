"""The launcher's decisions, with a backend that trains nothing."""

import subprocess
import sys
import time

import pytest

from medvisionllama._files import lock_if_free
from medvisionllama.data.splits import make_splits, write_splits
from medvisionllama.errors import CheckpointError, ConfigError, DataError, MedVisionLlamaError
from medvisionllama.experiments import launch as launching
from medvisionllama.experiments import local_backend, ray_backend, verbs, worker
from medvisionllama.experiments.launch import Ended, launch
from medvisionllama.experiments.local_backend import (
    LocalBackend,
    choose_place,
    cpu_limit,
    free_memory,
    visible_gpus,
)
from medvisionllama.experiments.matrix import expand, read_matrix
from medvisionllama.experiments.store import Experiment
from medvisionllama.progress import Silent

from .conftest import finish, run_ids


class Scripted:
    """Ends each start of a run as the script says: a list of exit codes for each run, the last one repeated."""

    def __init__(self, experiment, script, *, num_slots=2):
        self.experiment = experiment
        self.script = {run_id: list(codes) for run_id, codes in script.items()}
        self.num_slots = num_slots
        self.started = []
        self.most = 0
        self.active = []
        self.stopped = False

    def start(self, run_id):
        self.started.append(run_id)
        self.active.append(run_id)
        self.most = max(self.most, len(self.active))

    def wait(self, seconds):
        if not self.active:
            return []
        run_id = self.active.pop(0)
        codes = self.script.get(run_id, [0])
        code = codes.pop(0) if len(codes) > 1 else codes[0]
        if code == 0:
            finish(self.experiment, run_id)
        if code == 1:
            self.experiment.files(run_id).add_failure("it broke", "Traceback ...", where="here")
        return [Ended(run_id, code)]

    def stop(self):
        self.stopped = True


def work(experiment, script=None, *, retries=1, **options):
    backend = Scripted(experiment, script or {}, **options)
    outcome = launch(experiment, expand(experiment.matrix), backend, retries=retries, progress=Silent())
    assert backend.stopped
    return outcome, backend


def test_every_run_is_started_once_in_no_more_slots_than_there_are(experiment):
    outcome, backend = work(experiment, num_slots=3)
    assert sorted(backend.started) == sorted(run_ids(experiment))
    assert backend.most == 3
    assert (outcome.done, outcome.skipped, outcome.failed) == (4, 0, [])


def test_finished_runs_are_not_started(experiment):
    first, *rest = run_ids(experiment)
    finish(experiment, first)
    outcome, backend = work(experiment)
    assert sorted(backend.started) == sorted(rest)
    assert (outcome.done, outcome.skipped) == (3, 1)


def test_a_failing_run_is_tried_again_and_stops_nothing(experiment):
    first, second, *_ = run_ids(experiment)
    outcome, backend = work(experiment, {first: [1], second: [1, 0]}, retries=2)
    assert backend.started.count(first) == 3
    assert backend.started.count(second) == 2
    assert outcome.failed == [first]
    assert outcome.done == 3
    assert len(experiment.files(first).read_failures()) == 3


def test_a_worker_that_was_killed_leaves_a_record(experiment):
    first, *_ = run_ids(experiment)
    outcome, _ = work(experiment, {first: [-9, None, 0]}, retries=2)
    assert outcome.failed == []
    errors = [record["error"] for record in experiment.files(first).read_failures()]
    assert "killed by signal 9" in errors[0]
    assert "lost" in errors[1]


def test_an_interrupted_worker_goes_on_and_has_not_failed(experiment):
    first, *_ = run_ids(experiment)
    outcome, backend = work(experiment, {first: [130, 130, 0]}, retries=0)
    assert backend.started.count(first) == 3
    assert (outcome.done, outcome.failed) == (4, [])
    assert experiment.files(first).read_failures() == []


def test_a_run_that_another_launcher_finishes_is_counted_and_not_repeated(experiment, monkeypatch):
    monkeypatch.setattr(launching, "_LOOKS_BETWEEN_ASKING", 1)
    first, *_ = run_ids(experiment)
    with lock_if_free(experiment.files(first).lock) as free:
        assert free
        finish(experiment, first)
        (experiment.files(first).done).rename(experiment.files(first).path / "later.json")
        backend = Scripted(experiment, {first: [3]})
        calls = 0
        wait = backend.wait

        def finishing(seconds):
            nonlocal calls
            calls += 1
            if calls == 8:
                (experiment.files(first).path / "later.json").rename(experiment.files(first).done)
            return wait(seconds)

        backend.wait = finishing
        outcome = launch(experiment, expand(experiment.matrix), backend, progress=Silent())
    assert backend.started.count(first) == 1
    assert (outcome.done, outcome.failed) == (4, [])


def test_a_run_whose_other_launcher_died_is_taken_over(experiment, monkeypatch):
    monkeypatch.setattr(launching, "_LOOKS_BETWEEN_ASKING", 1)
    first, *_ = run_ids(experiment)
    # Taken at first, but nobody holds the lock when it is asked for again.
    outcome, backend = work(experiment, {first: [3, 0]})
    assert backend.started.count(first) == 2
    assert outcome.done == 4


def test_workers_are_stopped_when_the_launcher_itself_fails(experiment):
    backend = Scripted(experiment, {})

    def broken(seconds):
        raise RuntimeError("the cluster is gone")

    backend.wait = broken
    with pytest.raises(RuntimeError, match="gone"):
        launch(experiment, expand(experiment.matrix), backend, progress=Silent())
    assert backend.stopped


SLOW_TO_SAVE = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_worker_that_is_stopped_may_save_first(experiment, tmp_path):
    backend, saved = LocalBackend(experiment, slots=1, threads=1), tmp_path / "saved"
    worker = subprocess.Popen([sys.executable, "-c", SLOW_TO_SAVE, str(saved)], stdout=subprocess.PIPE)
    backend._workers[0] = ("run", worker)
    with worker:
        assert worker.stdout.readline() == b"ready\n"
        backend.stop()
        assert worker.poll() == 130
    assert saved.exists()


def test_a_run_that_the_matrix_dropped_meanwhile_is_left_out_and_has_not_failed(experiment):
    first, *_ = run_ids(experiment)
    outcome, backend = work(experiment, {first: [2]})
    assert backend.started.count(first) == 1
    assert (outcome.done, outcome.dropped, outcome.failed) == (3, 1, [])
    assert experiment.files(first).read_failures() == []


def test_waiting_without_a_worker_takes_its_time(experiment):
    backend = LocalBackend(experiment, slots=1, threads=1)
    began = time.monotonic()
    assert backend.wait(0.3) == []
    assert time.monotonic() - began >= 0.3, "a launcher with nothing to do must not spin"


def test_slots_take_turns_in_the_gpus_that_were_allotted(experiment):
    backend = LocalBackend(experiment, slots=3, threads=1, gpus=visible_gpus(2, "5,7"))
    chosen = [backend._place(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert chosen == ["5", "7", "5"]


@pytest.mark.parametrize(
    ("gpus", "slots", "threads", "chosen"),
    [
        (0, None, None, (3, 1)),  # 8 cores, but memory for three
        (0, None, 4, (2, 4)),
        (0, None, 16, (1, 16)),
        (0, 5, None, (5, 1)),
        (2, None, None, (2, 4)),
        (2, 4, None, (4, 2)),
        (2, 16, None, (16, 1)),
        (2, None, 1, (2, 1)),
    ],
)
def test_slots_and_threads_follow_from_each_other_and_the_machine(gpus, slots, threads, chosen, monkeypatch):
    monkeypatch.setattr(local_backend, "available_cores", lambda: list(range(8)))
    monkeypatch.setattr(local_backend, "free_memory", lambda: 15 * 2**30)
    monkeypatch.setattr(local_backend, "cpu_limit", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert choose_place(slots=slots, threads=threads)[:2] == chosen


def test_a_container_has_the_cores_of_its_limit(tmp_path, monkeypatch):
    assert cpu_limit(tmp_path) > 1000, "no container"
    for text, cores in (("max 100000", sys.maxsize), ("200000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert cpu_limit(tmp_path) == cores
    monkeypatch.setattr(local_backend, "available_cores", lambda: list(range(64)))
    monkeypatch.setattr(local_backend, "free_memory", lambda: 64 * 2**30)
    monkeypatch.setattr(local_backend, "cpu_limit", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert choose_place(slots=None, threads=None)[:2] == (2, 1)


def test_a_container_has_the_memory_of_its_limit(tmp_path):
    assert free_memory(tmp_path) > 200 * 2**20, "no container"
    (tmp_path / "memory.max").write_text(f"{300 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{200 * 2**20}\n")
    # Of what is used, files that were read give way.
    (tmp_path / "memory.stat").write_text(f"active_file 7\ninactive_file {50 * 2**20}\n")
    assert free_memory(tmp_path) == 150 * 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 200 * 2**20


def test_a_division_that_is_not_there_is_found_before_the_first_run(tmp_path, write_matrix):
    (tmp_path / "Task_A").mkdir()
    matrix = write_matrix(set={"train.max_steps": 5, "data.splits": str(tmp_path / "splits.json")})
    with pytest.raises(DataError, match=r"splits\.json does not exist"):
        verbs.run(matrix, out=tmp_path / "out", data=tmp_path)
    assert not (tmp_path / "out").exists()


def test_runs_that_have_begun_need_no_division_but_their_own(tmp_path, write_matrix, monkeypatch):
    (tmp_path / "Task_A").mkdir()
    matrix = write_matrix(set={"train.max_steps": 5, "data.splits": str(tmp_path / "gone.json")})
    experiment = Experiment.create(tmp_path / "out", matrix, data_root=tmp_path)
    for run_id in run_ids(experiment):
        experiment.files(run_id).path.mkdir(parents=True)
        experiment.files(run_id).config.touch()
    monkeypatch.setattr(verbs, "launch", lambda *_, **__: "launched")
    assert verbs.run(matrix, out=tmp_path / "out", data=tmp_path) == "launched"


def test_a_division_of_too_few_folds_is_found_before_the_first_run(tmp_path, write_matrix):
    (tmp_path / "Task_A").mkdir()
    splits = tmp_path / "splits.json"
    patients = {f"p{number}": f"p{number}" for number in range(5)}
    write_splits(make_splits(patients), splits)
    matrix = write_matrix(set={"train.max_steps": 5, "data.splits": str(splits)}, folds=[0, 4])
    with pytest.raises(ConfigError, match=r"splits\.json has 4 folds, and the matrix asks for fold 4"):
        verbs.run(matrix, out=tmp_path / "out", data=tmp_path)


@pytest.mark.parametrize("setting", ["data.splits", "train.start_from"])
def test_a_home_of_no_user_is_a_folder_that_is_not_there(setting, tmp_path, write_matrix):
    (tmp_path / "Task_A").mkdir()
    matrix = write_matrix(set={"train.max_steps": 5, setting: "~nobody-here/file"})
    with pytest.raises(MedVisionLlamaError, match="~nobody-here"):
        verbs.run(matrix, out=tmp_path / "out", data=tmp_path)


def test_the_dataset_of_what_is_done_is_not_needed_any_more(tmp_path, write_matrix, monkeypatch):
    tasks = {"a": {"data": "Task_A"}, "b": {"data": "Task_B"}}
    experiment = Experiment.create(tmp_path / "out", write_matrix(tasks=tasks), data_root=tmp_path)
    (tmp_path / "Task_B").mkdir()
    monkeypatch.setattr(verbs, "launch", lambda experiment, chosen, *_, **__: len(chosen))
    with pytest.raises(DataError, match="Task_A does not exist"):
        verbs.run(experiment.path)
    for run_id in run_ids(experiment):
        if run_id.startswith("a-"):
            finish(experiment, run_id)
    assert verbs.run(experiment.path) == 4


def test_an_earlier_run_that_is_not_there_is_found_before_the_first_run(tmp_path, write_matrix, monkeypatch):
    (tmp_path / "Task_A").mkdir()
    matrix = write_matrix(set={"train.max_steps": 5, "train.start_from": str(tmp_path / "earlier")})
    with pytest.raises(CheckpointError, match="earlier is not a run folder"):
        verbs.run(matrix, out=tmp_path / "out", data=tmp_path)
    assert not (tmp_path / "out").exists()
    # Runs that have begun do without it.
    monkeypatch.setattr(verbs, "launch", lambda experiment, chosen, *_, **__: len(chosen))
    for one in expand(read_matrix(matrix)):
        trained = tmp_path / "out" / "runs" / one.run_id / "trained.json"
        trained.parent.mkdir(parents=True)
        trained.touch()
    assert verbs.run(matrix, out=tmp_path / "out", data=tmp_path)


def test_a_worker_records_what_fails_before_its_run_begins(experiment, monkeypatch):
    # Else a thread that watches for the tests' own parent stays behind.
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    (experiment.path / "matrix.yaml").write_text("name: [")
    assert worker.main([str(experiment.path), "some-run"]) == worker.FAILED
    failures = experiment.files("some-run").read_failures()
    assert "matrix.yaml" in failures[0]["error"]
    assert "Traceback" in failures[0]["traceback"]


def test_a_worker_runs_where_nothing_can_be_locked(experiment, monkeypatch):
    """As on Windows, where a lock leaves no file."""
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    monkeypatch.setattr("medvisionllama._files.fcntl", None)
    monkeypatch.setattr("medvisionllama.experiments.execute.execute", lambda *_, **__: True)
    assert worker.main([str(experiment.path), run_ids(experiment)[0]]) == worker.DONE


def test_workers_look_where_their_own_launcher_has_the_data(experiment, tmp_path, monkeypatch):
    first, *_ = run_ids(experiment)
    backend = LocalBackend(experiment, slots=1, threads=1)
    # Another launcher has the datasets elsewhere, and so has the environment.
    elsewhere = tmp_path / "elsewhere"
    Experiment.create(experiment.path, experiment.path / "matrix.yaml", data_root=elsewhere)
    monkeypatch.setenv("MEDVISIONLLAMA_DATA", str(elsewhere))
    backend.start(first)
    (ended,) = backend.wait(120)
    assert ended.exit_code == worker.FAILED
    (failure,) = experiment.files(first).read_failures()
    assert f"{experiment.data_root / 'Task_A'} does not exist" in failure["error"]


def test_a_cluster_s_workers_are_told_where_the_data_is(experiment, monkeypatch):
    told = {}
    monkeypatch.setattr(ray_backend, "RayBackend", lambda folder, **options: told.update(options))
    monkeypatch.setattr(verbs, "launch", lambda *arguments, **options: None)
    (experiment.data_root / "Task_A").mkdir()
    verbs.run(experiment.path, backend="ray")
    assert told["worker"] == worker.command(experiment.data_root)


def test_a_cluster_s_nodes_make_their_own_phantoms(tmp_path, write_matrix, monkeypatch):
    told = {}
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ray_backend, "RayBackend", lambda folder, **options: told.update(options))
    monkeypatch.setattr(verbs, "launch", lambda *arguments, **options: None)
    (tmp_path / "Task_A").mkdir()
    matrix = write_matrix(tasks={"a": {"data": "Task_A"}, "made": {"phantoms": 3}})
    verbs.run(matrix, out=tmp_path / "out", data=tmp_path, backend="ray")
    assert told["folders"] == [tmp_path / "Task_A"]
