"""A layer's tensors from a local folder, reading only what is asked for.

A source answers two questions: what is the model's configuration, and what are the tensors of some layers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from medvisionllama.errors import BlockError
from medvisionllama.llm.families import Family, family_of


@dataclass(frozen=True)
class LayerTensors:
    """Tensors by their name inside one layer, for each layer asked for, and those of the model's last norm."""

    layers: tuple[dict[str, Tensor], ...]
    norm: dict[str, Tensor]


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        BlockError: missing, not JSON, or without a model_type.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise BlockError(
            f"{folder} has no config.json; give the folder of a Hugging Face checkpoint"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BlockError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise BlockError(f"{path} has no model_type; give the folder of a Hugging Face checkpoint")
    return settings


def resolve_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Turn negative numbers into positions from the front.

    >>> resolve_layers((-1, 3), 30)
    (29, 3)
    """
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise BlockError(f"layer {layer} does not exist; the model has layers 0 to {num_layers - 1}")
    return tuple(layer % num_layers for layer in layers)


def read_folder(folder: Path, layers: Sequence[int], *, family: Family | None = None) -> LayerTensors:
    """Read some layers and the last norm from single or sharded safetensors; other tensors are not touched.

    Args:
        layers: positions from the front.

    Raises:
        BlockError: no safetensors there, a damaged file, or a tensor missing from the index.
    """
    family = family or family_of(read_model_config(folder)["model_type"])
    home = _homes(folder)
    wanted = [family.layer_prefix.format(i=layer) for layer in layers]
    result = LayerTensors(
        tuple(_read(folder, home, prefix) for prefix in wanted), _read(folder, home, family.norm_prefix)
    )
    for prefix, tensors in zip(wanted, result.layers, strict=True):
        if not tensors:
            raise BlockError(
                f"{folder} holds no tensor named {prefix}*; check that config.json belongs to these weights"
            )
    return result


def _homes(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            homes = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise BlockError(f"{index} is damaged; download it again") from None
        if not homes or not all(isinstance(name, str) for name in homes.values()):
            raise BlockError(f"{index} is damaged; download it again")
        for name in set(homes.values()):
            if Path(name).name != name:
                raise BlockError(
                    f"{index} names the file {name!r} outside its folder; download the checkpoint again"
                )
        return homes
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next(folder.glob("*.bin"), None)
        hint = (
            f"; {pickled.name} is a pickle, which is never opened: convert it to safetensors"
            if pickled
            else ""
        )
        raise BlockError(f"{folder} holds no .safetensors file{hint}")
    return {key: path.name for path in files for key in _keys(path)}


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _read(folder: Path, homes: dict[str, str], prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    names = [name for name in homes if name.startswith(prefix)]
    for file_name in sorted({homes[name] for name in names}):
        path = folder / file_name
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if homes[name] == file_name:
                        tensors[name.removeprefix(prefix)] = file.get_tensor(name)
        except FileNotFoundError:
            raise BlockError(
                f"{path} is named by the checkpoint's index but absent; download it again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    return tensors


def _damaged(path: Path, error: Exception) -> BlockError:
    return BlockError(
        f"{path} is damaged or truncated ({' '.join(str(error).split())[:100]}); download it again"
    )
