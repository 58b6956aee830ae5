"""A tiny dataset, a tiny network, and the command line as a function."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from medvisionllama.data.phantom import write_phantoms

TINY = {
    "network.stem_channels": [4, 6, 8],
    "network.width": 24,
    "network.depth": 2,
    "network.insert_after": 1,
    "network.num_heads": 2,
    "network.block.weights": "random",
    "train.num_validations": 3,
    "train.device": "cpu",
}


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_cases=8, shape=(20, 24, 16))


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
