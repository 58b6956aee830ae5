"""A matrix: tasks × models × arms × fractions × folds × seeds, as a YAML file and as validated runs.

A *model* is the network around the insert, an *arm* what is compared inside it. A run's id is readable and ends in
a hash of the preset and of every setting that the matrix makes, so it is the same on every machine, and a run whose
settings change gets another id. Nothing here reads a scan.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from medvisionllama._files import canonical_hash
from medvisionllama.config import Config, load_config
from medvisionllama.config.load import apply_overrides, parse_overrides
from medvisionllama.config.presets import preset_settings
from medvisionllama.config.schema import Section, Seed
from medvisionllama.data.splits import NUM_FOLDS
from medvisionllama.errors import ConfigError
from medvisionllama.types import SizeCriterion

Settings = dict[str, Any]
Variant = Literal["block_removed"]

_LIMITS = ("train.epochs", "train.max_steps", "train.max_minutes")
_PLAIN: Settings = {"train.members": 1, "inference.turn": False}
"""What averages is left out: of several networks it would hide what seeds are to show, of several looks it takes
most of the time. A matrix may set it."""
_AXES = {"data.fold", "data.fraction", "train.seed", "data.path", "out"}
WITHOUT_EFFECT = {"train.device", "train.save_seconds"}
"""Settings that change no result, and therefore no id."""


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}", text):
        raise ValueError(f"{text!r} is no name; use up to 40 letters, digits, and _ . + -")
    return text


Name = Annotated[str, AfterValidator(_name)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class TaskSpec(Section):
    data: Path | None = None
    """The dataset's folder, absolute or under the root that the command line names."""
    phantoms: Annotated[int, Field(ge=3, le=10_000)] | None = None
    """So many artificial scans instead of a dataset."""
    set: Settings = Field(default_factory=dict)
    """Settings of every run on it."""

    @model_validator(mode="after")
    def _has_scans(self) -> "TaskSpec":
        if (self.data is None) == (self.phantoms is None):
            raise ValueError(
                "give either data, the dataset's folder, or phantoms, a number of artificial scans"
            )
        return self


class ModelSpec(Section):
    preset: str = "small"
    set: Settings = Field(default_factory=dict)
    """The network around the insert, and how it is trained."""


class MatchSpec(Section):
    arm: str
    """The arm whose size is wanted."""
    by: SizeCriterion
    """Trainable parameters, all parameters, or operations of a forward pass."""
    change: Literal["mlp", "depth"] = "mlp"
    """What is widened or deepened until it fits: an MLP as the insert, or the transformer without an insert."""


class ArmSpec(Section):
    about: str = ""
    """What the arm isolates, in a line; the report shows it."""
    set: Settings = Field(default_factory=dict)
    each: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Settings with several values: one arm for each combination, named arm-value."""
    match: MatchSpec | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Models that have this arm; by default all."""
    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = None
    """Shares at which it is run; by default all of the matrix."""
    also: tuple[Variant, ...] = ()
    """Further evaluations of the same weights: `block_removed` leaves the frozen block out of a trained network."""


