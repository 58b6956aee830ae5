"""What the documents tell people to type exists: commands, options, settings, functions, scripts and links."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

import medvisionllama
from medvisionllama.cli.main import app
from medvisionllama.config import Config, load_config
from medvisionllama.config.load import apply_overrides
from medvisionllama.config.schema import Section
from medvisionllama.errors import ConfigError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
SECTIONS = "|".join(name for name, field in Config.model_fields.items() if isinstance(field.default, Section))
# A setting by itself or with its value, and no name of a file, as `train.py`.
SETTING = re.compile(rf"((?:{SECTIONS})\.[a-z_.]+)(?<!\.py)(?<!\.json)(?<!\.yaml)(?:=.*)?")
# Options that `main` takes wherever they stand, and those that end a command before it is looked at.
ANYWHERE = {"--debug", "--offline", "--help", "--version"}
# Typer brings its own click or takes the one that is installed, as its version is.
UsageError = typer.BadParameter.__mro__[1]

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)


def fences(text: str, *, python: bool) -> list[str]:
    """Blocks of code."""
    return [found["text"] for found in FENCE.finditer(text) if (found["language"] == "python") == python]


def spans(text: str) -> list[str]:
    """Code within a line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of ours, in a block of code or within a line."""
    blocks = [
        line for block in fences(text, python=False) for line in block.replace("\\\n", " ").splitlines()
    ]
    for line in [*blocks, *spans(text)]:
        # However it is started: by name, by path, by a launcher.
        if found := re.search(r"(?:^|\.venv/bin/|-m )medvisionllama (.+)", line.partition(" #")[0].strip()):
            yield shlex.split(found[1])


def settings(text: str) -> set[str]:
    """The settings that are named within a line, with or without a value."""
    bare = {found[1] for span in spans(text) if (found := SETTING.fullmatch(span))}
    return bare | {key for span in spans(text) for key in re.findall(r"--set ([a-z_]+\.[a-z_.]+)=", span)}


def wrong_in_command(words: list[str]) -> str:
    """What the command line would refuse, found without running it; a verb by itself needs no arguments."""
    command = typer.main.get_command(app)
    rest = [word for word in words if word not in ANYWHERE]
    while rest and hasattr(command, "commands"):
        if rest[0] not in command.commands:
            return f"no such command: {rest[0]}"
        command = command.commands[rest.pop(0)]
    if not rest:
        return ""
    try:
        given = command.make_context(command.name, rest).params
        load_config(given.get("preset") or "small", given.get("set_") or [])
    except (UsageError, ConfigError) as error:
        return str(error)
    return ""


def wrong_in_python(source: str) -> list[str]:
    """Names of ours that are not there."""
    tree = ast.parse(source)
    ours: dict[str, object] = {}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if is_ours(name.name):
                    whole = import_module(name.name)
                    ours |= {name.asname: whole} if name.asname else {"medvisionllama": medvisionllama}
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                module = import_module(node.module)
                if hasattr(module, name.name):
                    ours[name.asname or name.name] = getattr(module, name.name)
                elif find_spec(full):
                    ours[name.asname or name.name] = import_module(full)
                else:
                    wrong.append(full)
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
    ]
    return wrong + [f"{name}.{attribute}" for name, attribute in used if not hasattr(ours[name], attribute)]


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "medvisionllama"


@each_document
def test_commands_have_verbs_options_and_settings_that_exist(path):
    problems = {shlex.join(words): wrong_in_command(words) for words in commands(path.read_text())}
    assert {words: problem for words, problem in problems.items() if problem} == {}


@each_document
def test_settings_that_are_named_exist(path):
    for key in settings(path.read_text()):
        apply_overrides({}, {key: None})


@each_document
def test_python_takes_names_that_exist(path):
    assert [
        name for source in fences(path.read_text(), python=True) for name in wrong_in_python(source)
    ] == []


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "benchmarks/README.md"], ids=lambda path: path.parent.name + "-" + path.stem
)
def test_benchmarks_that_are_named_are_there(path):
    text = path.read_text()
    named = set(re.findall(r"benchmarks/(\w+\.py)", text))
    if path.parent.name == "benchmarks":
        named |= set(re.findall(r"`(\w+\.py)`", text))
    assert [name for name in sorted(named) if not (ROOT / "benchmarks" / name).is_file()] == []


@each_document
def test_links_lead_to_files_that_are_there(path):
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("medvisionllama trian DATA --out runs/x", "trian"),
        (".venv/bin/medvisionllama data chekc DATA", "chekc"),
        ("medvisionllama train DATA --epocs 3 --out runs/x   # a remark", "--epocs"),
        ("torchrun --standalone -m medvisionllama train DATA \\\n  --fold", "--fold"),
        ("medvisionllama predict runs/hip", "Missing"),
        ("medvisionllama evaluate runs/hip --split tset", "tset"),
        ("medvisionllama train DATA --set network.widht=3 --out runs/x", "network.width"),
        ("medvisionllama train DATA --set network.insert=nothing --out runs/x", "network.insert"),
    ],
)
def test_a_wrong_command_is_seen(line, problem):
    [words] = commands(f"Do this:\n\n```\n{line}\n```\n")
    assert problem in wrong_in_command(words)


def test_commands_and_settings_within_a_line_are_seen():
    text = "Try `medvisionllama llm\npush NAME`, `--set data.modalty=CT`, `train.members` or `data.strides=2,2,2`.\n"
    [words] = commands(text)
    assert "push" in wrong_in_command(words)
    assert settings(text + "Not `train.py`, `plan.json`, nor `best`.") == {
        "data.modalty",
        "train.members",
        "data.strides",
    }
    with pytest.raises(ConfigError, match=r"data\.modality"):
        apply_overrides({}, {"data.modalty": None})


def test_names_that_are_gone_are_seen():
    source = (
        "import medvisionllama\n"
        "from medvisionllama import Predictor, Predicter, experiments\n"
        "medvisionllama.chek('data')\n"
        "Predictor.from_runs('run')\n"
        "experiments.status('experiment')\n"
    )
    assert wrong_in_python(source) == [
        "medvisionllama.Predicter",
        "medvisionllama.chek",
        "Predictor.from_runs",
    ]
