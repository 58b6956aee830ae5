"""What `fit` refuses before it trains, and what it tells the user to look at."""

from types import SimpleNamespace

import pytest

from medvisionllama.config import load_config
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.run_dir import RunDir
from medvisionllama.training.checks import alone_in, check_still_unused, check_time_left, say_long_warmup

ONE_PROCESS = SimpleNamespace(is_main=True, any=bool)


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    with (
        alone_in(run_dir, ONE_PROCESS),
        pytest.raises(CheckpointError, match="another process is training"),
        alone_in(run_dir, ONE_PROCESS),
    ):
        raise AssertionError("two at a time")
    with alone_in(run_dir, ONE_PROCESS):
        pass


def test_a_folder_that_another_run_has_filled_meanwhile_is_refused(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    check_still_unused(run_dir, ONE_PROCESS)
    run_dir.state.parent.mkdir(parents=True)
    run_dir.state.touch()
    with pytest.raises(CheckpointError, match="already holds a run"):
        check_still_unused(run_dir, ONE_PROCESS)


def test_a_division_that_lies_where_a_run_is_to_go_is_not_replaced(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    run_dir.splits.touch()
    with pytest.raises(CheckpointError, match="is a division that is no run's"):
        run_dir.check_unused()
    run_dir.check_unused(run_dir.splits.resolve())
    run_dir.manifest.touch()
    run_dir.check_unused()


def test_a_disk_without_locks_keeps_nobody_from_training(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no locks available")

    monkeypatch.setattr("medvisionllama.training.checks.lock_if_free", refuse)
    with alone_in(RunDir(tmp_path / "run"), ONE_PROCESS):
        pass


@pytest.mark.parametrize(("seconds", "said"), [(2, 0), (20, 1)])
def test_a_run_says_if_its_minutes_went_into_preparing(seconds, said):
    lines: list[str] = []
    config = load_config("small", {"train.max_minutes": 1})
    check_time_left(config, seconds, SimpleNamespace(say=lines.append))
    assert len(lines) == said


def test_a_run_without_time_to_train_is_refused():
    config = load_config("small", {"train.max_minutes": 1})
    with pytest.raises(ConfigError, match=r"took 1 of the 1 minutes.*--max-minutes"):
        check_time_left(config, 61, SimpleNamespace(say=print))
    check_time_left(load_config("small", {"train.epochs": 1, "train.max_minutes": None}), 1e6, None)


@pytest.mark.parametrize(("steps", "said"), [(149, True), (150, False), (5, True), (None, False)])
def test_a_run_that_ends_in_its_warm_up_says_so(steps, said):
    lines: list[str] = []
    config = load_config("small", {"train.max_minutes": 1, "train.warmup_steps": 50})
    say_long_warmup(config, steps, SimpleNamespace(say=lines.append))
    assert bool(lines) == said
    assert not said or f"train.warmup_steps={steps // 10}" in lines[0]
