"""The state of every run is read from files and locks, whatever was killed when."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvisionllama._files import is_locked, lock_if_free
from medvisionllama.errors import CheckpointError, ConfigError, DataError
from medvisionllama.experiments.matrix import expand
from medvisionllama.experiments.store import Experiment, phantom_folder

from .conftest import finish, run_ids


def states(experiment):
    return list(experiment.states(expand(experiment.matrix)).values())


def test_a_folder_says_what_became_of_each_run(experiment):
    first, second, third, _ = run_ids(experiment)
    finish(experiment, first)
    experiment.files(second).add_failure("no memory", "Traceback ...", where="node")
    folder = experiment.files(third).path
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert states(experiment) == ["done", "failed", "interrupted", "planned"]


def test_a_run_is_running_while_a_process_holds_its_lock_and_not_a_moment_longer(experiment):
    run_id = run_ids(experiment)[0]
    lock = experiment.files(run_id).lock
    script = (
        "import sys; from pathlib import Path; from medvisionllama._files import lock_if_free\n"
        "with lock_if_free(Path(sys.argv[1])) as free:\n"
        "    print(free, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    assert states(experiment)[0] == "running"
    with lock_if_free(lock) as free:
        assert not free
    holder.kill()
    holder.wait()
    assert states(experiment)[0] == "planned"
    assert not is_locked(lock)
    with lock_if_free(lock) as free:
        assert free


def test_a_run_that_goes_on_after_a_failure_has_not_failed(experiment):
    run_id = run_ids(experiment)[0]
    files = experiment.files(run_id)
    with lock_if_free(files.lock):
        files.add_failure("no disk", "Traceback ...", where="node")
    (files.path / "config.yaml").touch()
    assert states(experiment)[0] == "failed"
    later = files.failures.stat().st_mtime_ns + 10**9
    os.utime(files.lock, ns=(later, later))
    assert states(experiment)[0] == "interrupted"


def test_a_failure_cut_short_by_a_kill_loses_no_other(experiment):
    files = experiment.files(run_ids(experiment)[0])
    files.add_failure("first", "", where="a")
    with files.failures.open("a") as file:
        file.write('{"error": "cut sho')
    files.add_failure("second", "", where="b")
    assert [record["error"] for record in files.read_failures()] == ["first", "second"]


def test_a_damaged_record_is_named_with_the_way_out(experiment):
    files = experiment.files(run_ids(experiment)[0])
    files.path.mkdir(parents=True)
    files.done.write_text("{")
    with pytest.raises(CheckpointError, match="delete it"):
        files.read_done()


def test_looking_writes_nothing_and_creating_keeps_the_matrix(tmp_path, write_matrix):
    path = write_matrix()
    seen = Experiment.look(path, out=tmp_path / "out", data_root=tmp_path)
    assert not seen.path.exists()
    made = Experiment.create(tmp_path / "out", path, data_root=tmp_path)
    assert Experiment.open(made.path).matrix == seen.matrix == made.matrix
    assert Experiment.open(made.path).data_root == tmp_path.resolve()


def test_runs_that_the_matrix_holds_no_more_are_left_alone_and_named(experiment, write_matrix):
    old = run_ids(experiment)[1]
    finish(experiment, old)
    changed = Experiment.create(
        experiment.path, write_matrix(set={"train.max_steps": 6}, seeds=[0, 1]), data_root=None
    )
    assert changed.strangers(expand(changed.matrix)) == [old]
    assert set(states(changed)) == {"planned"}
    assert changed.data_root == experiment.data_root


def test_data_that_is_not_there_is_named_with_the_way_out(experiment):
    with pytest.raises(DataError, match=r"Task_A does not exist.*--data"):
        experiment.data_of(expand(experiment.matrix)[0])


def test_a_folder_without_an_experiment_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="experiment run"):
        Experiment.open(tmp_path)


def test_phantoms_are_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    folder = phantom_folder(4)
    scans = sorted((folder / "imagesTr").iterdir())
    before = [path.stat().st_mtime_ns for path in scans]
    assert len(scans) == 4
    assert phantom_folder(4) == folder
    assert [path.stat().st_mtime_ns for path in scans] == before
    assert Path(folder).is_dir()


def test_a_further_evaluation_that_is_asked_for_later_makes_a_done_run_due_again(experiment, write_matrix):
    block = next(run for run in run_ids(experiment) if "block" in run)
    finish(experiment, block, test_dice={"block": 0.5})
    assert "done" in states(experiment)
    arms = {"none": {"set": {"network.insert": "none"}}, "block": {"also": ["block_removed"]}}
    changed = Experiment.create(experiment.path, write_matrix(seeds=[0, 1], arms=arms), data_root=None)
    assert block in run_ids(changed)
    assert "done" not in states(changed)
    finish(changed, block, test_dice={"block": 0.5, "block-block-removed": 0.4})
    assert "done" in states(changed)


def test_a_matrix_that_cannot_be_used_replaces_no_other(experiment, write_matrix):
    before = (experiment.path / "matrix.yaml").read_text()
    with pytest.raises(ConfigError):
        Experiment.create(experiment.path, write_matrix(set={"network.widht": 3}), data_root=None)
    assert (experiment.path / "matrix.yaml").read_text() == before


def test_a_folder_is_not_taken_over_by_another_matrix(experiment, write_matrix):
    before = (experiment.path / "matrix.yaml").read_text()
    with pytest.raises(ConfigError, match=r"holds the experiment 'mine'.* is 'other'; .*--out"):
        Experiment.create(experiment.path, write_matrix(name="other"), data_root=None)
    with pytest.raises(ConfigError, match="holds the experiment 'mine'"):
        Experiment.look(write_matrix(name="other"), out=experiment.path)
    assert (experiment.path / "matrix.yaml").read_text() == before


def test_a_matrix_that_cannot_be_read_any_more_is_replaced(experiment, write_matrix):
    (experiment.path / "matrix.yaml").write_text("name: [")
    Experiment.create(experiment.path, write_matrix(), data_root=None)
    assert Experiment.open(experiment.path).matrix.name == "mine"


def test_a_folder_is_looked_at_and_no_other_one_beside_it(experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"is an experiment's folder already; .*elsewhere"):
        Experiment.look(experiment.path, out=tmp_path / "elsewhere")
    assert Experiment.look(experiment.path, out=experiment.path).matrix == experiment.matrix


def test_a_guessed_data_root_does_not_outlive_a_better_one(tmp_path, write_matrix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guessed = Experiment.create(tmp_path / "out", write_matrix(), data_root=None)
    assert guessed.data_root == tmp_path.resolve()
    monkeypatch.setenv("MEDVISIONLLAMA_DATA", str(tmp_path / "real"))
    assert Experiment.open(guessed.path).data_root == (tmp_path / "real").resolve()


def test_the_command_line_tells_where_data_is_then_the_environment_then_the_folder(
    experiment, tmp_path, monkeypatch
):
    assert Experiment.open(experiment.path).data_root == tmp_path.resolve()
    monkeypatch.setenv("MEDVISIONLLAMA_DATA", str(tmp_path / "environment"))
    assert Experiment.open(experiment.path).data_root == tmp_path / "environment"
    given = Experiment.open(experiment.path, data_root=tmp_path / "given")
    assert given.data_root == tmp_path / "given"
    monkeypatch.chdir(tmp_path)
    looked = Experiment.look(experiment.path, data_root=Path("given"))
    assert looked.data_root == given.data_root


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_keeps_nobody_from_working_and_reading(experiment, monkeypatch, code):
    run_id = run_ids(experiment)[0]
    lock = experiment.files(run_id).lock

    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr("medvisionllama._files.fcntl.flock", refuse)
    with lock_if_free(lock) as free:
        assert free
    assert lock.is_file()
    assert not is_locked(lock)
    assert states(experiment)[0] == "planned"


def test_who_may_only_read_sees_what_runs(experiment, monkeypatch):
    lock = experiment.files(run_ids(experiment)[0]).lock
    opened = os.open

    def reading_only(path, flags, *mode):
        if Path(path) == lock and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, "for reading only", str(path))
        return opened(path, flags, *mode)

    with lock_if_free(lock), monkeypatch.context() as patch:
        patch.setattr("os.open", reading_only)
        assert states(experiment)[0] == "running"
