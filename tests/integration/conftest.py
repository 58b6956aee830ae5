"""A tiny dataset, a tiny network, and the command line as a function."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from medvisionllama import api
from medvisionllama.data.phantom import write_phantoms

TINY = {
    "network.stem_channels": [4, 6, 8],
    "network.context_channels": [6, 8],
    "network.width": 24,
    "network.depth": 2,
    "network.insert_after": 1,
    "network.num_heads": 2,
    "network.block.weights": "random",
    "train.num_validations": 3,
    "train.device": "cpu",
    "train.members": 1,
    "inference.turn": False,
}
FAST = {
    **TINY,
    "network.insert": "none",
    "train.num_validations": 1,
    "train.ema_decay": 0,
    "train.warmup_steps": 0,
}
"""Without a block, and learning enough in a few epochs to tell runs apart."""


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=8, shape=(20, 24, 16))


def train_fast(data: Path, out: Path, *, fold: int, seed: int) -> Path:
    """Train a run of `FAST` settings, without its test cases, and return its folder."""
    api.train(data, out=out, fold=fold, epochs=5, overrides={**FAST, "train.seed": seed}, test=False)
    return out


@pytest.fixture(scope="session")
def trained_folds(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of the folds 0 and 1, `fold0` and `fold1`; a test that writes to them copies it first."""
    root = tmp_path_factory.mktemp("runs")
    for fold in (0, 1):
        train_fast(phantoms, root / f"fold{fold}", fold=fold, seed=fold)
    return root


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process and return exit code, stdout and stderr."""
    from medvisionllama.cli.main import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["medvisionllama", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), printed.out, printed.err)

    return run


def settings(**extra: object) -> list[str]:
    """`--set` arguments of the tiny network."""
    values = {**TINY, **{key.replace("__", "."): value for key, value in extra.items()}}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


HANG_SECONDS = 600
"""After which something hangs: starting two processes takes a slow and busy machine more than a minute."""


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a run has written a file."""
    for _ in range(20 * HANG_SECONDS):
        if path.is_file():
            return
        if process.poll() is not None:
            pytest.fail(
                f"the run ended before its first save: {process.stderr.read().decode() if process.stderr else ''}"
            )
        time.sleep(0.05)
    pytest.fail("the run saved nothing")
