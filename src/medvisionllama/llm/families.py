"""What differs between model families: one row each.

A row says where a checkpoint keeps a layer's tensors and which `transformers` classes compute with them.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from medvisionllama.errors import BlockError


@dataclass(frozen=True)
class Family:
    """A family of language models whose layers share one set of equations."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in a checkpoint's config.json."""
    config_class: str
    layer_class: str
    norm_class: str
    rotary_class: str
    layer_prefix: str
    """Prefix of layer {i}'s tensors in a Hugging Face checkpoint."""
    norm_prefix: str
    """Prefix of the last norm's tensors."""
    lora_targets: tuple[str, ...]

    def load_class(self, path: str) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)

    def make_config(self, settings: dict[str, Any]) -> Any:
        """Build the family's configuration; attention runs through PyTorch's fused kernel.

        Raises:
            BlockError: values that no model of the family can have.
        """
        from huggingface_hub.errors import StrictDataclassError

        try:
            config = self.load_class(self.config_class)(**settings)
        except (StrictDataclassError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise BlockError(f"config.json does not describe a {self.name} model ({reason})") from None
        config._attn_implementation = "sdpa"
        return config

    def make_layer(self, config: Any, index: int) -> nn.Module:
        layer: nn.Module = self.load_class(self.layer_class)(config, index)
        return layer

    def make_norm(self, config: Any) -> nn.Module:
        norm: nn.Module = self.load_class(self.norm_class)(config.hidden_size, eps=config.rms_norm_eps)
        return norm


_LLAMA = "transformers.models.llama."

FAMILIES = (
    Family(
        name="llama",
        model_types=("llama",),
        config_class=_LLAMA + "configuration_llama.LlamaConfig",
        layer_class=_LLAMA + "modeling_llama.LlamaDecoderLayer",
        norm_class=_LLAMA + "modeling_llama.LlamaRMSNorm",
        rotary_class=_LLAMA + "modeling_llama.LlamaRotaryEmbedding",
        layer_prefix="model.layers.{i}.",
        norm_prefix="model.norm.",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
)


def family_of(model_type: str) -> Family:
    """Find the row of a `model_type`.

    Raises:
        BlockError: no row knows it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise BlockError(f"model_type {model_type!r} is not supported; supported: {known}")
