"""A random Llama small enough for any test: three layers of width 32, saved as transformers saves it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def save_tiny_llama(folder: Path, *, max_shard_size: str = "5GB", **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms of one and biases of zero would hide a tensor that is read but not used.
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