class Matrix(Section):
    name: Name
    about: str = ""
    tasks: Annotated[dict[Name, TaskSpec], Field(min_length=1)]
    models: Annotated[dict[Name, ModelSpec], Field(min_length=1)]
    arms: Annotated[dict[Name, ArmSpec], Field(min_length=1)]
    reference: str
    """The arm that all others are compared with."""
    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (1.0,)
    """Shares of the training patients."""
    folds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    split_per_seed: bool = False
    """Each seed draws a test set of its own too, so that small datasets are tested on more patients."""
    set: Settings = Field(default_factory=dict)
    """Settings of every run; models, tasks and arms may set others."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Matrix":
        for axis in ("fractions", "folds", "seeds"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} names {values} twice the same value")
        for name, arm in self.arms.items():
            unknown = sorted(set(arm.models or ()) - set(self.models))
            if unknown:
                raise ValueError(
                    f"arm {name} asks for the model {unknown[0]!r}; models: {', '.join(self.models)}"
                )
            other = sorted(set(arm.fractions or ()) - set(self.fractions))
            if other:
                raise ValueError(f"arm {name} asks for the fraction {other[0]}; fractions: {self.fractions}")
            if arm.match and arm.also:
                raise ValueError(f"arm {name} has no block that `also` could leave out; drop also")
            if arm.match and arm.each:
                raise ValueError(f"arm {name} has both match and each; give one of them")
        names = [arm.name for arm in self.expanded_arms()]
        shown = [
            *names,
            *(variant_name(arm.name, one) for arm in self.expanded_arms() for one in arm.spec.also),
        ]
        twice = sorted({name for name in shown if shown.count(name) > 1})
        if twice:
            raise ValueError(f"two arms are called {twice[0]!r}; rename one")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is no arm; arms: {', '.join(names)}")
        self._check_matches()
        return self

    def _check_matches(self) -> None:
        plain = [arm.name for arm in self.expanded_arms() if arm.spec.match is None]
        for name, arm in self.arms.items():
            if arm.match and arm.match.arm not in plain:
                raise ValueError(
                    f"arm {name} is to match {arm.match.arm!r}, which is no arm of a size of its own; there are: {', '.join(plain)}"
                )

    def expanded_arms(self) -> list["Arm"]:
        """Every arm, those with several values of a setting one by one."""
        return [arm for name, spec in self.arms.items() for arm in _expand(name, spec)]


@dataclass(frozen=True)
class Arm:
    """One arm with one value for each of its settings."""

    name: str
    spec: ArmSpec
    settings: Settings


@dataclass(frozen=True)
class PlannedRun:
    """One training of the matrix. `settings` are dotted overrides of the preset."""

    run_id: str
    task: str
    model: str
    arm: str
    fraction: float
    fold: int
    seed: int
    preset: str
    settings: Settings
    match: MatchSpec | None
    match_settings: Settings | None
    """Settings of the arm to be matched."""
    also: tuple[Variant, ...]
    scans: TaskSpec

    def config(self, *, data: Path, out: Path | None = None, more: Mapping[str, Any] | None = None) -> Config:
        """The whole configuration; a matched arm's own size comes as `more`.

        Without what averages, unless the matrix says otherwise; see `_PLAIN`.
        """
        places: Settings = {"data.path": data} if out is None else {"data.path": data, "out": out}
        return load_config(self.preset, {**_PLAIN, **self.settings, **(more or {}), **places})


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which no key stands twice: of two arms of one name, the first would silently be none.

    Layers `28:30` are text, as on the command line, and not 1710, as YAML 1.1 counts to the base of 60.
    """

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} stands here a second time", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _text_if_sixties(loader: _EachKeyOnce, node: yaml.ScalarNode) -> Any:
    if ":" in node.value:
        return node.value
    return loader.construct_yaml_int(node)


_EachKeyOnce.add_constructor("tag:yaml.org,2002:int", _text_if_sixties)


def read_matrix(path: Path) -> Matrix:
    """Read and check a matrix file.

    Raises:
        ConfigError: missing, no YAML, unknown keys, or values that do not fit each other.
    """
    try:
        content = _EachKeyOnce(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give a matrix file, as configs/matrix/smoke.yaml"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give a matrix file, as configs/matrix/smoke.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no matrix; it needs at least name, tasks, arms and reference")
    try:
        return Matrix.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{message}") from None


def expand(matrix: Matrix) -> list[PlannedRun]:
    """Name every run, seed by seed, so that stopping early leaves whole repetitions.

    Raises:
        ConfigError: a setting that does not exist or does not fit the others, with the arm that has it.
    """
    cells = list(_cells(matrix))
    return [
        cell.run(fraction, fold, seed)
        for seed in matrix.seeds
        for fold in matrix.folds
        for fraction in matrix.fractions
        for cell in cells
        if cell.arm.spec.fractions is None or fraction in cell.arm.spec.fractions
    ]


@dataclass(frozen=True)
class _Cell:
    """Task, model and arm: what is checked once however many fractions, folds and seeds there are."""

    matrix: Matrix
    task: str
    model: str
    arm: Arm
    settings: Settings
    match_settings: Settings | None
    hashed: str

    def run(self, fraction: float, fold: int, seed: int) -> PlannedRun:
        place: Settings = {"data.fraction": fraction, "data.fold": fold, "train.seed": seed}
        if self.matrix.split_per_seed:
            place["data.split_seed"] = seed
        digest = canonical_hash([self.hashed, place])[:8]
        number = self.settings.get("data.num_cases")
        share = f"{100 * fraction:g}pc" if number is None else f"{number}cases"
        task = self.matrix.tasks[self.task]
        return PlannedRun(
            f"{self.task}-{self.model}-{self.arm.name}-{share}-f{fold}-s{seed}-{digest}",
            self.task,
            self.model,
            self.arm.name,
            fraction,
            fold,
            seed,
            self.matrix.models[self.model].preset,
            {**self.settings, **place},
            self.arm.spec.match,
            None if self.match_settings is None else {**self.match_settings, **place},
            self.arm.spec.also,
            task,
        )


