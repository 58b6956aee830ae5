"""Rotary positions: none, along the sequence as in the language model, or along the scan's three axes.

An angle pair is `(cosine, sine)`, each `[1, n, r]` with r the rotated width of a head, whose channels c and c + r/2
share one frequency: the layout of `transformers`.
"""

from typing import get_args

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from medvisionllama.types import Rotary

ROTARY: tuple[Rotary, ...] = get_args(Rotary)
Angles = tuple[Tensor, Tensor]
SequencePositions = Integer[Tensor, " token"]
AxisPositions = Integer[Tensor, "token axis=3"]


def cosine_at_origin(rotary: nn.Module, kind: str | None) -> Tensor:
    """Cosine `[1, 1, r]` of the first place in a text.

    It tells how many of a head's channels a family rotates, and is 1 unless the family makes up for a longer text
    by larger products (YaRN, LongRoPE).
    """
    cosine, _ = sequence_angles(rotary, torch.zeros(1, dtype=torch.long), torch.zeros(1), kind)
    return cosine


def no_angles(at_origin: Tensor, like: Tensor) -> Angles:
    """Angles of zero, which turn neither queries nor keys, and scale them as the family does."""
    cosine = at_origin.to(like)
    return cosine, torch.zeros_like(cosine)


def sequence_angles(
    rotary: nn.Module, positions: SequencePositions, like: Tensor, kind: str | None
) -> Angles:
    """Angles of places in a text."""
    places = positions[None]
    cosine, sine = rotary(like, places) if kind is None else rotary(like, places, kind)
    return cosine, sine


def axial_angles(rotary: nn.Module, positions: AxisPositions, like: Tensor, kind: str | None) -> Angles:
    """Angles of places in a scan: the frequencies take turns among the axes x, y, z.

    Each axis so gets slow and fast frequencies alike, as in the interleaved multimodal rotary positions of Qwen3-VL
    (its ancestor, arXiv 2409.12191 section 2.1, cuts the frequencies into three consecutive sections).
    """
    by_axis = [sequence_angles(rotary, positions[:, axis], like, kind) for axis in range(3)]
    width = by_axis[0][0].shape[-1]
    frequency = torch.arange(width, device=positions.device) % (width // 2)
    axis = frequency % 3
    cosine, sine = (
        sum(table * (axis == a) for a, table in enumerate(tables)) for tables in zip(*by_axis, strict=True)
    )
    return cosine, sine


def grid_positions(shape: tuple[int, int, int], *, num_before: int = 0) -> Tensor:
    """Places `[n, 3]` of a grid's tokens in their order, after `num_before` tokens of text.

    Text lies on the diagonal, where the three axes agree, and the scan begins where the text ends.
    """
    text = torch.arange(num_before)[:, None].expand(-1, 3)
    axes = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    scan = torch.stack(axes, dim=-1).reshape(-1, 3) + num_before
    return torch.cat([text, scan])
