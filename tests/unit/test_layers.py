"""Imports run downwards: DESIGN, section 4. A new module of the package gets its row here."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

import medvisionllama
from medvisionllama import experiments

SOURCE = Path(medvisionllama.__file__).parent
LAYERS = (
    # Each row may import from its own groups and from the rows above; groups of a row do not know each other.
    {
        "types",
        "errors",
        "_files",
        "_http",
        "_machine",
        "_optional",
        "progress",
        "attention",
        "autocast",
        "colours",
    },
    {"devices"},
    {"config"},
    {"run_dir", "checkpoint"},
    {
        "data",
        "llm",
        "evaluation.metrics",
        "evaluation.statistics",
        "evaluation.pointing",
        "evaluation.calibration",
    },
    {"networks"},
    {"inference"},
    {"training"},
    {"evaluation.masks"},
    {"evaluation.evaluate"},
    {
        "evaluation.repetitions",
        "evaluation.explain",
        "evaluation.cleaning",
        "evaluation.members",
        "evaluation.calibrate",
    },
    {"evaluation.evaluate_run"},
    {"evaluation.comparison"},
    {"reports"},
    {"experiments"},
    {"api"},
    {"cli"},
    {"__main__"},
)
ROOTS = {path.stem for path in SOURCE.glob("*.py")} | {
    path.name for path in SOURCE.iterdir() if path.is_dir()
}
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def _name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path):
    """Names inside the package that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively in line {node.lineno}"
            modules = [node.module]
            if node.module == "medvisionllama" or (SOURCE.parent / node.module.replace(".", "/")).is_dir():
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.partition(".")[2] for name in modules if name.partition(".")[0] == "medvisionllama"}
    return {name for name in found if name.partition(".")[0] in ROOTS}


def _place(name):
    """Row and group of a module, or of a name inside one."""
    for row, groups in enumerate(LAYERS):
        for group in groups:
            if name == group or name.startswith(group + "."):
                return row, group
    pytest.fail(f"{name} has no layer; add it to LAYERS")


def test_every_layer_is_a_module_or_package_that_exists():
    names = {_name(path) for path in MODULES}
    assert [name for row in LAYERS for name in sorted(row) if name not in names] == []


@pytest.mark.parametrize("path", [path for path in MODULES if _name(path) != "evaluation"], ids=_name)
def test_imports_run_downwards(path):
    row, group = _place(_name(path))
    for name in _imports(path):
        target_row, target = _place(name)
        base = row == target_row == 0
        assert target_row < row or target == group or base, f"{_name(path)} imports {name}"


@pytest.mark.parametrize("package", ["networks", "llm"])
def test_networks_and_blocks_know_no_data_training_or_command_line(package):
    forbidden = {"data", "training", "inference", "evaluation", "cli", "api", "run_dir"}
    for path in (SOURCE / package).glob("*.py"):
        assert not {name.partition(".")[0] for name in _imports(path)} & forbidden, path


@pytest.mark.parametrize("package", ["networks", "llm"])
def test_only_the_factory_unpacks_the_configuration(package):
    users = [
        path.name
        for path in (SOURCE / package).glob("*.py")
        if any(name.partition(".")[0] == "config" for name in _imports(path))
    ]
    assert users == (["factory.py"] if package == "networks" else [])


def test_the_checker_finds_imports_of_every_kind(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\n"
        "import medvisionllama.config\n"
        "from medvisionllama import checkpoint\n"
        "from medvisionllama.errors import DataError\n"
        "def f():\n"
        "    from medvisionllama.data import folder\n"
    )
    assert _imports(path) == {"config", "checkpoint", "errors", "data.folder"}


@pytest.mark.parametrize("package", [medvisionllama, experiments], ids=lambda package: package.__name__)
def test_nothing_that_is_offered_is_called_like_a_module(package):
    """Importing such a module would put it in the place of what is offered."""
    assert [name for name in package.__all__ if find_spec(f"{package.__name__}.{name}")] == []
