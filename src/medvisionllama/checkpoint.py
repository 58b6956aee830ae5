"""Weights and resume state as safetensors whose header carries the facts: one whole file, never a pickle."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from medvisionllama._files import write_bytes
from medvisionllama.errors import CheckpointError


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that training must not change."""
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts (anything JSON can hold) as one file."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Bytes first: safetensors' own writer hides a full disk's error number.
    write_bytes(path, save(content, metadata={"facts": json.dumps(dict(facts))}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        CheckpointError: missing, damaged, or not written by us (a pickle is refused unopened).
    """
    with _opened(path) as (file, facts):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors, facts


def load_facts(path: Path) -> dict[str, Any]:
    """Read the facts alone, and none of the tensors.

    Raises:
        CheckpointError: as `load_tensors`.
    """
    with _opened(path) as (_, facts):
        pass
    return facts


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and its facts; CheckpointError for what cannot be read of either."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {})["facts"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the run has not saved it yet") from None
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of ours or is damaged ({' '.join(str(error).split())[:100]}); restore it or train again"
        ) from None


@torch.no_grad()
def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Put trainable weights into a module.

    Raises:
        CheckpointError: names or shapes differ, so the file is of another network.
    """
    parameters = trainable(module)
    _same_names(parameters, tensors, where)
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, the network needs {tuple(parameter.shape)}; config.yaml belongs to another run, or this version builds that network otherwise"
            )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _same_names(wanted: Iterable[str], found: Iterable[str], where: Path) -> None:
    different = sorted(set(wanted) ^ set(found))
    if different:
        raise CheckpointError(
            f"{where} does not fit the network of config.yaml (first difference: {different[0]}); restore both from one run, or this version builds that network otherwise"
        )
