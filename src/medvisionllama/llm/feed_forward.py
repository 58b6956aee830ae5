"""A long sequence goes through a layer's feed-forward network in pieces, and keeps less of it.

The network sees each token alone, so nothing changes but memory: its activations are several times wider than the
tokens. Those that only pass by, forward and backward, then exist for one piece at a time; and of a gate's, all but
its two inputs are computed again in the backward pass, which costs no matrix product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvisionllama.autocast import autocast_dtype
from medvisionllama.types import Tokens

_PIECE = 1 << 22
"""Numbers in a piece: 1,024 tokens of width 4,096, at which matrix products are as fast as at any length."""


def in_pieces(network: nn.Module) -> None:
    """Let `network` take its tokens piece by piece, in place; parameters and their names stay."""
    network.forward = partial(_forward, network, network.forward)


def _forward(network: Any, whole: Callable[[Tokens], Tokens], tokens: Tokens) -> Tokens:
    if tokens.numel() <= _PIECE or _casts_weights(network, tokens.device.type):
        return whole(tokens)
    # The gate of Llama and its kin, whose parts have these names.
    if hasattr(network, "gate_proj") and hasattr(network, "act_fn"):
        whole = partial(_gated, network)
    rows = tokens.reshape(-1, tokens.shape[-1])
    pieces = rows.split(max(1, _PIECE // tokens.shape[-1]))
    return torch.cat([whole(piece) for piece in pieces]).view_as(tokens)


def _casts_weights(network: nn.Module, kind: str) -> bool:
    """Whether autocast converts the weights in each call, so that each piece would keep a copy of them."""
    dtype = autocast_dtype(kind)
    if dtype is None:
        return False
    return any(weight.is_floating_point() and weight.dtype != dtype for weight in network.parameters())


def _gated(network: Any, tokens: Tensor) -> Tensor:
    gate, up = network.gate_proj(tokens), network.up_proj(tokens)
    product = checkpoint(_product, network.act_fn, gate, up, use_reentrant=False, preserve_rng_state=False)
    mapped: Tensor = network.down_proj(product)
    return mapped


def _product(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    opened: Tensor = activation(gate) * up
    return opened
