"""Optimiser, learning rate as a function of progress, and averaged weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medvisionllama.checkpoint import trainable
from medvisionllama.config import TrainConfig
from medvisionllama.errors import CheckpointError
from medvisionllama.training.muon import Muon, is_orthogonal, kernels_before_norms

PLATEAU_PATIENCE = 3
PLATEAU_FACTOR = 0.5
_KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the run's optimiser over trainable weights only; vectors (norms, biases, gates) do not decay."""
    kernels: list[nn.Parameter] = []
    turned: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    before_norms = kernels_before_norms(network)
    for name, parameter in trainable(network).items():
        if name.endswith(".gate"):
            gates.append(parameter)
        elif parameter.ndim < 2:
            vectors.append(parameter)
        elif config.optimizer == "muon" and is_orthogonal(parameter):
            (turned if parameter in before_norms else kernels).append(parameter)
        else:
            matrices.append(parameter)
    decay, gate_scale = config.weight_decay, config.gate_learning_rate_scale
    groups = [
        {"params": turned, "weight_decay": 0.0, "scale": 1.0, "orthogonal": True, "turns": True},
        {"params": kernels, "weight_decay": decay, "scale": 1.0, "orthogonal": True, "turns": False},
        {"params": matrices, "weight_decay": decay, "scale": 1.0, "orthogonal": False},
        {"params": vectors, "weight_decay": 0.0, "scale": 1.0, "orthogonal": False},
        {"params": gates, "weight_decay": 0.0, "scale": gate_scale, "orthogonal": False},
    ]
    groups = [group for group in groups if group["params"]]
    return _KINDS[config.optimizer](groups, lr=config.learning_rate, fused=True)


def learning_rate(config: TrainConfig, *, progress: float, step: int, plateau_drops: int = 0) -> float:
    """Rate of a step.

    Args:
        progress: share of the run that is over, 0 to 1.
        plateau_drops: how often validation has stopped improving so far.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1 - min(max(progress, 0.0), 1.0)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
        "polynomial": left**0.9,
        "plateau": PLATEAU_FACTOR**plateau_drops,
        "constant": 1.0,
    }[config.schedule]
    return config.learning_rate * warmup * factor


def plateau_drops(dices: list[float]) -> int:
    """How often the best validation Dice has stood still for `PLATEAU_PATIENCE` validations.

    >>> plateau_drops([0.5, 0.6, 0.6, 0.6, 0.6])
    1
    """
    best, waited, drops = -math.inf, 0, 0
    for dice in dices:
        if dice > best:
            best, waited = dice, 0
            continue
        waited += 1
        if waited == PLATEAU_PATIENCE:
            drops, waited = drops + 1, 0
    return drops


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


class AveragedWeights:
    """Exponential moving average of the trainable weights; the frozen block has no second copy."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights; early steps move faster, or the random start would linger."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and current weights; calling it again undoes it."""
        for name, parameter in self.parameters.items():
            current = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(current)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state by parameter name."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}::{key}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`.

    Raises:
        CheckpointError: saved by an optimiser that treats a weight otherwise, as an earlier version's may.
    """
    for full, value in tensors.items():
        name, _, key = full.rpartition("::")
        parameter = parameters[name]
        # Fused kernels walk memory, not indices: each moment needs its weight's layout, and the step its device.
        like = parameter.detach() if value.ndim else parameter.detach().new_empty((), dtype=value.dtype)
        optimizer.state[parameter][key] = torch.empty_like(like).copy_(value)
    for group in optimizer.param_groups:
        key = "momentum" if group["orthogonal"] else "exp_avg"
        states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
        if any(state and key not in state for state in states):
            raise CheckpointError(
                "the run's save is of an earlier version, whose optimiser treats some weights otherwise, so it cannot go on; start a new run (its best weights predict as before)"
            )
