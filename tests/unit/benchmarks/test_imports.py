"""Benchmarks run rarely: what they take from the package must not go away unseen."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[3] / "benchmarks").glob("*.py"))


def taken(source: str) -> list[tuple[str, str]]:
    """Module and name of each `from medvisionllama... import ...`, in scripts that are kept as a text too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("medvisionllama"):
            found += [(node.module, name.name) for name in node.names]
        elif isinstance(node, ast.Constant) and "\nfrom medvisionllama" in str(node.value):
            found += taken(node.value)
    return found


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_the_package_is_there(path):
    for module, name in taken(path.read_text()):
        found = hasattr(importlib.import_module(module), name)
        assert found or importlib.util.find_spec(f"{module}.{name}"), f"{path.name}: {module}.{name}"


@pytest.mark.parametrize(
    "source",
    [
        "def main():\n    from medvisionllama.devices import channels_last\n",
        'SCRIPT = """\nfrom medvisionllama.devices import channels_last\n"""\n',
    ],
)
def test_a_name_that_is_gone_is_seen(source):
    ((module, name),) = taken(source)
    assert not hasattr(importlib.import_module(module), name)


def test_the_script_that_times_our_preprocessing_is_looked_at():
    [path] = [path for path in BENCHMARKS if path.stem == "io_preprocess"]
    assert ("medvisionllama.data.cache", "build_cache") in taken(path.read_text())
