"""Layers from a GGUF file, dequantised by the `gguf` package.

The file is memory-mapped, so only the pages of the tensors asked for are read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvisionllama.errors import BlockError
from medvisionllama.llm.sources import LayerTensors, resolve_layers

# llama.cpp's names for a Llama layer, and transformers' names for the same matrices.
_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def read_gguf(path: Path, layers: Sequence[int]) -> tuple[dict[str, Any], LayerTensors]:
    """Return a Llama model's configuration and the tensors of some layers, in float32.

    Raises:
        BlockError: not a GGUF file, or not of the Llama family.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise BlockError(f"{path} is not a readable GGUF file ({error}); download it again") from None
    settings = _settings(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    positions = resolve_layers(layers, settings["num_hidden_layers"])
    return settings, LayerTensors(
        tuple(_layer(tensors, position, settings, path) for position in positions),
        {"weight": _dequantised(tensors, "output_norm.weight", path)},
    )


def _settings(reader: Any, path: Path) -> dict[str, Any]:
    def value(key: str) -> Any:
        field = reader.fields.get(key)
        if field is None:
            raise BlockError(f"{path} lacks {key}; it is not a complete Llama-family GGUF file")
        return field.contents()

    architecture = value("general.architecture")
    if architecture != "llama":
        raise BlockError(f"{path} holds a {architecture!r} model; GGUF reading supports: llama")
    return {
        "model_type": "llama",
        "hidden_size": int(value("llama.embedding_length")),
        "intermediate_size": int(value("llama.feed_forward_length")),
        "num_hidden_layers": int(value("llama.block_count")),
        "num_attention_heads": int(value("llama.attention.head_count")),
        "num_key_value_heads": int(value("llama.attention.head_count_kv")),
        "rms_norm_eps": float(value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(value("llama.rope.freq_base")),
        "max_position_embeddings": int(value("llama.context_length")),
    }


def _layer(tensors: dict[str, Any], position: int, settings: dict[str, Any], path: Path) -> dict[str, Tensor]:
    layer = {theirs: _dequantised(tensors, f"blk.{position}.{ours}", path) for ours, theirs in _NAMES.items()}
    for name, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        full = f"self_attn.{name}.weight"
        layer[full] = _undo_interleave(layer[full], settings[key])
    return layer


def _dequantised(tensors: dict[str, Any], name: str, path: Path) -> Tensor:
    from gguf import dequantize

    if name not in tensors:
        raise BlockError(f"{path} lacks the tensor {name}; download it again")
    tensor = tensors[name]
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _undo_interleave(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp pairs neighbouring rows for rotary positions, transformers pairs row i with row i + half."""
    rows, columns = weight.shape
    half = rows // num_heads // 2
    return weight.view(num_heads, half, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
