"""Benchmarks are scripts beside the package; tests import them by name."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of benchmarks/ as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    return importlib.import_module


@pytest.fixture
def slim() -> dict[str, Any]:
    """Settings of a network that trains in a moment."""
    return {
        "network.stem_channels": [4, 6, 8],
        "network.context_channels": None,
        "network.tokens": False,
        "train.device": "cpu",
        "train.num_validations": 1,
    }
