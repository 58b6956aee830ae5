"""Controls: what a frozen layer's weights are replaced with to find out what about them matters.

`random` asks whether training on text matters at all, `moment_matched` whether more than the scale of each tensor
does, `permuted` whether more than its values do. Every tensor draws from its own stream, so a layer's control does
not depend on which others are loaded with it.
"""

import hashlib
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from medvisionllama.types import BlockWeights

WEIGHTS: tuple[BlockWeights, ...] = get_args(BlockWeights)
NEEDS_CHECKPOINT = ("pretrained", "moment_matched", "permuted")


def stream(seed: int, name: str) -> int:
    """Seed of one tensor's own random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def controlled(tensor: Tensor, weights: BlockWeights, *, seed: int, name: str) -> Tensor:
    """Return the tensor as the control wants it, in its own dtype."""
    generator = torch.Generator().manual_seed(stream(seed, name))
    if weights == "moment_matched":
        return moment_matched(tensor, generator)
    if weights == "permuted":
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].view_as(tensor)
    if weights == "pretrained":
        return tensor
    raise ValueError(f"{weights!r} makes nothing out of a checkpoint's tensors")


def moment_matched(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values with exactly the tensor's mean and standard deviation."""
    drawn = torch.randn(tensor.shape, generator=generator)
    if tensor.numel() > 1:
        (mean, deviation), (wanted_mean, wanted_deviation) = _moments(drawn), _moments(tensor.float())
        drawn = (drawn - mean) / max(deviation, torch.finfo(torch.float32).tiny)
        drawn = drawn * wanted_deviation + wanted_mean
    else:
        drawn = tensor.float()
    return drawn.to(tensor.dtype)


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, the same on any number of threads: PyTorch adds large tensors up in one part per
    thread, and the last bits of a sum would change a block's hash."""
    array = values.numpy()
    return float(array.mean(dtype=np.float64)), float(array.std(ddof=1, dtype=np.float64))
