"""What differs between model families: one row each.

A row says which `transformers` classes compute a layer, where a checkpoint keeps its tensors, and how the language
model itself uses the layer (mask, positions). Everything else in `llm/` is the same for all families.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from medvisionllama.errors import BlockError
from medvisionllama.llm.feed_forward import in_pieces


@dataclass(frozen=True)
class Norm:
    """The norm after the last layer."""

    class_name: str
    """A class of the family's package, or `LayerNorm` for PyTorch's."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Constructor keyword → the configuration's attribute."""
    only_if: str = ""
    """The configuration's attribute without which a model has no such norm."""
    unless: str = ""
    """The configuration's attribute with which it has none."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of language models whose layers share one set of equations."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in a checkpoint's config.json."""
    package: str
    """The folder in `transformers.models`."""
    config_class: str
    layer_class: str
    base_class: str
    """Whose initialiser gives random weights."""
    norm: Norm | None = None
    rotary_class: str = ""
    """Empty if positions are added to the embeddings, before any layer."""
    rotary_by_kind: bool = False
    """Angles differ between layers with and without a window."""
    causal: bool = True
    """The language model lets a token see only those before it."""
    feed_forward: str = ""
    """The layer's module that maps each token alone, if it is one module: long sequences pass it in pieces."""
    layer_prefixes: tuple[str, ...]
    """Candidates of what stands before the names of layer {i}'s tensors; the first one found counts."""
    norm_prefixes: tuple[str, ...] = ()
    embedding_names: tuple[str, ...] = ()
    scales_embeddings: bool = False
    """Embeddings are multiplied by the square root of the width before the first layer."""
    lora_targets: tuple[str, ...]
    """Projections that LoRA can act on."""
    lora_default: tuple[str, ...]
    """Query and value, or the projection that holds them."""

    def load_class(self, name: str) -> Any:
        return getattr(import_module(f"transformers.models.{self.package}.modeling_{self.package}"), name)

    def make_config(self, settings: Mapping[str, Any]) -> Any:
        """Build the family's configuration; attention runs through `llm/attention.py`.

        Raises:
            BlockError: values that no model of the family can have.
        """
        from medvisionllama.llm.attention import register

        package = import_module(f"transformers.models.{self.package}.configuration_{self.package}")
        with self.refusing_nonsense():
            _check_numbers(settings)
            kind = settings.get("position_embedding_type") or "absolute"
            if kind != "absolute":
                # transformers would leave them out of its layers without a word.
                raise BlockError(
                    f"config.json asks for position_embedding_type={kind}, positions inside each layer, which is not supported; use a checkpoint with absolute ones"
                )
            config = getattr(package, self.config_class)(
                **{key: value for key, value in settings.items() if key not in _OF_HEADS}
            )
            _check_numbers({key: getattr(config, key, None) for key in _SIZES})
        config._attn_implementation = register()
        return config

    @contextmanager
    def refusing_nonsense(self) -> Iterator[None]:
        """Turn what transformers raises for settings that make no model into one line."""
        try:
            yield
        except BlockError:
            raise
        except Exception as error:  # noqa: BLE001 - any file may come here, and each setting fails its own way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise BlockError(
                f"config.json does not describe a {self.name} model ({reason}); download it again"
            ) from None

    def make_layer(self, config: Any, index: int) -> nn.Module:
        """Build layer `index` of the model: some families' layers differ by their place."""
        with self.refusing_nonsense():
            layer: nn.Module = self.load_class(self.layer_class)(config, layer_idx=index)
        if self.feed_forward:
            in_pieces(layer.get_submodule(self.feed_forward))
        return layer

    def make_norm(self, config: Any) -> nn.Module | None:
        if self.norm is None or (self.norm.only_if and not getattr(config, self.norm.only_if)):
            return None
        if self.norm.unless and getattr(config, self.norm.unless):
            return None
        options = {keyword: getattr(config, name) for keyword, name in self.norm.options.items()}
        plain = self.norm.class_name == "LayerNorm"
        kind = nn.LayerNorm if plain else self.load_class(self.norm.class_name)
        with self.refusing_nonsense():
            norm: nn.Module = kind(config.hidden_size, **options)
        return norm

    def make_rotary(self, config: Any) -> nn.Module | None:
        if not self.rotary_class:
            return None
        with self.refusing_nonsense():
            rotary: nn.Module = self.load_class(self.rotary_class)(config)
        return rotary

    def initialise(self, module: nn.Module, config: Any) -> None:
        """Fill a module as a model of the family starts its training, norms included."""
        with self.refusing_nonsense():
            base = self.load_class(self.base_class)(config)
            module.apply(base._init_weights)

    def is_causal(self, config: Any) -> bool:
        """Whether this model hides what follows a token: some encoders serve as decoders, and the reverse."""
        if getattr(config, "use_bidirectional_attention", False):
            return False
        return self.causal or bool(getattr(config, "is_decoder", False))

    def rotary_kind(self, config: Any, index: int) -> str | None:
        """Which of the model's sets of angles layer `index` turns by; None if there is but one."""
        return config.layer_types[index] if self.rotary_by_kind else None

    def window(self, config: Any, index: int) -> int | None:
        """Largest distance that the model lets layer `index` see, if it limits it."""
        kinds = getattr(config, "layer_types", None)
        if kinds and kinds[index] != "sliding_attention":
            return None
        size: int | None = getattr(config, "sliding_window", None)
        if size is None:
            return None
        # Decoders count the token itself; so does the bidirectional variant of Gemma 3, but not ModernBERT.
        counts_itself = self.causal
        return size - 1 if counts_itself else size


