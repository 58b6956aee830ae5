"""What a node of a cluster checks and does, in this process and without Ray."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from medvisionllama._files import is_locked
from medvisionllama.experiments import ray_node
from medvisionllama.experiments.ray_driver import _token
from medvisionllama.experiments.ray_node import code_version, inspect


@pytest.fixture
def token(tmp_path):
    return tmp_path / ".token"


def test_the_token_is_locked_while_it_is_there(token):
    with _token(token):
        assert is_locked(token)
    assert not token.exists()


def test_a_node_with_the_same_folder_and_code_is_fit(token, tmp_path):
    with _token(token):
        assert inspect(str(token), [str(tmp_path)], code_version()) == {"fault": "", "doubt": ""}
        assert list(tmp_path.iterdir()) == [token]


def test_a_node_without_the_folder_is_not_fit(token, monkeypatch):
    monkeypatch.setattr(ray_node, "_SECONDS_TO_APPEAR", 0.0)
    assert "must be a shared folder" in inspect(str(token), [], code_version())["fault"]


def test_a_node_with_other_code_is_not_fit(token):
    with _token(token):
        fault = inspect(str(token), [], "0.0.1 (another)")["fault"]
    assert fault == f"medvisionllama is {code_version()} there and 0.0.1 (another) here; install the same one"


def test_a_node_that_cannot_import_the_package_says_why(token, tmp_path, monkeypatch):
    (tmp_path / "path" / "medvisionllama").mkdir(parents=True)
    (tmp_path / "path" / "medvisionllama" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    with _token(token):
        fault = inspect(str(token), [], code_version())["fault"]
    assert "cannot be imported there" in fault
    assert "No module named 'medvisionllama.experiments'" in fault


def test_locks_that_are_not_seen_are_a_doubt_and_no_fault(token):
    token.touch()
    answer = inspect(str(token), [], code_version())
    assert answer["fault"] == ""
    assert "locks" in answer["doubt"]


def test_a_command_adds_to_the_log_and_its_exit_code_comes_back(tmp_path):
    log = tmp_path / "run" / "log.txt"
    for code in (0, 3):
        command = [sys.executable, "-c", f"print('said {code}', flush=True); raise SystemExit({code})"]
        assert ray_node._run(command, log, "begin\n", dict(os.environ)) == code
    assert log.read_text() == "begin\nsaid 0\nbegin\nsaid 3\n"


def test_a_command_runs_in_the_launcher_s_folder_where_there_is_one(tmp_path):
    log, here = tmp_path / "log.txt", tmp_path / "here"
    here.mkdir()
    command = [sys.executable, "-c", "import os; print(os.getcwd())"]
    for folder in (here, tmp_path / "nowhere"):
        assert ray_node._run(command, log, "", dict(os.environ), str(folder)) == 0
    assert log.read_text().split() == [str(here.resolve()), str(Path.cwd())]


def test_an_interrupt_becomes_sigterm_and_waits_for_the_save(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    script = """
import signal, sys, time
def end(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""

    real, own, interrupts = time.sleep, threading.get_ident(), []

    def sleep(seconds):
        # Waiting for the save sleeps too, and so may threads that earlier tests left: both are left alone.
        if not interrupts and threading.get_ident() == own and "ready" in log.read_text():
            interrupts.append(1)
            raise KeyboardInterrupt
        real(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    assert ray_node._run([sys.executable, "-c", script], log, "", dict(os.environ)) == 130
    assert log.read_text() == "ready\nsaved\n"
