"""Convolutions at the tokens' stride and at a coarser one: sight of the whole crop, from few cases.

A stem down to stride 4 takes bright tissue anywhere for the organ. Attention could tell the places apart, but must
learn from the scans what a convolution brings along: a heart further to the left is a heart.
"""

import math

import torch
from torch import Tensor, nn

from medvisionllama.networks.layers import ConvBlock
from medvisionllama.types import Triple

_HALVED_FROM = 8
"""An axis of at least so many tokens is halved once more."""


class Context(nn.Module):
    """The two deepest stages of a U-Net.

    Args:
        num_in: channels of what comes in, at the stem's last stride.
        channels: at the tokens' stride, and below it.
        stride: from there to the tokens.
        grid: number of tokens along x, y, z.
    """

    def __init__(self, num_in: int, channels: tuple[int, int], *, stride: Triple, grid: Triple) -> None:
        super().__init__()
        upper, lower = channels
        coarser, kernel = _halving(grid), _kernel(grid)
        self.enter = nn.Sequential(
            ConvBlock(num_in, upper, stride=stride, kernel=kernel), ConvBlock(upper, upper, kernel=kernel)
        )
        self.down = nn.Sequential(
            ConvBlock(upper, lower, stride=coarser, kernel=kernel), ConvBlock(lower, lower, kernel=kernel)
        )
        self.up = nn.ConvTranspose3d(lower, upper, coarser, stride=coarser)
        self.join = ConvBlock(2 * upper, upper, kernel=kernel)

    def forward(self, features: Tensor) -> Tensor:
        """`[b, num_in, x, y, z]` at the stem's last stride to `[b, channels[0], ...]` at the tokens'."""
        upper = self.enter(features)
        x, y, z = upper.shape[2:]
        # An odd axis comes back one longer.
        risen = self.up(self.down(upper))[..., :x, :y, :z]
        return self.join(torch.cat([risen, upper], dim=1))


def has_context(grid: Triple) -> bool:
    """Whether there is anything around a token: of one alone, an instance norm has nothing to scale."""
    return math.prod(-(-size // step) for size, step in zip(grid, _halving(grid), strict=True)) > 1


def _halving(grid: Triple) -> Triple:
    x, y, z = (2 if size >= _HALVED_FROM else 1 for size in grid)
    return (x, y, z)


def _kernel(grid: Triple) -> Triple:
    x, y, z = (3 if size > 1 else 1 for size in grid)
    return (x, y, z)
