"""Preset, then overrides, then validation; and the same configuration to and from YAML."""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from medvisionllama._files import write_text
from medvisionllama.config.presets import preset_settings
from medvisionllama.config.schema import Config
from medvisionllama.errors import ConfigError

_LEAST_FOR_PLATEAU = 5
"""Validations of a run: a best one, three that stand still, and one that the lower rate leads to."""
_NOTHING = {"", "~", "null", "Null", "NULL"}
# One text of a list and what ends it; a comma within quotes ends nothing.
_ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,]*?)\s*(,|$)""")


def load_config(preset: str = "small", overrides: str | Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Build a configuration from a preset and overrides.

    Args:
        preset: a name of `PRESETS`.
        overrides: `["network.insert=none"]` as on the command line (words and patterns as they are, all else read
            as YAML; several values as `a,b` or `[a,b]`), or a mapping from dotted keys to values. A limit in epochs
            or steps takes the place of the preset's minutes, and of the further networks that share them.

    Raises:
        ConfigError: an unknown preset or key, a value of the wrong type, or values that contradict each other.

    >>> load_config("small", ["network.insert=none", "train.epochs=3"]).network.insert
    'none'
    """
    parsed = limits_as_asked(parse_overrides(overrides))
    if _counts_steps(parsed):
        # Who counts steps compares networks, or trains for a moment; each further one would make all of them again.
        parsed = {"train.members": 1, **parsed}
    config = _validated(
        apply_overrides(preset_settings(preset), parsed), where=f"preset {preset}: ", given=parsed
    )
    # Not asked of a run that is there: it has been trained so.
    if config.train.schedule == "plateau" and config.train.num_validations < _LEAST_FOR_PLATEAU:
        raise ConfigError(
            f"train.schedule=plateau waits for validations that stand still, and train.num_validations={config.train.num_validations} are over before; set at least {_LEAST_FOR_PLATEAU}, rather 12"
        )
    return config


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with dotted keys replaced, each key checked against the schema."""
    result = _copy(settings)
    for key, value in parse_overrides(overrides).items():
        _check_key(key)
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key} cannot be set: {parent} is {section!r}, not a group of settings")
        section[last] = value
    return result


def parse_overrides(overrides: str | Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Bring all forms of overrides to a mapping from dotted keys to values; one text is one setting."""
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        return {key: _plain(value) for key, value in overrides.items()}
    parsed: dict[str, Any] = {}
    for key, value in map(_split_override, overrides):
        # Of others the last one holds; to forget somebody who is to be left out would be a leak.
        if key == "data.exclude" and parsed.get(key, value) != value:
            raise ConfigError(f"{key} is given twice and takes several at once; write --set {key}=a,b")
        parsed[key] = value
    return parsed


def limits_as_asked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Add that minutes are not limited if epochs or steps are and minutes are not spoken of.

    A limit that nobody asked for would cut the run short.
    """
    if not _counts_steps(overrides):
        return dict(overrides)
    return {"train.max_minutes": None, **overrides}


def _counts_steps(overrides: Mapping[str, Any]) -> bool:
    """Whether a run is asked to be limited by epochs or steps."""
    return any(overrides.get(limit) is not None for limit in ("train.epochs", "train.max_steps"))


def write_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, so that the file says what was run."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


ONE_VIEW: Mapping[str, Any] = {"inference.flip": False, "inference.turn": False}
"""Overrides by which a run's networks look at a scan once, as `predict --fast` does."""


def read_config(path: Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a configuration written by `write_config`.

    Raises:
        ConfigError: the file is missing, is not YAML, or has unknown keys or values.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; a run folder made by `medvisionllama train` has one"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not readable YAML: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings")
    parsed = parse_overrides(overrides)
    return _validated(apply_overrides(settings, parsed), where=f"{path}: ", given=parsed)


def _validated(settings: dict[str, Any], *, where: str, given: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = _where_and_why(first["loc"], first["type"], first["msg"])
        shown = "" if isinstance(first["input"], BaseModel | dict) else f" (given: {first['input']!r})"
        # A preset is not to blame for what was set over it.
        set_over = any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in given)
        blamed = "" if set_over else where
        raise ConfigError(f"{blamed}{key}: {message}{shown}") from None


def _where_and_why(place: tuple[int | str, ...], kind: str, message: str) -> tuple[str, str]:
    """Key of a wrong value and what is wrong with it, in our words where pydantic speaks of fields and tuples."""
    if kind == "missing" and isinstance(place[-1], int):
        place, message = place[:-1], "holds too few values; write one for each axis, as 40,56,40"
    return ".".join(map(str, place)) or "settings", message.removeprefix("Value error, ")


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} has no '='; write it as --set section.key=value")
    key = key.strip()
    kind = _known_types(Config).get(key)
    if kind is str:
        return key, value.strip()
    # YAML would make a number of the case 001, a date of 2024-01-05 and a list of the pattern [0-9]{3}.
    if kind == str | None or kind is Path or key == "unlabelled.scans":
        return key, _text_or_none(value)
    if kind == tuple[str, ...]:
        return key, _texts_or_none(text, value)
    if get_origin(kind) is tuple:
        # YAML reads 28:30 as minutes and seconds, here it is a range or a window.
        if not {"'", '"'} & set(value):
            value = re.sub(r"[^\s,\[\]]*:[^\s,\[\]]*", lambda found: repr(found[0]), value)
        if value.strip() and not value.lstrip().startswith(("[", "null", "~")):
            value = f"[{value}]"
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # the latter of 2024-02-30, which YAML takes for a date
        raise ConfigError(f"--set {text!r}: the value is not readable: {_one_line(error)}") from None


def _text_or_none(value: str) -> str | None:
    value = value.strip()
    return None if value in _NOTHING else _unquoted(value)


def _texts_or_none(override: str, value: str) -> list[str] | None:
    """Texts between commas, each as it is; brackets around all of them and quotes around one are taken off."""
    value = value.strip()
    if value in _NOTHING:
        return None
    if value.startswith("["):
        if not value.endswith("]"):
            raise ConfigError(f"--set {override!r}: the value is not readable: a ']' is missing at its end")
        value = value[1:-1].strip()
    items, place = [], 0
    while place < len(value):
        found = _ITEM.match(value, place)
        if found is None or not found[1]:
            raise ConfigError(
                f"--set {override!r}: the value is not readable: write texts as a,b (a comma within one: 'a,b')"
            )
        items.append(_unquoted(found[1]))
        place = found.end()
    return items


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _check_key(key: str) -> None:
    if key == "preset":
        # Over the settings of one preset it would be no more than the name of another.
        raise ConfigError("a preset is no setting among others; choose it by --preset")
    known = list(_known_types(Config))
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"unknown setting {key!r}{hint} (all settings: medvisionllama train --help-settings)"
        )


@cache
def _known_types(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Type of every setting by its dotted key; None beside another type is left out."""
    types: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            types |= _known_types(kind, f"{prefix}{name}.")
        else:
            others = [part for part in get_args(kind) if part is not type(None)]
            optional = get_origin(kind) is UnionType and len(others) == 1
            types[prefix + name] = others[0] if optional and others[0] is not str else kind
    return types


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _copy(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in settings.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
