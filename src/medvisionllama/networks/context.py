"""Convolutions at the stem's last stride and below it: sight of the whole crop, from few cases.

A stem down to stride 4 takes bright tissue anywhere for the organ. Attention could tell the places apart, but must
learn from the scans what a convolution brings along: a heart further to the left is a heart. Tokens lie at the
bottom, where they are few.
"""

import math

import torch
from torch import Tensor, nn

from medvisionllama.networks.layers import ConvBlock, Rise
from medvisionllama.networks.vit import grid_after
from medvisionllama.types import Triple

_HALVED_FROM = 8
"""An axis of at least so many cells is halved once more."""


class ContextDown(nn.Module):
    """The two deepest stages of a U-Net, on their way down.

    Args:
        num_in: channels of what comes in, at the stem's last stride.
        channels: of the upper stage and of the lower.
        stride: from there to the upper stage.
        grid: cells of the upper stage along x, y, z.
    """

    def __init__(self, num_in: int, channels: tuple[int, int], *, stride: Triple, grid: Triple) -> None:
        super().__init__()
        upper, lower = channels
        kernel = _kernel(grid)
        self.upper = nn.Sequential(
            ConvBlock(num_in, upper, stride=stride, kernel=kernel), ConvBlock(upper, upper, kernel=kernel)
        )
        self.lower = nn.Sequential(
            ConvBlock(upper, lower, stride=halving(grid), kernel=kernel),
            ConvBlock(lower, lower, kernel=kernel),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, num_in, x, y, z]` to the upper and the lower stage."""
        upper = self.upper(features)
        return upper, self.lower(upper)


class ContextUp(nn.Module):
    """And on their way up."""

    def __init__(self, channels: tuple[int, int], *, grid: Triple) -> None:
        super().__init__()
        upper, lower = channels
        coarser = halving(grid)
        self.rise = Rise(lower, upper, coarser)
        self.join = ConvBlock(2 * upper, upper, kernel=_kernel(grid))

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        """Both stages to one, of the upper's shape."""
        x, y, z = upper.shape[2:]
        # An odd axis comes back one longer.
        risen = self.rise(lower)[..., :x, :y, :z]
        return self.join(torch.cat([risen, upper], dim=1))


def halving(grid: Triple) -> Triple:
    """Stride from the upper stage to the lower."""
    x, y, z = (2 if size >= _HALVED_FROM else 1 for size in grid)
    return (x, y, z)


def has_context(grid: Triple) -> bool:
    """Whether there is anything around a cell: of one alone, an instance norm has nothing to scale."""
    return math.prod(grid_after(grid, halving(grid))) > 1


def _kernel(grid: Triple) -> Triple:
    x, y, z = (3 if size > 1 else 1 for size in grid)
    return (x, y, z)
