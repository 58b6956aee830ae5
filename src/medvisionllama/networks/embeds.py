"""From voxels to tokens: an embedding returns the token grid, and the finer features for a skip head.

Its `stride` tells how many voxels lie from token to token along x, y, z.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from medvisionllama.networks.context import ContextDown, halving
from medvisionllama.networks.layers import Conv3d, ConvBlock
from medvisionllama.types import ImageBatch, Triple

Features = list[Tensor]


class PatchEmbed(nn.Module):
    """One linear map of each cubic patch (a convolution whose stride is its kernel)."""

    def __init__(self, num_channels: int, width: int, *, patch_size: int) -> None:
        super().__init__()
        self.stride = (patch_size, patch_size, patch_size)
        self.project = nn.Conv3d(num_channels, width, patch_size, stride=patch_size)

    def forward(self, image: ImageBatch) -> tuple[Tensor, Features]:
        return self.project(image), []


class StemEmbed(nn.Module):
    """A thin convolutional stem at three strides, two stages of context if they are asked for, then tokens.

    Full resolution gets one convolution with few channels, or none; the work is done at the coarser strides.
    """

    def __init__(
        self,
        num_channels: int,
        width: int,
        *,
        channels: Triple,
        strides: Sequence[Triple],
        tokens: bool,
        context: tuple[int, int] | None,
        grid: Triple,
    ) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.fine = ConvBlock(num_channels, fine, kernel=kernel_for(strides[0])) if fine else None
        self.middle = nn.Sequential(
            ConvBlock(fine or num_channels, middle, stride=strides[0], kernel=kernel_for(strides[0])),
            ConvBlock(middle, middle, kernel=kernel_for(strides[1])),
        )
        self.coarse = nn.Sequential(
            ConvBlock(middle, coarse, stride=strides[1], kernel=kernel_for(strides[1])),
            ConvBlock(coarse, coarse, kernel=kernel_for(strides[2])),
        )
        self.context = ContextDown(coarse, context, stride=strides[2], grid=grid) if context else None
        steps = [*strides, halving(grid)] if context else strides
        x, y, z = (math.prod(along) for along in zip(*steps, strict=True))
        self.stride = (x, y, z)
        self.project = _projection(coarse, width, strides[2], context) if tokens else None

    def forward(self, image: ImageBatch) -> tuple[Tensor | None, Features]:
        full = image if self.fine is None else self.fine(image)
        half = self.middle(full)
        deepest = self.coarse(half)
        features = [full, half, deepest]
        if self.context is not None:
            upper, deepest = self.context(deepest)
            features += [upper, deepest]
        return None if self.project is None else self.project(deepest), features


def _projection(coarse: int, width: int, stride: Triple, context: tuple[int, int] | None) -> nn.Conv3d:
    """To tokens, from the stem's last stage or from the context's lower one, which lies at their stride."""
    if context:
        return nn.Conv3d(context[1], width, 1)
    kernel = kernel_for(stride)
    x, y, z = (size // 2 for size in kernel)
    return Conv3d(coarse, width, kernel, stride=stride, padding=(x, y, z))


def kernel_for(stride: Triple) -> Triple:
    """Three voxels along the axes that are halved, one across slices that are still far apart."""
    x, y, z = (3 if step > 1 else 1 for step in stride)
    return (x, y, z)
