"""The attention matrix that the kernels hide, computed again from queries and keys for those who ask.

Nothing here runs in training or prediction: `frozen_attention` shows what it attends with only inside `watching`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Attending:
    """What one layer attends with: queries `[b, heads, n, d]`, keys and values `[b, key-value heads, n, d]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    """Bool `[n, n]`, True where a row may see a column; None where all see all."""
    scaling: float
    softcap: float | None = None


Look = Callable[[nn.Module, Attending], None]
# A list and no context variable, which torch.compile cannot trace; who looks must know its own modules anyway.
_looks: list[Look] = []


@contextmanager
def watching(look: Look) -> Iterator[None]:
    """Show `look` each frozen layer's attention module and what it attends with, until the context ends."""
    _looks.append(look)
    try:
        yield
    finally:
        _looks.remove(look)


def watched() -> bool:
    """Whether anybody looks."""
    return len(_looks) > 0


def show(module: nn.Module, attending: Attending) -> None:
    """Let those who look see."""
    for look in _looks:
        look(module, attending)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Bool `[n, n]` in which a row sees the columns up to its own."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None
) -> Tensor:
    """Shares `[b, key-value heads, heads that share one · n, n]` in float32, each row of sum 1."""
    batch, _, length, width = query.shape
    # The heads that share a key become one longer sequence of queries.
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = grouped @ key.transpose(-2, -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.unflatten(2, (-1, length)).masked_fill(~mask, -torch.inf).flatten(2, 3)
    return scores.softmax(-1, dtype=torch.float32)


def attention_received(attending: Attending, *, num_before: int = 0) -> Tensor:
    """How much attention each token receives `[b, n]`, averaged over heads and queries.

    The unit is an even share: 1 is what a token would get if each query attended alike to all that it may see.
    Without it, a causal mask would make the first tokens of a sequence look important: more queries see them.

    Args:
        num_before: leading tokens (a prompt's) that neither ask nor are in the result, but take their share.
    """
    # In float32 even where the network attends in bfloat16, whose shares of 4,096 tokens have two digits.
    with torch.no_grad(), torch.autocast(attending.query.device.type, enabled=False):
        query, key = attending.query.float(), attending.key.float()
        heads, length = query.shape[1:3]
        sharing = heads // key.shape[1]
        total = query.new_zeros(len(query), length - num_before)
        for head in range(heads):  # one matrix at a time: those of 32 heads and 4,096 tokens would take 2 GB
            shares = attention_weights(
                query[:, head : head + 1],
                key[:, head // sharing : head // sharing + 1],
                attending.mask,
                scaling=attending.scaling,
                softcap=attending.softcap,
            )
            total += shares[:, 0, num_before:, num_before:].sum(dim=1)
        if attending.mask is None:
            return total * (length / (length - num_before) / heads)
        visible = attending.mask.float()
        even = (visible / visible.sum(dim=1, keepdim=True))[num_before:, num_before:].sum(dim=0)
        return total / heads / even
