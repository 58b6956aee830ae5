"""Every family's layer written out in plain PyTorch: no transformers class, no module.

A layer is `EQUATIONS[family](w, c, x, layer, cos, sin, mask)`: w holds the layer's tensors by their names in a
checkpoint, c is the model's config.json, x the tokens `[b, n, D]`. Letters: b batch, n tokens, D width, h heads,
d features of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]


def plain_layer(
    name: str,
    weights: Weights,
    config: Config,
    tokens: Tensor,
    *,
    layer: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute one layer.

    Args:
        name: the family, as `model_type` in config.json.
        layer: its number in the model; some families' layers differ by it.
        cos: of the rotary angles `[n, pairs]`; without it tokens have no positions.
        sin: of the same.
        mask: `[n, n]`, true where the token of the row sees that of the column; without it all see all.
    """
    return EQUATIONS[name](weights, config, tokens, layer, cos, sin, mask)


def plain_norm(name: str, weights: Weights, config: Config, tokens: Tensor) -> Tensor:
    """Apply the model's last norm; a model without one leaves the tokens as they are."""
    if not weights:
        return tokens
    if name in {"gemma2", "gemma3_text"}:
        return _rms_norm(tokens, 1 + weights["weight"], config["rms_norm_eps"])
    if "rms_norm_eps" in config:
        return _rms_norm(tokens, weights["weight"], config["rms_norm_eps"])
    eps = {"gpt2": "layer_norm_epsilon", "modernbert": "norm_eps"}.get(name)
    return _layer_norm(tokens, weights, config[eps] if eps else 1e-5)


# --- The pieces ---


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return scale * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _layer_norm(x: Tensor, w: Weights, eps: float, name: str = "") -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return normed * w[f"{name}weight"] + w.get(f"{name}bias", torch.zeros(()))


