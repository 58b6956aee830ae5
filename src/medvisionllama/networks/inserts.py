"""What sits between encoder and decoder. Models, controls and language models differ in nothing else."""

import torch
from torch import Tensor, nn

from medvisionllama.llm import FrozenBlock
from medvisionllama.llm.rotary import grid_positions
from medvisionllama.networks.layers import MLP
from medvisionllama.networks.mappers import make_mapper
from medvisionllama.types import MapperKind, Tokens, Triple


class LLMInsert(nn.Module):
    """VD1, frozen block with a residual around it, VD2.

    With `gated`, the tokens pass by unchanged and `gate · VD2(...)` is added; the gate has one number a channel and
    starts at zero, so the model starts as if nothing were inserted and opens the way only where that helps.
    Without, the insert replaces the tokens, as published.

    Args:
        grid: tokens along x, y, z, of which a block with 3-D positions tells each token's place.
        prompt: frozen rows `[p, block.width]` set before the visual tokens inside the block and dropped after it.
    """

    def __init__(
        self,
        width: int,
        block: FrozenBlock,
        *,
        mapper: MapperKind,
        rank: int,
        gated: bool,
        seed: int,
        grid: Triple,
        prompt: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.prompt = None if prompt is None else nn.Parameter(prompt, requires_grad=False)
        num_words = 0 if prompt is None else prompt.shape[0]
        positions = grid_positions(grid, num_before=num_words) if block.needs_positions else None
        self.positions: Tensor | None
        self.register_buffer("positions", positions, persistent=False)
        self.vd1 = make_mapper(mapper, width, block.width, rank=rank, seed=seed)
        self.block = block
        self.vd2 = make_mapper(mapper, block.width, width, rank=rank, seed=seed + 1)
        self.gate = nn.Parameter(torch.zeros(width)) if gated else None
        self.block_removed = False
        """True leaves only the residual around the block: what a trained network loses without it."""

    def forward(self, tokens: Tokens) -> Tokens:
        wide = self.vd1(tokens)
        inserted = self.vd2(wide if self.block_removed else self._through_block(wide) + wide)
        return inserted if self.gate is None else tokens + self.gate * inserted

    def _through_block(self, wide: Tokens) -> Tokens:
        places = {} if self.positions is None else {"positions": self.positions}
        if self.prompt is None:
            through: Tokens = self.block(wide, **places)
            return through
        words = self.prompt.to(wide.dtype).expand(wide.shape[0], -1, -1)
        through = self.block(torch.cat([words, wide], dim=1), **places)
        return through[:, self.prompt.shape[0] :]


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
