"""Frozen matrices stored as 8-bit integers: a quarter of float32's memory, half of bfloat16's.

Each row keeps its largest magnitude as a scale, and products run in the activations' precision, so only storage
shrinks: the integers are widened for one product at a time, in the backward pass too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvisionllama.autocast import autocast_dtype


class _Int8Product(torch.autograd.Function):
    """`x @ weight.T` whose backward pass widens the integers again instead of keeping them wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None


class Int8Linear(nn.Module):
    """A frozen linear layer; `weight` is int8 `[out, in]`, `scale` `[out]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        largest = weight.float().abs().amax(dim=1)
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        integers = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device.type) or x.dtype
        product = _Int8Product.apply(x.to(dtype), self.weight) * self.scale.to(dtype)
        return product if self.bias is None else product + self.bias.to(dtype)


def store_as_int8(module: nn.Module) -> None:
    """Replace every linear layer inside `module` that is not trained, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_children():
        if isinstance(child, nn.Linear | Conv1D) and not child.weight.requires_grad:
            # GPT-2's Conv1D is a linear layer whose matrix lies the other way.
            weight = child.weight.t() if isinstance(child, Conv1D) else child.weight
            setattr(module, name, Int8Linear(weight.detach(), child.bias))
        else:
            store_as_int8(child)
