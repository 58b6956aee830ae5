"""Matrices written to a file, and experiments whose runs are done without training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from medvisionllama.experiments.matrix import Matrix, expand
from medvisionllama.experiments.store import Experiment

MINIMAL = {
    "name": "mine",
    "tasks": {"a": {"data": "Task_A"}},
    "models": {"small": {"preset": "small"}},
    "arms": {"none": {"set": {"network.insert": "none"}}, "block": {}},
    "reference": "none",
    "set": {"train.max_steps": 5},
}


def matrix(**changes: object) -> Matrix:
    return Matrix.model_validate({**MINIMAL, **changes})


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the test says where datasets are."""
    monkeypatch.delenv("MEDVISIONLLAMA_DATA", raising=False)


@pytest.fixture
def write_matrix(tmp_path: Path) -> Callable[..., Path]:
    """Write a matrix file: the smallest one with changes."""

    def write(**changes: object) -> Path:
        path = tmp_path / "matrix.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}, sort_keys=False))
        return path

    return write


@pytest.fixture
def experiment(tmp_path: Path, write_matrix: Callable[..., Path]) -> Experiment:
    """Four runs: two arms, two seeds."""
    return Experiment.create(tmp_path / "experiment", write_matrix(seeds=[0, 1]), data_root=tmp_path)


def finish(experiment: Experiment, run_id: str, **facts: object) -> None:
    """Make a run look done."""
    files = experiment.files(run_id)
    files.path.mkdir(parents=True, exist_ok=True)
    files.done.write_text(json.dumps({"run_id": run_id, "test_dice": {"none": 0.5}, **facts}))


def run_ids(experiment: Experiment) -> list[str]:
    return [run.run_id for run in expand(experiment.matrix)]
