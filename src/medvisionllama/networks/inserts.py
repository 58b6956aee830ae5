"""What sits between encoder and decoder. Models, controls and language models differ in nothing else."""

import torch
from torch import nn

from medvisionllama.networks.layers import MLP
from medvisionllama.networks.mappers import MapperKind, make_mapper
from medvisionllama.types import Tokens


class LLMInsert(nn.Module):
    """VD1, frozen block with a residual around it, VD2.

    With `gated`, the tokens pass by unchanged and `gate · VD2(...)` is added; the gate has one number a channel and
    starts at zero, so the model starts as if nothing were inserted and opens the way only where that helps.
    Without, the insert replaces the tokens, as published.
    """

    def __init__(
        self,
        width: int,
        block: nn.Module,
        *,
        block_width: int,
        mapper: MapperKind,
        rank: int,
        gated: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.vd1 = make_mapper(mapper, width, block_width, rank=rank, seed=seed)
        self.block = block
        self.vd2 = make_mapper(mapper, block_width, width, rank=rank, seed=seed + 1)
        self.gate = nn.Parameter(torch.zeros(width)) if gated else None

    def forward(self, tokens: Tokens) -> Tokens:
        wide = self.vd1(tokens)
        inserted = self.vd2(self.block(wide) + wide)
        return inserted if self.gate is None else tokens + self.gate * inserted


class MLPInsert(nn.Module):
    """The capacity control: an MLP on normalised tokens, around a residual, gated like the block if asked."""

    def __init__(self, width: int, *, ratio: float, dropout: float, gated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, ratio=ratio, dropout=dropout)
        self.gate = nn.Parameter(torch.zeros(width)) if gated else None

    def forward(self, tokens: Tokens) -> Tokens:
        inserted = self.mlp(self.norm(tokens))
        return tokens + (inserted if self.gate is None else self.gate * inserted)
