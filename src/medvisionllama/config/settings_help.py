"""Every setting with its default and meaning, for `medvisionllama train --help-settings`."""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from medvisionllama.config.load import load_config


def settings_help(preset: str) -> str:
    """List `key = value` of a preset, each followed by its choices, if it has some, and by what it means."""
    return "\n".join(_lines(load_config(preset), ""))


def _lines(section: BaseModel, prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        if f"{prefix}{name}" == "preset":
            continue  # an option of its own
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += ["", *_lines(value, f"{prefix}{name}.")]
            continue
        choices = " | ".join(_choices(field.annotation))
        lines.append(f"{prefix}{name} = {value}" + f"    ({choices})" * bool(choices))
        if field.description:
            lines.append(f"    {' '.join(field.description.split())}")
    return lines


def _choices(annotation: Any) -> list[str]:
    """Values that a setting may have by name; none where others are allowed too."""
    if get_origin(annotation) is not Literal:
        return []
    return [str(choice) for choice in get_args(annotation)]
