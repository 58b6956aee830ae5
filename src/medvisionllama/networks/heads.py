"""From tokens to logits: each head returns full-resolution logits and, while training, coarser ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medvisionllama.networks.context import ContextUp
from medvisionllama.networks.embeds import Features, kernels_for
from medvisionllama.networks.layers import ConvBlock, Rise
from medvisionllama.types import LogitBatch, Triple


class LinearHead(nn.Module):
    """One linear map from each token to the logits of its patch, as published."""

    def __init__(self, width: int, num_outputs: int, *, patch_size: int) -> None:
        super().__init__()
        # A transposed convolution whose stride is its kernel writes each token's patch and nothing else.
        self.project = nn.ConvTranspose3d(width, num_outputs, patch_size, stride=patch_size)

    def forward(self, grid: Tensor, features: Features) -> tuple[LogitBatch, list[LogitBatch]]:
        return self.project(grid), []


class UpsampleHead(nn.Module):
    """Transposed convolutions that double the resolution and halve the channels (as Primus)."""

    def __init__(self, width: int, num_outputs: int, *, patch_size: int) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        while patch_size > 2 and patch_size % 2 == 0:
            modules += [
                # The norm takes any bias away again.
                nn.ConvTranspose3d(width, width // 2, 2, stride=2, bias=False),
                nn.InstanceNorm3d(width // 2, affine=True),
                nn.GELU(),
            ]
            width, patch_size = width // 2, patch_size // 2
        modules.append(nn.ConvTranspose3d(width, num_outputs, patch_size, stride=patch_size))
        self.layers = nn.Sequential(*modules)

    def forward(self, grid: Tensor, features: Features) -> tuple[LogitBatch, list[LogitBatch]]:
        return self.layers(grid), []


class SkipHead(nn.Module):
    """Tokens on their way up, joined at each stride by the stem's features.

    While training, logits are also read off at stride 2 and off what is deepest, so that each level has a reason of
    its own to be right. With context, tokens add to its lower stage through a map that starts at zero: training
    starts at the network without them.

    Args:
        join_convolutions: at strides 4 and 2, after each join; full resolution has one. None is two where voxels
            are even, which gain by it, and one where slices are thick, which lose the steps it costs.
        refine: read logits off the features of stride 2 and add what full resolution has to say, from nothing at
            the start, instead of reading all off its few channels, in which a class may find no place for hundreds
            of steps.
    """

    def __init__(
        self,
        width: int,
        num_outputs: int,
        *,
        channels: Triple,
        strides: Sequence[Triple],
        tokens: bool,
        context: tuple[int, int] | None,
        grid: Triple,
        join_convolutions: int | None = 1,
        refine: bool = False,
    ) -> None:
        super().__init__()
        fine, middle, coarse = channels
        at_full, at_half, at_quarter = kernels_for(strides)
        joins = join_convolutions or (2 if all(size > 1 for size in at_full) else 1)
        deepest = context[0] if context else width
        has_deepest = tokens or context is not None
        self.add_tokens = nn.Conv3d(width, context[1], 1, bias=False) if tokens and context else None
        if self.add_tokens is not None:
            nn.init.zeros_(self.add_tokens.weight)
        self.context = ContextUp(context, grid=grid) if context else None
        self.from_tokens = Rise(deepest, coarse, strides[2]) if has_deepest else None
        joined = 2 * coarse if has_deepest else coarse
        self.join_quarter = _join(joined, coarse, at_quarter, joins)
        self.to_half = Rise(coarse, middle, strides[1])
        self.join_half = _join(2 * middle, middle, at_half, joins)
        self.to_full = Rise(middle, fine, strides[0]) if fine else None
        self.join_full = ConvBlock(2 * fine, fine, kernel=at_full) if fine else None
        self.out = nn.Conv3d(fine, num_outputs, 1) if fine else _overlapping(middle, num_outputs, strides[0])
        self.out_coarse = _overlapping(middle, num_outputs, strides[0]) if refine and fine else None
        if self.out_coarse is not None:
            for parameter in self.out.parameters():
                nn.init.zeros_(parameter)
        self.out_half = nn.Conv3d(middle, num_outputs, 1)
        self.out_tokens = nn.Conv3d(deepest, num_outputs, 1) if has_deepest else None

    def forward(self, grid: Tensor | None, features: Features) -> tuple[LogitBatch, list[LogitBatch]]:
        full, half, quarter, *context = features
        deepest = self._deepest(grid, context)
        if self.from_tokens is not None:
            quarter = torch.cat([self.from_tokens(deepest), quarter], dim=1)
        half = self.join_half(torch.cat([self.to_half(self.join_quarter(quarter)), half], dim=1))
        logits = self.out(self._finest(half, full))
        if self.out_coarse is not None:
            logits = logits + self.out_coarse(half)
        if not self.training:
            return logits, []
        auxiliary = [self.out_half(half)]
        if self.out_tokens is not None:
            auxiliary.append(self.out_tokens(deepest))
        return logits, auxiliary

    def _finest(self, half: Tensor, full: Tensor) -> Tensor:
        """What logits are read off: at full resolution, or at stride 2 if nothing is worked on there."""
        if self.to_full is None or self.join_full is None:
            return half
        return self.join_full(torch.cat([self.to_full(half), full], dim=1))

    def _deepest(self, grid: Tensor | None, context: Features) -> Tensor | None:
        """The tokens, or the context with what they add to it."""
        if self.context is None:
            return grid
        upper, lower = context
        return self.context(upper, lower if self.add_tokens is None else lower + self.add_tokens(grid))


def _join(num_in: int, num_out: int, kernel: Triple, number: int) -> nn.Module:
    """So many convolutions, the first of which mixes what was joined; one is as it was before there were more."""
    first = ConvBlock(num_in, num_out, kernel=kernel)
    more = [ConvBlock(num_out, num_out, kernel=kernel) for _ in range(number - 1)]
    return nn.Sequential(first, *more) if more else first


def _overlapping(num_in: int, num_out: int, stride: Triple) -> nn.ConvTranspose3d:
    """From strided cells to voxels, each cell reaching half a box into its neighbours: no steps between boxes."""
    reach = [step // 2 for step in stride]
    x, y, z = (step + 2 * further for step, further in zip(stride, reach, strict=True))
    return nn.ConvTranspose3d(
        num_in, num_out, (x, y, z), stride=stride, padding=(reach[0], reach[1], reach[2])
    )