def _activation(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return x.clamp(min=0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    assert name in {"gelu_new", "gelu_pytorch_tanh"}, name
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _heads(x: Tensor, size: int) -> Tensor:
    """`[b, n, h * d]` to `[b, h, n, d]`."""
    b, n, _ = x.shape
    return x.reshape(b, n, -1, size).transpose(1, 2)


def _turn(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Turn each pair of features (i, i + pairs) by its token's angle; features beyond the pairs stay."""
    if cos is None or sin is None:
        return x
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """`[b, h, n, d]` queries, and keys and values of as many or fewer heads, to `[b, n, h * d]`."""
    outputs = []
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, shared].transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        outputs.append(torch.softmax(scores, -1) @ v[:, shared])
    return torch.cat(outputs, -1)


# --- The families ---


def _llama(w, c, x, layer, cos, sin, mask):
    """Llama, Mistral and Qwen 2 (which has biases); Qwen 3 normalises queries and keys too."""
    size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    eps = c["rms_norm_eps"]
    h = _rms_norm(x, w["input_layernorm.weight"], eps)
    q = _heads(_linear(h, w, "self_attn.q_proj"), size)
    k = _heads(_linear(h, w, "self_attn.k_proj"), size)
    v = _heads(_linear(h, w, "self_attn.v_proj"), size)
    if c["model_type"] == "qwen3":
        q = _rms_norm(q, w["self_attn.q_norm.weight"], eps)
        k = _rms_norm(k, w["self_attn.k_norm.weight"], eps)
    h = _attend(_turn(q, cos, sin), _turn(k, cos, sin), v, mask, scale=size**-0.5)
    x = x + _linear(h, w, "self_attn.o_proj")
    h = _rms_norm(x, w["post_attention_layernorm.weight"], eps)
    gate = _activation(c["hidden_act"], _linear(h, w, "mlp.gate_proj"))
    return x + _linear(gate * _linear(h, w, "mlp.up_proj"), w, "mlp.down_proj")


def _gemma(w, c, x, layer, cos, sin, mask):
    """Gemma 2 squashes the scores, Gemma 3 normalises queries and keys; both norm before and after each part."""
    size, eps = c["head_dim"], c["rms_norm_eps"]
    h = _rms_norm(x, 1 + w["input_layernorm.weight"], eps)
    q = _heads(_linear(h, w, "self_attn.q_proj"), size)
    k = _heads(_linear(h, w, "self_attn.k_proj"), size)
    v = _heads(_linear(h, w, "self_attn.v_proj"), size)
    if c["model_type"] == "gemma3_text":
        q = _rms_norm(q, 1 + w["self_attn.q_norm.weight"], eps)
        k = _rms_norm(k, 1 + w["self_attn.k_norm.weight"], eps)
    softcap = c["attn_logit_softcapping"] if c["model_type"] == "gemma2" else None
    scale = c["query_pre_attn_scalar"] ** -0.5
    h = _attend(_turn(q, cos, sin), _turn(k, cos, sin), v, mask, scale=scale, softcap=softcap)
    x = x + _rms_norm(_linear(h, w, "self_attn.o_proj"), 1 + w["post_attention_layernorm.weight"], eps)
    h = _rms_norm(x, 1 + w["pre_feedforward_layernorm.weight"], eps)
    gate = _activation(c["hidden_activation"], _linear(h, w, "mlp.gate_proj"))
    h = _linear(gate * _linear(h, w, "mlp.up_proj"), w, "mlp.down_proj")
    return x + _rms_norm(h, 1 + w["post_feedforward_layernorm.weight"], eps)


def _phi3(w, c, x, layer, cos, sin, mask):
    """One matrix for queries, keys and values, one for the gate and what it gates."""
    size, eps = c["hidden_size"] // c["num_attention_heads"], c["rms_norm_eps"]
    h = _linear(_rms_norm(x, w["input_layernorm.weight"], eps), w, "self_attn.qkv_proj")
    shared = c["num_key_value_heads"] * size
    q, k, v = (_heads(part, size) for part in h.split([c["hidden_size"], shared, shared], -1))
    h = _attend(_turn(q, cos, sin), _turn(k, cos, sin), v, mask, scale=size**-0.5)
    x = x + _linear(h, w, "self_attn.o_proj")
    h = _linear(_rms_norm(x, w["post_attention_layernorm.weight"], eps), w, "mlp.gate_up_proj")
    gate, up = h.chunk(2, -1)
    return x + _linear(_activation(c["hidden_act"], gate) * up, w, "mlp.down_proj")


def _gpt2(w, c, x, layer, cos, sin, mask):
    """Matrices are stored as `[in, out]`; scores may be divided by the layer's number."""
    size, eps = c["n_embd"] // c["n_head"], c["layer_norm_epsilon"]
    h = _layer_norm(x, w, eps, "ln_1.") @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]
    q, k, v = (_heads(part, size) for part in h.chunk(3, -1))
    scale = size**-0.5 / (layer + 1 if c.get("scale_attn_by_inverse_layer_idx") else 1)
    h = _attend(q, k, v, mask, scale=scale)
    x = x + h @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
    h = _layer_norm(x, w, eps, "ln_2.") @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]
    h = _activation(c["activation_function"], h)
    return x + h @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]


def _opt(w, c, x, layer, cos, sin, mask):
    """OPT and BioGPT norm before each part (the smaller OPT-350m after it), with an epsilon no config changes."""
    before = c.get("do_layer_norm_before", True)
    act, eps = c.get("activation_function") or c["hidden_act"], 1e-5
    size = c["hidden_size"] // c["num_attention_heads"]
    h = _layer_norm(x, w, eps, "self_attn_layer_norm.") if before else x
    q = _heads(_linear(h, w, "self_attn.q_proj"), size)
    k = _heads(_linear(h, w, "self_attn.k_proj"), size)
    v = _heads(_linear(h, w, "self_attn.v_proj"), size)
    x = x + _linear(_attend(q, k, v, mask, scale=size**-0.5), w, "self_attn.out_proj")
    x = x if before else _layer_norm(x, w, eps, "self_attn_layer_norm.")
    h = _layer_norm(x, w, eps, "final_layer_norm.") if before else x
    x = x + _linear(_activation(act, _linear(h, w, "fc1")), w, "fc2")
    return x if before else _layer_norm(x, w, eps, "final_layer_norm.")


