"""Small parts that the networks share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvisionllama.autocast import autocast_dtype
from medvisionllama.types import Tokens, Triple


class MLP(nn.Module):
    """Two linear layers with a GELU between, per token."""

    def __init__(self, width: int, *, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = hidden_width(width, ratio)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        return self.dropout(self.down(F.gelu(self.up(tokens))))


class Conv3d(nn.Conv3d):
    """A convolution that stays in float32 on a CPU where an axis is shorter than its kernel.

    There PyTorch 2.13's bf16 weight gradients hold what happened to be in memory, huge or no numbers at all: at a
    grid of 2×2×2, for example, or after a stride of 2 across a single slice. So few voxels cost no time.
    """

    def forward(self, grid: Tensor) -> Tensor:
        is_narrow = any(size < length for size, length in zip(grid.shape[2:], self.kernel_size, strict=True))
        if not is_narrow or grid.device.type != "cpu":
            return super().forward(grid)
        with torch.autocast("cpu", enabled=False):
            return super().forward(grid.float())


class Rise(nn.ConvTranspose3d):
    """A transposed convolution whose stride is its kernel: each cell writes a box of its own.

    That is a linear map of each cell and a rearrangement. Computed so, it takes half the time of PyTorch 2.13's own
    way in bf16 on a CPU.
    """

    def __init__(self, num_in: int, num_out: int, stride: Triple) -> None:
        super().__init__(num_in, num_out, stride, stride=stride)

    def forward(self, grid: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or grid.device.type != "cpu" or autocast_dtype("cpu") != torch.bfloat16:
            return super().forward(grid, output_size)
        assert self.bias is not None, "it has one by default"
        x, y, z = self.kernel_size
        weight = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)
        boxes = F.linear(grid.movedim(1, -1), weight, self.bias.repeat(x * y * z))
        # `[b, i, j, l, x, y, z, c]`: each axis of cells and that of voxels in a cell become one.
        boxes = boxes.unflatten(-1, (x, y, z, self.out_channels)).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return boxes.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class InstanceNorm3d(nn.InstanceNorm3d):
    """An instance norm that hands on the layout it is given.

    PyTorch's leaves one channel after the other, and each reader would turn that back for itself, when it runs and
    when its gradient is taken.
    """

    def forward(self, grid: Tensor) -> Tensor:
        normed = super().forward(grid)
        is_last = grid.is_contiguous(memory_format=torch.channels_last_3d)
        return normed.contiguous(memory_format=torch.channels_last_3d) if is_last else normed


def use_our_layers(network: nn.Module) -> None:
    """Turn the convolutions and instance norms of a foreign network into ours; weights and names stay."""
    ours: dict[type[nn.Module], type[nn.Module]] = {nn.Conv3d: Conv3d, nn.InstanceNorm3d: InstanceNorm3d}
    for module in network.modules():
        if type(module) in ours:
            module.__class__ = ours[type(module)]


class ConvBlock(nn.Module):
    """Convolution, instance norm, leaky ReLU."""

    def __init__(
        self, num_in: int, num_out: int, *, stride: Triple = (1, 1, 1), kernel: Triple = (3, 3, 3)
    ) -> None:
        super().__init__()
        x, y, z = (size // 2 for size in kernel)
        self.conv = Conv3d(num_in, num_out, kernel, stride=stride, padding=(x, y, z), bias=False)
        self.norm = InstanceNorm3d(num_out, affine=True)

    def forward(self, grid: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(grid)), 0.01, inplace=True)


def hidden_width(width: int, ratio: float) -> int:
    """Channels inside an MLP."""
    return int(width * ratio)


def to_tokens(grid: Tensor) -> Tokens:
    """`[b, c, x, y, z]` to `[b, x·y·z, c]`, z fastest."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens: Tokens, shape: Triple) -> Tensor:
    """Undo `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, shape)