_COUNTS_LAYERS = ("num_hidden_layers", "n_layer")
_SIZES = (
    *_COUNTS_LAYERS,
    *("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads"),
)
_OF_HEADS = ("num_labels", "id2label", "label2id")
"""Of a classifier's head, which no block has."""
_MAX_LAYERS, _MAX_SIZE = 10_000, 1 << 24


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, before anything of such a size is built."""
    for key, value in settings.items():
        if key in _SIZES and value is not None:
            largest = _MAX_LAYERS if key in _COUNTS_LAYERS else _MAX_SIZE
            if type(value) is not int or not 1 <= value <= largest:
                raise ValueError(f"{key} is {str(value)[:40]}; a whole number from 1 to {largest} is needed")
        is_share = "dropout" in key or key.endswith("pdrop")
        if is_share and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{key} is {str(value)[:40]}; a number from 0 to 1 is needed")


_PLACES = ("model.", "model.language_model.", "language_model.model.", "")
"""Where checkpoints keep a decoder: with its head, beside the encoder of images (new and old names), alone."""


def _decoder(name: str, stem: str, **changes: Any) -> Family:
    """A row that follows Llama's layout."""
    row: dict[str, Any] = {
        "name": name,
        "model_types": (name,),
        "package": name,
        "config_class": f"{stem}Config",
        "layer_class": f"{stem}DecoderLayer",
        "base_class": f"{stem}PreTrainedModel",
        "norm": Norm(f"{stem}RMSNorm", {"eps": "rms_norm_eps"}),
        "rotary_class": f"{stem}RotaryEmbedding",
        "feed_forward": "mlp",
        "layer_prefixes": tuple(f"{place}layers.{{i}}." for place in _PLACES),
        "norm_prefixes": tuple(f"{place}norm." for place in _PLACES),
        "embedding_names": tuple(f"{place}embed_tokens.weight" for place in _PLACES),
        "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "lora_default": ("q_proj", "v_proj"),
    }
    return Family(**{**row, **changes})


