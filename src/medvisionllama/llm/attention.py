"""The attention of every frozen layer, registered with `transformers` under one name.

The layer projects queries, keys and values; this computes with them. Unusual: key-value heads are shared, and
repeated only where a GPU's kernel cannot share them; what a token may see is told by the block in each call, never
by the layer; the fused kernel serves unless plain products are faster or the family caps its scores (Gemma 2),
which the kernel cannot.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medvisionllama.attention import plain_is_faster
from medvisionllama.llm.attention_weights import Attending, attention_weights, causal_mask, show, watched

_NAME = "medvisionllama"
_LONG = 512


def register() -> str:
    """Make `frozen_attention` known to `transformers`; returns the name to put into a configuration."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, frozen_attention)
    return _NAME


def frozen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    is_causal: bool,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend; queries are `[b, heads, n, d]`, keys and values `[b, key-value heads, n, d]`.

    Args:
        attention_mask: bool `[n, n]`, True where a row may see a column; None where all see all, or where
            `is_causal` says it.

    Returns:
        `[b, n, heads, d]`, and no attention matrix.
    """
    # Norms inside a layer give float32 under autocast; the products run in the values' precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if watched():
        mask = causal_mask(query.shape[2], query.device) if is_causal else attention_mask
        show(module, Attending(query, key, value, mask, scaling, softcap))
    if softcap is not None or (plain_is_faster(query) and attention_mask is None and not is_causal):
        attended = _plain(query, key, value, attention_mask, scaling, is_causal, softcap)
    else:
        are_shared = key.shape[1] != query.shape[1]
        if query.is_cuda and are_shared and (attention_mask is not None or query.dtype == torch.float32):
            # Most versions of PyTorch share heads there in plain products alone, which hold n × n scores.
            key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended.transpose(1, 2).contiguous(), None


def _repeated(shared: Tensor, heads: int) -> Tensor:
    """Keys or values `[b, key-value heads, n, d]`, each as often as query heads share it: `[b, heads, n, d]`."""
    return shared.repeat_interleave(heads // shared.shape[1], dim=1)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    is_causal: bool,  # noqa: FBT001 - checkpointing passes arguments by place
    softcap: float | None,
) -> Tensor:
    """Attention as plain products; a long sequence's scores are computed again in the backward pass, not kept."""
    if is_causal:
        mask = causal_mask(query.shape[2], query.device)
    arguments = (query, key, value, mask, scaling, softcap)
    if query.shape[2] > _LONG and torch.is_grad_enabled():
        kept: Tensor = checkpoint(_products, *arguments, use_reentrant=False)
        return kept
    return _products(*arguments)


def _products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    batch, heads, length, width = query.shape
    weights = attention_weights(query, key, mask, scaling=scaling, softcap=softcap).to(value.dtype)
    return (weights @ value).reshape(batch, heads, length, width)
