"""Transformer encoder blocks on tokens, and the positions that place tokens in the scan.

Pre-norm, as in the reference code. `attention_dropout` acts on attention weights, which forces the attention
matrix into memory; leave it at 0 to keep PyTorch's fused kernel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvisionllama.attention import plain_is_faster
from medvisionllama.networks.layers import MLP
from medvisionllama.types import Tokens, Triple


def attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Attention over `[batch, head, token, width]`, by whichever of two equal ways is faster."""
    if not plain_is_faster(query):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(dim=-1)
    return F.dropout(weights, dropout) @ value


class SelfAttention(nn.Module):
    """Multi-head attention in which every token sees every other."""

    def __init__(self, width: int, *, num_heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        query, key, value = self.by_head(self.qkv(tokens))
        rate = self.attention_dropout if self.training else 0.0
        mixed = attend(query, key, value, dropout=rate)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def by_head(self, projected: Tensor) -> Tensor:
        """Queries, keys and values `[3, b, head, n, d]` from what `qkv` gives."""
        return projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(
        self, width: int, *, num_heads: int, mlp_ratio: float, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(
            width, num_heads=num_heads, dropout=dropout, attention_dropout=attention_dropout
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, ratio=mlp_ratio, dropout=dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class LearnedPositions(nn.Module):
    """A trained vector for each token of a fixed grid."""

    def __init__(self, grid: Triple, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.randn(1, grid[0] * grid[1] * grid[2], width) * 0.02)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens + self.table

    def interpolated(self, table: Tensor, grid: Triple) -> Tensor:
        """Positions `[1, n, d]` of another grid of tokens, brought onto this one (trilinear)."""
        cells = table.unflatten(1, grid).movedim(-1, 1)
        return F.interpolate(cells, self.grid, mode="trilinear").flatten(2).transpose(1, 2)


class VisionTransformer(nn.Sequential):
    """Positions, if a grid is given, then `depth` blocks; with neither it is the identity."""

    def __init__(
        self,
        depth: int,
        *,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        attention_dropout: float,
        positions: Triple | None,
    ) -> None:
        modules: list[nn.Module] = [LearnedPositions(positions, width)] if positions else []
        modules += [
            TransformerBlock(
                width,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(depth)
        ]
        super().__init__(*modules)


def grid_after(size: Sequence[int], stride: Sequence[int]) -> Triple:
    """Cells along each axis after a stride; an axis that it does not divide keeps its last one."""
    x, y, z = (-(-length // step) for length, step in zip(size, stride, strict=True))
    return (x, y, z)
