"""`FrozenBlock`: some layers of a pretrained language model as a module from tokens to tokens.

Unlike the language model itself: no causal mask and no rotary positions unless asked for, since visual tokens
have no reading order and bring their own positions; no embedding, no cache, no output head; nothing is trained
but an optional LoRA update.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from medvisionllama.attention import plain_is_faster
from medvisionllama.errors import BlockError
from medvisionllama.llm.catalog import CATALOG, catalog_tensors
from medvisionllama.llm.families import Family, family_of
from medvisionllama.llm.lora import add_lora
from medvisionllama.llm.sources import LayerTensors, read_folder, read_model_config, resolve_layers
from medvisionllama.types import Tokens

Weights = Literal["pretrained", "random"]


class FrozenBlock(nn.Module):
    """Consecutive layers, then the model's last norm if asked for.

    Build it with `from_pretrained`.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        norm: nn.Module | None,
        rotary: nn.Module | None,
        *,
        config: Any,
        causal: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm
        self.rotary = rotary
        self.config = config
        self.width: int = config.hidden_size
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.causal = causal
        self.name = name
        self.requires_grad_(requires_grad=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "smollm2-135m",
        *,
        layers: Sequence[int] = (-1,),
        rotary: bool = False,
        causal: bool = False,
        final_norm: bool = True,
        weights: Weights = "pretrained",
        lora_rank: int = 0,
        lora_targets: Sequence[str] = ("q_proj", "v_proj"),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Read the tensors of some layers, and no others, into the family's own layer class.

        Args:
            source: a name of the catalogue, or a folder with config.json and safetensors.
            layers: positions from the front, or from the back if negative.
            rotary: give the tokens their place in the sequence, as the language model would.
            causal: let a token see only those before it, as the language model would.
            final_norm: apply the model's last norm to the output.
            weights: `pretrained`, or `random` from the family's own initialiser (needs no checkpoint).
            lora_rank: rank of a trainable update of `lora_targets`; 0 for none.
            seed: of the random weights.

        Raises:
            BlockError: unknown source, family or layer, damaged files, or a download that fails.

        >>> block = FrozenBlock.from_pretrained("smollm2-135m", weights="random")
        >>> block(torch.zeros(1, 5, block.width)).shape
        torch.Size([1, 5, 576])
        """
        settings = _settings(source)
        family = family_of(settings["model_type"])
        config = family.make_config(settings)
        positions = resolve_layers(layers, config.num_hidden_layers)
        if not positions:
            raise BlockError("no layer was asked for; give at least one, as layers=(-1,)")
        if weights == "pretrained":
            modules, norm = _filled(family, config, _tensors(source, positions, family), dtype)
        else:
            modules, norm = _random(family, config, len(positions), seed, dtype)
        # The angles are computed, not loaded, and are cheap; they must not live on the meta device.
        angles = family.load_class(family.rotary_class)(config) if rotary else None
        for layer in modules:
            layer.self_attn.is_causal = causal  # type: ignore[union-attr]
        numbers = ",".join(str(position) for position in positions)
        block = cls(
            modules,
            norm if final_norm else None,
            angles,
            config=config,
            causal=causal,
            name=f"{Path(source).name}:{numbers}:{weights}",
        )
        if lora_rank:
            add_lora(block.layers, rank=lora_rank, targets=lora_targets, family=family)
        return block

    def forward(self, tokens: Tokens) -> Tokens:
        """Map `[b, n, width]` to `[b, n, width]`."""
        places = self._positions(tokens)
        # transformers' plain path masks nothing by itself, so it serves only where nothing is masked.
        plain = not self.causal and plain_is_faster(tokens)
        self.config._attn_implementation = "eager" if plain else "sdpa"
        for layer in self.layers:
            tokens = layer(tokens, attention_mask=None, position_embeddings=places, is_causal=self.causal)
        return tokens if self.norm is None else self.norm(tokens)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Everything that must never change, under names that LoRA does not alter."""
        return {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.named_parameters()
            if ".lora_" not in name
        }

    def sha256(self) -> str:
        """Hash of the frozen tensors' names and bytes."""
        return tensors_sha256(self.frozen_tensors())

    def _positions(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        if self.rotary is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device)[None]
            cosine, sine = self.rotary(tokens, places)
            return cosine, sine
        # Turning by an angle of zero leaves queries and keys as they are.
        shape = (1, 1, self.head_dim)
        return tokens.new_ones(shape), tokens.new_zeros(shape)


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hash names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(source: str | Path) -> dict[str, Any]:
    if str(source) in CATALOG:
        return CATALOG[str(source)].settings
    folder = Path(source)
    if not folder.is_dir():
        raise BlockError(f"{str(source)!r} is neither a folder nor in the catalogue ({', '.join(CATALOG)})")
    return read_model_config(folder)


def _tensors(source: str | Path, positions: Sequence[int], family: Family) -> LayerTensors:
    if str(source) in CATALOG:
        return catalog_tensors(CATALOG[str(source)], positions)
    return read_folder(Path(source), positions, family=family)


def _filled(
    family: Family, config: Any, tensors: LayerTensors, dtype: torch.dtype
) -> tuple[nn.ModuleList, nn.Module]:
    with torch.device("meta"):
        modules = nn.ModuleList(family.make_layer(config, index) for index in range(len(tensors.layers)))
        norm = family.make_norm(config)
    for module, content in zip([*modules, norm], [*tensors.layers, tensors.norm], strict=True):
        _fill(module, content, dtype)
    return modules, norm


def _fill(module: nn.Module, content: dict[str, Tensor], dtype: torch.dtype) -> None:
    wanted = {name: parameter.shape for name, parameter in module.named_parameters()}
    for name, shape in wanted.items():
        if name not in content:
            raise BlockError(f"the checkpoint lacks {name}; check that config.json belongs to these weights")
        if content[name].shape != shape:
            raise BlockError(
                f"the checkpoint's {name} has shape {tuple(content[name].shape)}, config.json implies {tuple(shape)}; they do not belong together"
            )
    module.load_state_dict({name: content[name].to(dtype) for name in wanted}, assign=True)


def _random(
    family: Family, config: Any, num_layers: int, seed: int, dtype: torch.dtype
) -> tuple[nn.ModuleList, nn.Module]:
    with torch.device("meta"):
        modules = nn.ModuleList(family.make_layer(config, index) for index in range(num_layers))
        norm = family.make_norm(config)
    modules, norm = modules.to_empty(device="cpu").to(dtype), norm.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for module in (*modules, norm):
        for name, parameter in module.named_parameters():
            # The family's own initialiser: normal matrices, unit norms, zero biases.
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return modules, norm
