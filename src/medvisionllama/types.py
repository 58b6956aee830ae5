"""Shapes and units, named once.

Arrays of a scan are `[channel, x, y, z]`; after reorientation x runs to the patient's right, y to the front, z up
(RAS). Tokens are `[batch, token, width]`.
"""

from typing import Literal

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

Triple = tuple[int, int, int]
SpacingMm = tuple[float, float, float]
