"""Every setting with its default and meaning, for `medvisionllama train --help-settings`."""

from typing import Any

from pydantic import BaseModel

from medvisionllama.config.load import load_config


def settings_help(preset: str) -> str:
    """List `key = value` of a preset, each followed by what it means where the name does not say it."""
    return "\n".join(_lines(load_config(preset), ""))


def _lines(section: BaseModel, prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += ["", *_lines(value, f"{prefix}{name}.")]
            continue
        lines.append(f"{prefix}{name} = {value}")
        if field.description:
            lines.append(f"    {' '.join(field.description.split())}")
    return lines
