"""Random language models small enough for any test, one or more of every family, saved as transformers saves them.

What a test could miss in a real model is made loud here: three layers of different kinds, windows of eight tokens,
small softcaps, an epsilon of a hundredth, no tensor of ones or zeros, and dropout everywhere.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "attention_dropout": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_LLAMA = _COMMON | {
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-2,
    "rope_theta": 100.0,
}
_GEMMA = _LLAMA | {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_PHI3 = _LLAMA | {"model_type": "phi3", "sliding_window": 8, "resid_pdrop": 0.1}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 32,
    "n_inner": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-2,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_OPT = {key: value for key, value in _COMMON.items() if key != "intermediate_size"} | {
    "model_type": "opt",
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dropout": 0.1,
}
_BERT = _COMMON | {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-2,
}
_MODERNBERT = _COMMON | {
    "model_type": "modernbert",
    "hidden_activation": "gelu",
    "norm_eps": 1e-2,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "global_rope_theta": 1000.0,
    "local_rope_theta": 100.0,
    "mlp_dropout": 0.1,
    "cls_token_id": 0,
    "sep_token_id": 2,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"model_type": "llama"},
    "llama31": _LLAMA
    | {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 1024,
        # Of the four wavelengths 6, 20, 63 and 199, two stay, one is blended and one is stretched.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": _LLAMA | {"model_type": "mistral", "head_dim": 16, "sliding_window": 8},
    "qwen2": _LLAMA
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
    },
    "gemma3": _GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_theta": 1000.0,
        "rope_local_base_freq": 100.0,
    },
    # As EmbeddingGemma: an encoder with a decoder's name, whose windows reach half as far to either side.
    "gemma3-encoder": _GEMMA
    | {
        "model_type": "gemma3_text",
        "rope_theta": 1000.0,
        "rope_local_base_freq": 100.0,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_bidirectional_attention": True,
    },
    "phi3": _PHI3,
    "phi3-partial": _PHI3 | {"partial_rotary_factor": 0.5},
    "phi3-longrope": _PHI3
    | {
        "sliding_window": None,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "gpt2": _GPT2,
    "gpt2-scaled": _GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "opt": _OPT,
    "opt-postnorm": _OPT | {"do_layer_norm_before": False},
    "opt-nobias": _OPT
    | {"enable_bias": False, "activation_function": "gelu", "_remove_final_layer_norm": True},
    "biogpt": _BERT | {"model_type": "biogpt", "activation_dropout": 0.1},
    "bert": _BERT | {"model_type": "bert"},
    "bert-decoder": _BERT | {"model_type": "bert", "is_decoder": True},
    "roberta": _BERT | {"model_type": "roberta"},
    "modernbert": _MODERNBERT,
    "modernbert-biases": _MODERNBERT | {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
}
"""A model's config.json by the name of its family, or of a variant of it."""

FAMILIES = tuple({settings["model_type"]: name for name, settings in reversed(SETTINGS.items())}.values())[
    ::-1
]
"""One model of each family."""

ENCODERS = ("bert", "roberta", "modernbert")

PREFIXES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"),
        ("model.layers.{}.", "model.norm."),
    ),
    "gpt2": ("transformer.h.{}.", "transformer.ln_f."),
    "opt": ("model.decoder.layers.{}.", "model.decoder.final_layer_norm."),
    "biogpt": ("biogpt.layers.{}.", "biogpt.layer_norm."),
    "bert": ("bert.encoder.layer.{}.", None),
    "roberta": ("roberta.encoder.layer.{}.", None),
    "modernbert": ("model.layers.{}.", "model.final_norm."),
}
"""Where a checkpoint keeps layer {} and the last norm, by `model_type`."""


def tiny_config(name: str, **changes: object) -> PretrainedConfig:
    # transformers writes into the dictionaries it is given.
    settings = deepcopy(SETTINGS[name] | changes)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def fresh_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model with its head as its own initialiser leaves it."""
    head = AutoModelForMaskedLM if config.model_type in ENCODERS else AutoModelForCausalLM
    return head.from_config(config, attn_implementation="eager").eval()


def save_tiny_model(
    folder: Path, name: str, *, max_shard_size: str = "5GB", **changes: object
) -> PreTrainedModel:
    """Save a random model with its head, none of whose tensors could be left out unnoticed."""
    torch.manual_seed(0)
    model = fresh_model(tiny_config(name, **changes))
    low = -0.5 if name.startswith("gemma") else 0.5  # Gemma adds one to the weights of its norms
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Norms of one and biases of zero would hide a tensor that is read but not used.
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 0.5) if key.endswith("bias") else parameter.uniform_(low, low + 1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if name == "gemma3-encoder":
        _restore_window(folder / "config.json", SETTINGS[name]["sliding_window"])
    return model


def _restore_window(path: Path, window: int) -> None:
    """Undo what older transformers do: they save the window halved, and halve it again on reading."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": window}))


def base(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head."""
    return model.base_model


def layer_weights(folder: Path, name: str, layer: int) -> dict[str, Tensor]:
    """Return one layer's tensors of a saved model, by their names inside the layer."""
    return _weights_under(folder, PREFIXES[SETTINGS[name]["model_type"]][0].format(layer))


def norm_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the last norm's tensors; of a model without one, nothing."""
    prefix = PREFIXES[SETTINGS[name]["model_type"]][1]
    return _weights_under(folder, prefix) if prefix else {}


def _weights_under(folder: Path, prefix: str) -> dict[str, Tensor]:
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
