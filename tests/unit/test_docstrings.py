"""Every example in a docstring does what it shows."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import medvisionllama

ROOT = Path(medvisionllama.__file__).parent
MODULES = sorted(
    ".".join(("medvisionllama", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if any(">>>" in line and "+SKIP" not in line for line in path.read_text().splitlines())
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 0


def test_there_are_examples():
    assert len(MODULES) >= 6
