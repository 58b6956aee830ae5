"""Shapes and units, named once.

Arrays of a scan are `[channel, x, y, z]`; after reorientation x runs to the patient's right, y to the front, z up
(RAS). Tokens are `[batch, token, width]`.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer
from torch import Tensor

ImageArray = Float32[np.ndarray, "channel x y z"]
LabelArray = Integer[np.ndarray, "x y z"]
MaskArray = Bool[np.ndarray, "x y z"]
AffineMatrix = Float[np.ndarray, "4 4"]

ImageBatch = Float[Tensor, "batch channel x y z"]
LabelBatch = Integer[Tensor, "batch x y z"]
LogitBatch = Float[Tensor, "batch class x y z"]
Tokens = Float[Tensor, "batch token width"]

FoldName = int | Literal["all"]
"""The fold that validates; in `all` every patient trains, and none is left to validate or test."""

RivalName = Literal["unetr", "swin_unetr", "dynunet", "segresnet", "unet++", "unet"]
"""MONAI's networks."""
Architecture = Literal["tokens", RivalName]
BlockWeights = Literal["pretrained", "random", "moment_matched", "permuted", "identity"]
BlockStorage = Literal["full", "int8"]
Rotary = Literal[False, True, "3d"]
PromptControl = Literal["text", "shuffled", "random"]
MapperKind = Literal["linear", "lora", "linear+lora"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]
SizeCriterion = Literal["trainable", "total", "flops"]
"""By what one network is made as large as another: parameters, or operations."""

Triple = tuple[int, int, int]
SpacingMm = tuple[float, float, float]


class NetworkShapes(TypedDict):
    """What a network must fit: the part of a plan that `networks.factory.build_network` asks for."""

    num_channels: int
    num_outputs: int
    crop_size: Triple
    strides: Sequence[Triple]
