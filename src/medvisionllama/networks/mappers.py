"""VD1 and VD2: the trainable ways into the language model's width and back.

Three kinds. `linear`: one trained matrix. `lora`: a frozen random matrix plus a trained low-rank update, which is
what the reference code does. `linear+lora`: both trained, as the paper's text reads.
"""

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import nn

from medvisionllama.types import MapperKind, Tokens

_KINDS: tuple[MapperKind, ...] = get_args(MapperKind)


class LowRankLinear(nn.Module):
    """A linear map whose matrix is a base plus `up @ down` of a small rank.

    A frozen base is not stored with a run: it is drawn again from `seed`, and the run's hash of frozen tensors
    catches a generator that draws differently.
    """

    def __init__(self, num_in: int, num_out: int, *, rank: int, train_base: bool, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(num_in)
        base = torch.empty(num_out, num_in).uniform_(-bound, bound, generator=generator)
        self.base = nn.Parameter(base, requires_grad=train_base)
        self.bias = nn.Parameter(torch.zeros(num_out))
        self.down = nn.Parameter(torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator))
        # Starts at zero, so training starts at the base alone (Hu et al. 2021, LoRA, section 4.1).
        self.up = nn.Parameter(torch.zeros(num_out, rank))

    def forward(self, tokens: Tokens) -> Tokens:
        return F.linear(tokens, self.base, self.bias) + F.linear(F.linear(tokens, self.down), self.up)


def make_mapper(kind: MapperKind, num_in: int, num_out: int, *, rank: int, seed: int) -> nn.Module:
    """Build VD1 or VD2.

    Raises:
        ValueError: no such kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"mapper={kind!r} is not known; known: {', '.join(_KINDS)}")
    if kind == "linear":
        return nn.Linear(num_in, num_out)
    train_base = {"lora": False, "linear+lora": True}[kind]
    return LowRankLinear(num_in, num_out, rank=rank, train_base=train_base, seed=seed)