def _cells(matrix: Matrix) -> Iterator[_Cell]:
    arms = matrix.expanded_arms()
    by_name = {arm.name: arm for arm in arms}
    for task in matrix.tasks:
        for model in matrix.models:
            trained: dict[str, str] = {}
            for arm in arms:
                if arm.spec.models is not None and model not in arm.spec.models:
                    continue
                where = f"matrix {matrix.name}, task {task}, model {model}, arm {arm.name}"
                settings, config = _settings(matrix, task, model, arm, where)
                if (
                    arm.spec.match is None
                    and (same := trained.setdefault(_effect(config), arm.name)) != arm.name
                ):
                    raise ConfigError(
                        f"{where}: the same training as the arm {same}, since what it sets has no effect here; leave it out, or name in `models` those in which it has"
                    )
                target = None
                if arm.spec.match:
                    target, _ = _settings(matrix, task, model, by_name[arm.spec.match.arm], where)
                identity = [
                    apply_overrides(_without_plain(matrix.models[model].preset), _lasting(settings)),
                    str(matrix.tasks[task].data or f"{matrix.tasks[task].phantoms} phantoms"),
                    None if arm.spec.match is None else [arm.spec.match.model_dump(), _lasting(target or {})],
                ]
                yield _Cell(matrix, task, model, arm, settings, target, canonical_hash(identity))


def _without_plain(preset: str) -> Settings:
    """A preset's settings but for those of `_PLAIN`, which a run's id does not depend on."""
    kept: Settings = {}
    for section, values in preset_settings(preset).items():
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if f"{section}.{key}" not in _PLAIN}
        if values != {}:
            kept[section] = values
    return kept


def _effect(config: Config) -> str:
    """A hash that two arms share if they are one training."""
    settings = config.model_dump(mode="json")
    if not config.network.has_block:
        del settings["network"]["block"]
    return canonical_hash(settings)


def _settings(matrix: Matrix, task: str, model: str, arm: Arm, where: str) -> tuple[Settings, Config]:
    """Merge what all runs, the model, the task and the arm set, the later over the earlier; and check it."""
    settings: Settings = {}
    for part in (matrix.set, matrix.models[model].set, matrix.tasks[task].set, arm.settings):
        settings |= parse_overrides(part)
    taken = sorted(_AXES & set(settings))
    if taken:
        raise ConfigError(f"{where}: {taken[0]} is an axis of the matrix; leave it out of 'set'")
    if "data.num_cases" in arm.settings:
        raise ConfigError(
            f"{where}: arms are compared on equal training cases; give data.num_cases to the matrix or a task"
        )
    if any(key in settings for key in _LIMITS):
        # A limit that the matrix did not ask for would cut its runs short.
        settings = {**dict.fromkeys(_LIMITS), **settings}
    try:
        config = load_config(matrix.models[model].preset, settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    _check_runnable(matrix, arm, settings, config, where)
    return settings, config


def _check_runnable(matrix: Matrix, arm: Arm, settings: Settings, config: Config, where: str) -> None:
    """Refuse what only a run would find out, after hours."""
    if arm.spec.also and not config.network.has_block:
        raise ConfigError(
            f"{where}: there is no block that `also` could leave out; drop also, or name in `models` those that have one"
        )
    if matrix.split_per_seed and (config.data.splits or "data.split_seed" in settings):
        raise ConfigError(
            f"{where}: split_per_seed draws the splits; leave data.splits and data.split_seed out"
        )
    fractions = arm.spec.fractions or matrix.fractions
    number = config.data.num_cases
    if number is not None and fractions != (1.0,):
        raise ConfigError(
            f"{where}: data.num_cases={number} and fractions {fractions} both say how much trains; give one of them"
        )
    if config.unlabelled.scans == "unused" and number is None and max(fractions) == 1.0:
        raise ConfigError(
            f"{where}: of all training cases none is left for unlabelled.scans=unused; give the arm `fractions` below 1, or the task data.num_cases"
        )
    if config.data.splits is None and max(matrix.folds) >= NUM_FOLDS:
        raise ConfigError(f"{where}: fold {max(matrix.folds)} does not exist; folds are 0 to {NUM_FOLDS - 1}")


def _lasting(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}


def variant_name(arm: str, variant: str) -> str:
    """Name under which a further evaluation of an arm's weights stands in the tables."""
    return f"{arm}-{variant.replace('_', '-')}"


def _expand(name: str, spec: ArmSpec) -> Iterator[Arm]:
    combinations: list[tuple[str, Settings]] = [(name, dict(spec.set))]
    for key, values in spec.each.items():
        combinations = [
            (f"{made}-{_short(value)}", {**settings, key: value})
            for made, settings in combinations
            for value in values
        ]
    return (Arm(made, spec, settings) for made, settings in combinations)


def _short(value: Any) -> str:
    """A value as part of a name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]", "", text) or "empty"
