"""A tiny model of any family that llama.cpp knows, written as llama.cpp's converter writes it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedModel


def write_gguf(
    path: Path, model: PreTrainedModel, architecture: str, *, kind: str = "F32", **metadata: Any
) -> None:
    """Write `model` with its matrices quantised as `kind`; norms and biases stay as they are, as in llama.cpp."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for key, value in metadata.items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_pad_token_id(1)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored, weight = names.get_name(name, try_suffixes=(".weight", ".bias")), parameter.float().numpy()
        heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
        number_of_heads = next((count for part, count in heads.items() if part in stored), None)
        if architecture == "llama" and number_of_heads and weight.ndim == 2:
            weight = _in_pairs(weight, number_of_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        if weight.ndim == 1:
            writer.add_tensor(stored, weight)
            continue
        quantisation = GGMLQuantizationType[kind]
        packed = gguf.quantize(np.ascontiguousarray(weight), quantisation)
        writer.add_tensor(stored, packed, raw_dtype=None if kind in {"F32", "F16"} else quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py permutes queries and keys."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
