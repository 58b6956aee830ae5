"""The rivals: MONAI's segmentation networks in our shell, so that one loop trains and one predictor runs all.

A rival is a head that is given the scan itself: no tokens, no insert. Sizes are the published ones, or narrower by
`base_channels`, for machines on which the published width makes too few steps.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvisionllama.errors import ConfigError
from medvisionllama.networks.embeds import Features, kernels_for
from medvisionllama.networks.layers import use_our_layers
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.types import ImageBatch, LogitBatch, RivalName, Triple

PUBLISHED_CHANNELS: dict[RivalName, int] = {
    "unetr": 16,
    "swin_unetr": 48,
    "dynunet": 32,
    "segresnet": 32,
    "unet++": 32,
    "unet": 32,
}
"""Channels of the first stage, or feature size, as their papers have them: 32 in SegResNet (Myronenko 2018) and 48
in Swin UNETR (Hatamizadeh et al. 2022), twice MONAI's examples of them; of the others, and of BasicUNet, MONAI's
defaults."""
_MOST_CHANNELS = 320  # nnU-Net's limit in three dimensions
_SMALLEST_EDGE, _SMALLEST_EDGE_ALONE = 8, 12
"""nnU-Net halves axes while they are at least so long, and a single one a little longer."""


class ScanItself(nn.Module):
    """An embedding that makes no tokens and hands on the scan."""

    def forward(self, image: ImageBatch) -> tuple[None, Features]:
        return None, [image]


class MonaiHead(nn.Module):
    """A whole network as a head.

    Args:
        unit: what each edge of its input must be a multiple of; scans are padded with zeros at their ends.
    """

    def __init__(self, network: nn.Module, *, unit: Triple) -> None:
        super().__init__()
        self.network = network
        self.unit = unit

    def forward(self, grid: None, features: Features) -> tuple[LogitBatch, list[LogitBatch]]:
        (image,) = features
        shape = image.shape[2:]
        x, y, z = (-size % step for size, step in zip(shape, self.unit, strict=True))
        padded = F.pad(image, (0, z, 0, y, 0, x)) if x or y or z else image
        made = self.network(padded)
        full, *coarser = [made] if isinstance(made, Tensor) else made
        return _without_padding(full, shape, padded.shape[2:]), [
            _without_padding(logits, shape, padded.shape[2:]) for logits in coarser
        ]


def _without_padding(logits: Tensor, shape: Sequence[int], padded: Sequence[int]) -> Tensor:
    """Logits of what was there before padding, at any resolution; of a cell that padding shares, all."""
    sizes = zip(shape, logits.shape[2:], padded, strict=True)
    x, y, z = (math.ceil(size * cells / whole) for size, cells, whole in sizes)
    return logits[..., :x, :y, :z]


def build_rival(
    name: RivalName,
    *,
    num_channels: int,
    num_outputs: int,
    crop_size: Triple,
    strides: Sequence[Triple],
    base_channels: int | None = None,
) -> TokenSegmenter:
    """Build a rival for crops of a plan.

    Args:
        strides: the plan's, which DynUNet follows and goes on from as nnU-Net would; the others halve all axes.
        base_channels: by default `PUBLISHED_CHANNELS`; multiples of 12 for `swin_unetr`.

    Raises:
        ConfigError: a crop of which the deepest stage would see one voxel.
    """
    width = base_channels or PUBLISHED_CHANNELS[name]
    network, unit = _BUILDERS[name](num_channels, num_outputs, crop_size, strides, width)
    if math.prod(math.ceil(size / step) for size, step in zip(crop_size, unit, strict=True)) < 2:
        raise ConfigError(
            f"a crop of {'×'.join(map(str, crop_size))} voxels is one voxel at the deepest stage of {name} (stride {'×'.join(map(str, unit))}), which its norm cannot scale; set a larger data.crop_size"
        )
    use_our_layers(network)
    return TokenSegmenter(
        ScanItself(),
        nn.Identity(),
        nn.Identity(),
        nn.Identity(),
        MonaiHead(network, unit=unit),
        memory_format=_fastest_layout(name, strides),
    )


def _fastest_layout(name: RivalName, strides: Sequence[Triple]) -> torch.memory_format:
    """The layout of fewer seconds a step in bf16 on two Zen 5 cores (`benchmarks/step.py`; decision 0017)."""
    has_flat_kernels = name == "dynunet" and any(1 in kernel for kernel in kernels_for(strides))
    if name == "segresnet" or has_flat_kernels:
        return torch.contiguous_format
    return torch.channels_last_3d


def dynunet_strides(crop_size: Triple, strides: Sequence[Triple]) -> list[Triple]:
    """The plan's strides, then further ones while an axis has eight voxels left (Isensee et al. 2021).

    An odd axis is padded. One that is left alone is halved from twelve voxels on.

    >>> dynunet_strides((112, 112, 10), [(2, 2, 1), (2, 2, 1), (2, 2, 2)])[3:]
    [(2, 2, 1)]
    """
    result = list(strides)
    size = [
        math.ceil(length / math.prod(along))
        for length, along in zip(crop_size, zip(*strides, strict=True), strict=True)
    ]
    while long := [length for length in size if length >= _SMALLEST_EDGE]:
        if len(long) == 1 and long[0] < _SMALLEST_EDGE_ALONE:
            break
        x, y, z = (2 if length >= _SMALLEST_EDGE else 1 for length in size)
        result.append((x, y, z))
        size = [math.ceil(length / step) for length, step in zip(size, (x, y, z), strict=True)]
    return result


def _dynunet(
    num_channels: int, num_outputs: int, crop: Triple, planned: Sequence[Triple], width: int
) -> tuple[nn.Module, Triple]:
    from medvisionllama.networks.dynunet import DynUNetV2

    strides = dynunet_strides(crop, planned)
    kernels = [*kernels_for(strides), (3, 3, 3)]
    network = DynUNetV2(
        3,
        num_channels,
        num_outputs,
        kernel_size=kernels,
        strides=[(1, 1, 1), *strides],
        upsample_kernel_size=strides,
        filters=[min(width * 2**level, _MOST_CHANNELS) for level in range(len(kernels))],
        deep_supervision=len(strides) > 2,
        deep_supr_num=min(2, len(strides) - 1),
    )
    x, y, z = (math.prod(stride[axis] for stride in strides) for axis in range(3))
    return network, (x, y, z)


def _segresnet(
    num_channels: int, num_outputs: int, crop: Triple, planned: Sequence[Triple], width: int
) -> tuple[nn.Module, Triple]:
    from monai.networks.nets import SegResNet

    network = SegResNet(init_filters=width, in_channels=num_channels, out_channels=num_outputs)
    # Its convolutions have no bias all the same, which is how the optimiser knows kernels before a norm.
    network.norms_first = True
    return network, (8, 8, 8)


def _unetr(
    num_channels: int, num_outputs: int, crop: Triple, planned: Sequence[Triple], width: int
) -> tuple[nn.Module, Triple]:
    from monai.networks.nets import UNETR

    x, y, z = (length + -length % 16 for length in crop)
    hidden = 48 * width
    network = UNETR(
        num_channels,
        num_outputs,
        img_size=(x, y, z),
        feature_size=width,
        hidden_size=hidden,
        mlp_dim=4 * hidden,
        num_heads=12,
    )
    for block in network.vit.blocks:
        _leave_out(block, "norm_cross_attn")
    return network, (16, 16, 16)


def _swin_unetr(
    num_channels: int, num_outputs: int, crop: Triple, planned: Sequence[Triple], width: int
) -> tuple[nn.Module, Triple]:
    from monai.networks.nets import SwinUNETR

    # It reads numbers off tensors while it is built, which the meta device has not.
    device = torch.empty(0).device
    with torch.device("cpu"):
        network = SwinUNETR(num_channels, num_outputs, feature_size=width)
    return network.to(device), (32, 32, 32)


# A bias before a norm does nothing, but for telling the optimiser that no norm follows.
def _unet(
    num_channels: int, num_outputs: int, crop: Triple, planned: Sequence[Triple], width: int
) -> tuple[nn.Module, Triple]:
    from monai.networks.nets import BasicUNet

    network = BasicUNet(3, num_channels, num_outputs, features=_basic_widths(width), bias=False)
    return network, (16, 16, 16)


def _unet_plus_plus(
    num_channels: int, num_outputs: int, crop: Triple, planned: Sequence[Triple], width: int
) -> tuple[nn.Module, Triple]:
    from monai.networks.nets import BasicUNetPlusPlus

    network = BasicUNetPlusPlus(3, num_channels, num_outputs, features=_basic_widths(width), bias=False)
    _leave_out(network, "final_conv_0_1", "final_conv_0_2", "final_conv_0_3")
    return network, (16, 16, 16)


def _basic_widths(width: int) -> tuple[int, ...]:
    """MONAI's own proportions: 32, 32, 64, 128, 256, 32."""
    return width, width, 2 * width, 4 * width, 8 * width, width


def _leave_out(module: nn.Module, *names: str) -> None:
    """Drop layers that MONAI makes and never runs: distributed training would wait for their gradients."""
    for name in names:
        setattr(module, name, nn.Identity())


_BUILDERS: dict[RivalName, Callable[[int, int, Triple, Sequence[Triple], int], tuple[nn.Module, Triple]]] = {
    "unetr": _unetr,
    "swin_unetr": _swin_unetr,
    "dynunet": _dynunet,
    "segresnet": _segresnet,
    "unet++": _unet_plus_plus,
    "unet": _unet,
}