def _bert(name: str, stem: str) -> Family:
    """A row that follows BERT's layout: each layer ends in its own norm, so there is no last one."""
    return Family(
        name=name,
        model_types=(name,),
        package=name,
        config_class=f"{stem}Config",
        layer_class=f"{stem}Layer",
        base_class=f"{stem}PreTrainedModel",
        causal=False,
        layer_prefixes=(f"{name}.encoder.layer.{{i}}.", "encoder.layer.{i}."),
        embedding_names=(f"{name}.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        lora_targets=("query", "key", "value", "dense"),
        lora_default=("query", "value"),
    )


FAMILIES = (
    _decoder("llama", "Llama"),
    _decoder("mistral", "Mistral"),
    _decoder("qwen2", "Qwen2"),
    _decoder("qwen3", "Qwen3"),
    _decoder("gemma2", "Gemma2", scales_embeddings=True),
    _decoder(
        "gemma3",
        "Gemma3",
        model_types=("gemma3_text",),
        config_class="Gemma3TextConfig",
        rotary_by_kind=True,
        scales_embeddings=True,
    ),
    _decoder(
        "phi3",
        "Phi3",
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        lora_default=("qkv_proj",),
    ),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        package="gpt2",
        config_class="GPT2Config",
        layer_class="GPT2Block",
        base_class="GPT2PreTrainedModel",
        norm=Norm("LayerNorm", {"eps": "layer_norm_epsilon"}),
        feed_forward="mlp",
        layer_prefixes=("transformer.h.{i}.", "h.{i}."),
        norm_prefixes=("transformer.ln_f.", "ln_f."),
        embedding_names=("transformer.wte.weight", "wte.weight"),
        lora_targets=("c_attn", "c_proj", "c_fc"),
        lora_default=("c_attn",),
    ),
    Family(
        name="opt",
        model_types=("opt",),
        package="opt",
        config_class="OPTConfig",
        layer_class="OPTDecoderLayer",
        base_class="OPTPreTrainedModel",
        norm=Norm(
            "LayerNorm",
            {"elementwise_affine": "layer_norm_elementwise_affine"},
            only_if="do_layer_norm_before",
            unless="_remove_final_layer_norm",
        ),
        layer_prefixes=("model.decoder.layers.{i}.", "decoder.layers.{i}."),
        norm_prefixes=("model.decoder.final_layer_norm.", "decoder.final_layer_norm."),
        embedding_names=("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        lora_default=("q_proj", "v_proj"),
    ),
    Family(
        name="biogpt",
        model_types=("biogpt",),
        package="biogpt",
        config_class="BioGptConfig",
        layer_class="BioGptDecoderLayer",
        base_class="BioGptPreTrainedModel",
        norm=Norm("LayerNorm"),
        layer_prefixes=("biogpt.layers.{i}.", "layers.{i}."),
        norm_prefixes=("biogpt.layer_norm.", "layer_norm."),
        embedding_names=("biogpt.embed_tokens.weight", "embed_tokens.weight"),
        scales_embeddings=True,
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        lora_default=("q_proj", "v_proj"),
    ),
    _bert("bert", "Bert"),
    _bert("roberta", "Roberta"),
    Family(
        name="modernbert",
        model_types=("modernbert",),
        package="modernbert",
        config_class="ModernBertConfig",
        layer_class="ModernBertEncoderLayer",
        base_class="ModernBertPreTrainedModel",
        norm=Norm("LayerNorm", {"eps": "norm_eps", "bias": "norm_bias"}),
        rotary_class="ModernBertRotaryEmbedding",
        rotary_by_kind=True,
        causal=False,
        feed_forward="mlp",
        layer_prefixes=("model.layers.{i}.", "layers.{i}."),
        norm_prefixes=("model.final_norm.", "final_norm."),
        embedding_names=("model.embeddings.tok_embeddings.weight", "embeddings.tok_embeddings.weight"),
        lora_targets=("Wqkv", "Wo", "Wi"),
        lora_default=("Wqkv",),
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
