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
        full, half, quarter = kernels_for(strides)
        self.fine = ConvBlock(num_channels, fine, kernel=full) if fine else None
        self.middle = nn.Sequential(
            ConvBlock(fine or num_channels, middle, stride=strides[0], kernel=full),
            ConvBlock(middle, middle, kernel=half),
        )
        self.coarse = nn.Sequential(
            ConvBlock(middle, coarse, stride=strides[1], kernel=half),
            ConvBlock(coarse, coarse, kernel=quarter),
        )
        self.context = ContextDown(coarse, context, stride=strides[2], grid=grid) if context else None
        steps = [*strides, halving(grid)] if context else strides
        x, y, z = (math.prod(along) for along in zip(*steps, strict=True))
        self.stride = (x, y, z)
        self.project = _projection(coarse, width, strides[2], quarter, context) if tokens else None

    def forward(self, image: ImageBatch) -> tuple[Tensor | None, Features]:
        full = image if self.fine is None else self.fine(image)
        half = self.middle(full)
        deepest = self.coarse(half)
        features = [full, half, deepest]
        if self.context is not None:
            upper, deepest = self.context(deepest)
            features += [upper, deepest]
        return None if self.project is None else self.project(deepest), features


def _projection(
    coarse: int, width: int, stride: Triple, kernel: Triple, context: tuple[int, int] | None
) -> nn.Conv3d:
    """To tokens, from the stem's last stage or from the context's lower one, which lies at their stride."""
    if context:
        return nn.Conv3d(context[1], width, 1)
    x, y, z = (size // 2 for size in kernel)
    return Conv3d(coarse, width, kernel, stride=stride, padding=(x, y, z))


def kernels_for(strides: Sequence[Triple]) -> list[Triple]:
    """A kernel for each stage, by the stride below it: one voxel across slices that are far apart, three from where
    they are halved on.

    What is left alone later is short, and its slices are near. So nnU-Net does (Isensee et al. 2021).

    >>> kernels_for([(2, 2, 1), (2, 2, 2), (2, 2, 1)])
    [(3, 3, 1), (3, 3, 3), (3, 3, 3)]
    """
    kernels: list[Triple] = []
    for stride in strides:
        before = kernels[-1] if kernels else (1, 1, 1)
        x, y, z = (max(3 if step > 1 else 1, size) for step, size in zip(stride, before, strict=True))
        kernels.append((x, y, z))
    return kernels
