"""Names and row orders in which checkpoints differ from transformers, and Meta's params.json.

Meta's own files and llama.cpp's keep the rows of queries and keys in pairs of neighbours, transformers in halves.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from medvisionllama.errors import BlockError

_META = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_META_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def transformers_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names that transformers would use to those in the checkpoint.

    >>> transformers_names(["bert.embeddings.LayerNorm.gamma"])
    {'bert.embeddings.LayerNorm.weight': 'bert.embeddings.LayerNorm.gamma'}
    """
    names = list(names)
    rename = _from_meta if is_meta(names) else _from_old_bert
    return {rename(name): name for name in names}


def is_meta(names: Iterable[str]) -> bool:
    """Whether these are the names of Meta's own files (they also keep queries and keys in pairs)."""
    return any(name.endswith(".attention.wq.weight") for name in names)


def in_pairs(name: str) -> bool:
    """Whether Meta and llama.cpp keep the rows of this tensor, named as transformers does, in pairs."""
    return name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight"))


def undo_pairs(weight: Tensor, *, name: str, settings: dict[str, Any]) -> Tensor:
    """Bring rows i and i + 1 of a head, which rotary positions turn together, to i and i + half."""
    key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
    num_heads = settings.get(key) or settings["num_attention_heads"]
    rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
    if not rows or rows % (2 * num_heads):
        raise BlockError(
            f"{name} has {rows} rows, which {num_heads} heads cannot share; weights and settings differ"
        )
    half = rows // num_heads // 2
    return weight.view(num_heads, half, 2, columns).transpose(1, 2).reshape(rows, columns)


def meta_settings(params: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Turn Meta's (and Mistral's) params.json into the settings of config.json.

    Raises:
        BlockError: a mixture of experts, or numbers that are missing or none.
    """
    if "moe" in params:
        raise BlockError(f"{where} describes a mixture of experts; dense models are supported")
    try:
        width, heads = int(params["dim"]), int(params["n_heads"])
        settings: dict[str, Any] = {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": int(params.get("hidden_dim") or _meta_hidden(params, width)),
            "num_hidden_layers": int(params["n_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(params.get("n_kv_heads") or heads),
            "head_dim": int(params.get("head_dim") or width // heads),
            "rms_norm_eps": float(params.get("norm_eps", 1e-5)),
            "rope_theta": float(params.get("rope_theta", 10_000.0)),
            "max_position_embeddings": 131_072 if params.get("use_scaled_rope") else 8192,
        }
        if int(params.get("vocab_size", -1)) > 0:
            settings["vocab_size"] = int(params["vocab_size"])
        if params.get("use_scaled_rope"):
            # The file does not say by how much: Llama 3.2 (1B and 3B) scales by 32, Llama 3.1 by 8.
            factor = params.get("rope_scaling_factor") or (32.0 if width < 4096 else 8.0)
            settings["rope_scaling"] = llama3_scaling(float(factor))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise BlockError(f"{where} is not Meta's params.json ({error!r}); download it again") from None
    return settings


def llama3_scaling(factor: float) -> dict[str, Any]:
    """Rotary settings of Llama 3.1 (factor 8) and 3.2 (factor 32)."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _meta_hidden(params: dict[str, Any], width: int) -> int:
    # As llama3/model.py computes it: two thirds of four widths, scaled, then rounded up.
    multiple_of = int(params.get("multiple_of", 256))
    hidden = int(float(params.get("ffn_dim_multiplier") or 1.0) * int(2 * 4 * width / 3))
    return multiple_of * math.ceil(hidden / multiple_of)


def _from_meta(name: str) -> str:
    if name.count(".") > 1 and name.startswith("layers."):
        _, number, inner = name.split(".", 2)
        module, _, kind = inner.rpartition(".")
        return f"model.layers.{number}.{_META.get(module, module)}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_META_OUTER.get(module, module)}.{kind}"


def _from_old_bert(name: str) -> str:
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith("LayerNorm" + old):
            return name.removesuffix(old) + new
    return name
