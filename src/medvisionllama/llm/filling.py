"""From tensors to layers: build them without memory, then put each tensor where it belongs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvisionllama.errors import BlockError
from medvisionllama.llm.controls import controlled, stream
from medvisionllama.llm.families import Family
from medvisionllama.llm.sources import LayerTensors, Source
from medvisionllama.types import BlockWeights

Layers = tuple[nn.ModuleList, nn.Module | None]


def empty_layers(family: Family, config: Any, positions: Sequence[int]) -> Layers:
    """Build layers and last norm on the meta device, where they have shapes but no memory."""
    with torch.device("meta"):
        layers = nn.ModuleList(family.make_layer(config, position) for position in positions)
        return layers, family.make_norm(config)


def filled_layers(
    source: Source,
    family: Family,
    config: Any,
    positions: Sequence[int],
    *,
    weights: BlockWeights,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Layers:
    """Build layers around a checkpoint's tensors, each changed as a control asks.

    Raises:
        BlockError: a tensor is missing or has another shape than the configuration implies.
    """
    layers, norm = empty_layers(family, config, positions)
    tensors = read_checked(source, family, (layers, norm), positions, where=source.name, dtype=dtype)
    for label, module, held in _parts(tensors, (layers, norm), positions):
        # Popping lets each tensor go as soon as its changed copy exists.
        content = {
            name: controlled(held.pop(name), weights, seed=seed, name=f"{label}/{name}").to(device, dtype)
            for name, _ in list(module.named_parameters())
        }
        module.load_state_dict(content, strict=False, assign=True)
    return layers, norm


def initialised_layers(
    family: Family,
    config: Any,
    positions: Sequence[int],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Layers:
    """Build layers as a model of the family starts its training."""
    layers, norm = empty_layers(family, config, positions)
    for position, module in [*zip(positions, layers, strict=True), (-1, norm)]:
        if module is None:
            continue
        module.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            # Of this generator alone: `torch.manual_seed` would leave a GPU's at the same place for every seed.
            torch.default_generator.manual_seed(stream(seed, str(position)))
            family.initialise(module, config)
        module.to(device, dtype)
    return layers, norm


def read_checked(
    source: Source,
    family: Family,
    expected: Layers,
    positions: Sequence[int],
    *,
    where: str,
    dtype: torch.dtype | None = None,
) -> LayerTensors:
    """Read the tensors of `expected`, and no others.

    Args:
        where: the source's name, for messages.

    Raises:
        BlockError: a tensor is missing or has another shape than the configuration implies.
    """
    wanted = {name for layer in expected[0] for name, _ in layer.named_parameters()}
    tensors = source.layer_tensors(positions, family, dtype=dtype, wanted=wanted)
    for label, module, held in _parts(tensors, expected, positions):
        _check(module, held, f"{where}, {label}")
    return tensors


def _parts(
    tensors: LayerTensors, expected: Layers, positions: Sequence[int]
) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    layers, norm = expected
    parts: list[tuple[str, nn.Module, dict[str, Tensor]]] = [
        (f"layer {p}", layer, held) for p, layer, held in zip(positions, layers, tensors.layers, strict=True)
    ]
    return parts if norm is None else [*parts, ("the last norm", norm, tensors.norm)]


def _check(module: nn.Module, held: Mapping[str, Tensor], where: str) -> None:
    for name, parameter in module.named_parameters():
        if name not in held:
            raise BlockError(
                f"{where}: the checkpoint lacks {name}; check that config.json belongs to these weights"
            )
        if held[name].shape != parameter.shape:
            raise BlockError(
                f"{where}: {name} has shape {tuple(held[name].shape)}, config.json implies {tuple(parameter.shape)}; they do not belong together"
            )
