"""The settings of config.json from a GGUF file's metadata."""

import math
from collections.abc import Mapping
from typing import Any

from medvisionllama.errors import BlockError
from medvisionllama.llm.names import llama3_scaling

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
"""llama.cpp's names, and transformers' `model_type` for them."""

_NEEDED = {
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "block_count": ("num_hidden_layers", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
}
_KNOWN = {
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "rope.freq_base": ("rope_theta", float),
    "context_length": ("max_position_embeddings", int),
    "vocab_size": ("vocab_size", int),
    "attention.sliding_window": ("sliding_window", int),
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}


def gguf_settings(
    metadata: Mapping[str, Any], factors: Mapping[str, list[float]], *, where: str
) -> dict[str, Any]:
    """Translate metadata; `factors` are the tensors of rotary factors, if the file has them.

    Raises:
        BlockError: a needed value is missing, or values contradict each other.
    """
    try:
        return _settings(metadata, factors, where=where)
    except BlockError:
        raise
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise BlockError(
            f"{where}: its metadata contradict themselves ({' '.join(repr(error).split())[:80]}); download it again"
        ) from None


def _settings(
    metadata: Mapping[str, Any], factors: Mapping[str, list[float]], *, where: str
) -> dict[str, Any]:
    architecture = metadata["general.architecture"]
    settings: dict[str, Any] = {"model_type": ARCHITECTURES[architecture]}
    for key, (name, kind) in (_NEEDED | _KNOWN).items():
        value = metadata.get(f"{architecture}.{key}")
        if value is None and key in _NEEDED:
            raise BlockError(f"{where} lacks {architecture}.{key}; it is not a complete GGUF file")
        if value is not None:
            try:
                settings[name] = kind(value)
            except (TypeError, ValueError, OverflowError):
                raise BlockError(
                    f"{where}: {architecture}.{key} is {str(value)[:40]!r}, not one number; such models are not supported"
                ) from None
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    head_dim = settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    if settings.get("sliding_window") == 0:
        del settings["sliding_window"]  # how llama.cpp writes that a model (Phi-4) has none
    for name, value in settings.items():
        # Far above the largest models, and small enough to compute with.
        limit = 10_000 if name == "num_hidden_layers" else 1 << 40
        if isinstance(value, int | float) and not 0 < value <= limit:
            raise BlockError(f"{where}: {name} is {value}; it is not a complete GGUF file")
    if architecture == "llama":
        settings.pop("sliding_window", None)  # Mistral's, which no block of ours is long enough to need
    if architecture in {"gemma2", "gemma3"}:
        # The metadata does not say; llama.cpp knows the largest model of each by its number of layers.
        largest = settings["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]
        settings["query_pre_attn_scalar"] = (
            settings["hidden_size"] // settings["num_attention_heads"] if largest else head_dim
        )
    if architecture == "phi3":
        rotated = metadata.get("phi3.rope.dimension_count", head_dim)
        settings["partial_rotary_factor"] = rotated / head_dim
    scaling = _rope_scaling(metadata, factors, settings, where=where)
    return settings | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(
    metadata: Mapping[str, Any],
    factors: Mapping[str, list[float]],
    settings: Mapping[str, Any],
    *,
    where: str,
) -> dict[str, Any] | None:
    architecture = metadata["general.architecture"]
    if "rope_freqs.weight" in factors:
        stored = factors["rope_freqs.weight"]
        scaling = llama3_scaling(max(stored))
        computed = _llama3_factors(scaling, settings)
        if len(computed) != len(stored) or any(
            not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(computed, stored, strict=True)
        ):
            raise BlockError(f"{where} scales rotary positions in an unknown way; use another checkpoint")
        return scaling
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    if "rope_factors_long.weight" in factors:
        return {
            "rope_type": "longrope",
            "long_factor": factors["rope_factors_long.weight"],
            "short_factor": factors["rope_factors_short.weight"],
            "original_max_position_embeddings": original or settings["max_position_embeddings"],
        }
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": float(metadata.get(f"{architecture}.rope.scaling.factor", 1.0))}
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_factors(scaling: Mapping[str, Any], settings: Mapping[str, Any]) -> list[float]:
    """By how much each frequency of Llama 3.1 is lowered, as its authors compute it."""
    old, low, high = (
        scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    result = []
    for pair in range(settings["head_dim"] // 2):
        wavelength = 2 * math.pi * settings.get("rope_theta", 10_000.0) ** (2 * pair / settings["head_dim"])
        smooth = min(1.0, max(0.0, (old / wavelength - low) / (high - low)))
        result.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return result