def _bert(w, c, x, layer, cos, sin, mask):
    """BERT and RoBERTa norm after each part."""
    size, eps = c["hidden_size"] // c["num_attention_heads"], c["layer_norm_eps"]
    q = _heads(_linear(x, w, "attention.self.query"), size)
    k = _heads(_linear(x, w, "attention.self.key"), size)
    v = _heads(_linear(x, w, "attention.self.value"), size)
    h = _linear(_attend(q, k, v, mask, scale=size**-0.5), w, "attention.output.dense")
    x = _layer_norm(x + h, w, eps, "attention.output.LayerNorm.")
    h = _activation(c["hidden_act"], _linear(x, w, "intermediate.dense"))
    return _layer_norm(x + _linear(h, w, "output.dense"), w, eps, "output.LayerNorm.")


def _modernbert(w, c, x, layer, cos, sin, mask):
    """The first layer has no norm before its attention: the embeddings end with one."""
    size, eps = c["hidden_size"] // c["num_attention_heads"], c["norm_eps"]
    h = _layer_norm(x, w, eps, "attn_norm.") if layer else x
    q, k, v = (_heads(part, size) for part in _linear(h, w, "attn.Wqkv").chunk(3, -1))
    h = _attend(_turn(q, cos, sin), _turn(k, cos, sin), v, mask, scale=size**-0.5)
    x = x + _linear(h, w, "attn.Wo")
    value, gate = _linear(_layer_norm(x, w, eps, "mlp_norm."), w, "mlp.Wi").chunk(2, -1)
    return x + _linear(_activation(c["hidden_activation"], value) * gate, w, "mlp.Wo")


EQUATIONS = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "biogpt": _opt,
    "bert": _bert,
    "roberta": _bert,
    "modernbert": _modernbert,
}


# --- What the language model itself gives its layers: who sees whom, and where each token stands ---


def native_mask(config: Config, num_tokens: int, *, layer: int) -> Tensor | None:
    """Who sees whom, `[n, n]`: causal in decoders, in some layers only a window of them; encoders see all."""
    place = torch.arange(num_tokens)
    back = place[:, None] - place[None, :]
    if config["model_type"] in {"bert", "roberta"}:
        return back >= 0 if config.get("is_decoder") else None
    if config["model_type"] == "modernbert" or config.get("use_bidirectional_attention"):
        window = config.get("local_attention") or config["sliding_window"]
        return back.abs() <= window // 2 if _is_local(config, layer) else None
    seen = back >= 0
    return seen & (back < config["sliding_window"]) if _is_local(config, layer) else seen


def native_angles(
    config: Config, num_tokens: int, *, layer: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Cosine and sine of the rotary angles `[n, pairs]`; nothing for families without rotary positions."""
    family = config["model_type"]
    if family in {"gpt2", "opt", "biogpt", "bert", "roberta"}:
        return None, None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = int(size * config.get("partial_rotary_factor", 1.0))
    theta = config.get("rope_theta")
    if family == "gemma3_text" and _is_local(config, layer):
        theta = config["rope_local_base_freq"]
    if family == "modernbert":
        theta = config["local_rope_theta" if _is_local(config, layer) else "global_rope_theta"]
    frequencies = theta ** -(torch.arange(0, size, 2) / size)
    scaling, amplitude = config.get("rope_scaling"), 1.0
    if scaling and scaling.get("rope_type") == "llama3":
        frequencies = torch.tensor([_llama3_frequency(value, scaling) for value in frequencies.tolist()])
    elif scaling:
        trained = config["original_max_position_embeddings"]
        longer = num_tokens > trained
        frequencies = frequencies / torch.tensor(scaling["long_factor" if longer else "short_factor"])
        amplitude = math.sqrt(1 + math.log(config["max_position_embeddings"] / trained) / math.log(trained))
    angles = torch.arange(num_tokens)[:, None] * frequencies
    return amplitude * angles.cos(), amplitude * angles.sin()


def _llama3_frequency(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Slow waves are slowed down by the factor, fast ones stay, those between are blended."""
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = min(max((waves - low) / (high - low), 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling["factor"]


def _is_local(config: Config, layer: int) -> bool:
    """Whether the layer sees only a window."""
    if config["model_type"] in {"mistral", "phi3"}:
        return config["sliding_window"] is not None
    if config["model_type"] == "modernbert":
        return layer % config["global_attn_every_n_layers"] > 0
    return config.get("layer_types", {layer: ""})[layer] == "sliding_attention"
