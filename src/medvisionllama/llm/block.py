"""`FrozenBlock`: some layers of a pretrained language model as a module from tokens to tokens.

Unlike the language model itself: no causal mask and no rotary positions unless asked for, since visual tokens
have no reading order and bring their own positions; no embedding, no cache, no output head, never any dropout;
nothing is trained but an optional LoRA update.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvisionllama.autocast import autocast_dtype
from medvisionllama.errors import BlockError
from medvisionllama.llm.attention import register
from medvisionllama.llm.controls import NEEDS_CHECKPOINT, WEIGHTS, stream
from medvisionllama.llm.families import Family, family_of
from medvisionllama.llm.filling import empty_layers, filled_layers, initialised_layers
from medvisionllama.llm.int8 import store_as_int8
from medvisionllama.llm.lora import add_lora
from medvisionllama.llm.rotary import (
    ROTARY,
    Angles,
    axial_angles,
    cosine_at_origin,
    no_angles,
    sequence_angles,
)
from medvisionllama.llm.sources import open_source, resolve_layers
from medvisionllama.types import BlockStorage, BlockWeights, Rotary, Tokens

STORAGE: tuple[BlockStorage, ...] = get_args(BlockStorage)


class FrozenBlock(nn.Module):
    """Layers of a language model, one after the other, then its last norm if asked for.

    Build it with `from_pretrained`.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        norm: nn.Module | None,
        rotary: nn.Module | None,
        *,
        family: Family,
        config: Any,
        positions: Sequence[int],
        mode: Rotary,
        causal: bool,
        gradient_checkpointing: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(FrozenBlock.refuse_another)
        self.is_frozen = True
        self.layers = layers
        self.norm = norm
        self.rotary = rotary if mode else None
        self.mode = mode
        self.causal = causal
        self.gradient_checkpointing = gradient_checkpointing
        self.config = config
        self.width: int = config.hidden_size
        self.name = name
        self._hides_what_follows = causal and family.is_causal(config)
        self._windows = [family.window(config, position) if causal else None for position in positions]
        self._kinds = [family.rotary_kind(config, position) for position in positions]
        kinds = dict.fromkeys(self._kinds)
        with family.refusing_nonsense():
            cosines = {} if rotary is None else {kind: cosine_at_origin(rotary, kind) for kind in kinds}
        self._turned = list(cosines)
        for kind, cosine in cosines.items():
            # A buffer moves with the block; else a GPU would wait in each call for its copy.
            self.register_buffer(f"at_origin_{kind}", cosine, persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "smollm2-135m",
        *,
        layers: int | Sequence[int] = (-1,),
        rotary: Rotary = False,
        causal: bool = False,
        final_norm: bool = True,
        weights: BlockWeights = "pretrained",
        seed: int = 0,
        lora_rank: int = 0,
        lora_targets: str | Sequence[str] = (),
        frozen: bool = True,
        storage: BlockStorage = "full",
        gradient_checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read the tensors of some layers, and no others, into the family's own layer class.

        Args:
            source: a name of the catalogue, a folder, a file of safetensors or GGUF, or a Hub id `org/name`.
            layers: positions from the front, or from the back if negative.
            rotary: True gives the tokens their place in the sequence, as the language model would; `3d` gives them
                their places along the scan's axes, which each call must tell. No effect where the language model
                adds positions to its embeddings instead (GPT-2, OPT, BioGPT, BERT, RoBERTa).
            causal: mask attention as the language model does: a decoder's token sees only those before it, and only
                within its layer's window if it has one; BERT and RoBERTa mask nothing.
            final_norm: apply the model's last norm to the output, if it has one.
            weights: `pretrained`, or a control: `random` from the family's own initialiser (reads no weights),
                `moment_matched` (random, each tensor with its own mean and standard deviation), `permuted` (each
                tensor's own values, shuffled), `identity` (no layer at all).
            seed: of the control.
            lora_rank: rank of a trainable update of `lora_targets`; 0 for none.
            lora_targets: projections, by default query and value.
            frozen: False trains the block like any other module: the control for freezing it.
            storage: `int8` keeps the matrices as 8-bit integers.
            gradient_checkpointing: compute each layer again in the backward pass, so none keeps its activations.
            device: `meta` gives shapes without memory, and reads no weights.

        Raises:
            BlockError: unknown source, family or layer, damaged files, options that exclude each other, or a
                download that fails.

        >>> block = FrozenBlock.from_pretrained("smollm2-135m", weights="random")
        >>> block(torch.zeros(1, 5, block.width)).shape
        torch.Size([1, 5, 576])
        """
        layers = [layers] if isinstance(layers, int) else layers
        lora_targets = [lora_targets] if isinstance(lora_targets, str) else lora_targets
        _check_options(weights, rotary, storage=storage, frozen=frozen, dtype=dtype, layers=layers)
        _check_lora(lora_rank, lora_targets, weights, frozen=frozen)
        opened = open_source(source)
        family = family_of(opened.settings["model_type"])
        config = family.make_config(opened.settings)
        positions = resolve_layers(layers, config.num_hidden_layers)
        if not positions:
            raise BlockError("no layer was asked for; give at least one, as layers=(-1,)")
        if weights == "identity":
            modules, norm = nn.ModuleList(), None
        elif torch.device(device).type == "meta":
            modules, norm = empty_layers(family, config, positions)
            for module in (modules, norm):
                if module is not None:
                    module.to(dtype)
        elif weights in NEEDS_CHECKPOINT:
            modules, norm = filled_layers(
                opened, family, config, positions, weights=weights, seed=seed, dtype=dtype, device=device
            )
        else:
            modules, norm = initialised_layers(
                family, config, positions, seed=seed, dtype=dtype, device=device
            )
        numbers = ",".join(str(position) for position in positions)
        block = cls(
            modules,
            norm if final_norm else None,
            # The angles are computed, not loaded, and are cheap.
            family.make_rotary(config),
            family=family,
            config=config,
            positions=positions if modules else (),
            mode=rotary,
            causal=causal,
            gradient_checkpointing=gradient_checkpointing,
            name=f"{opened.name}:{numbers}:{weights}",
        )
        block.requires_grad_(not frozen)
        block.is_frozen = frozen
        if lora_rank and modules:
            # With random numbers of its own, so that everything else begins as it does without LoRA.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(stream(seed, "lora"))
                add_lora(block.layers, rank=lora_rank, targets=lora_targets, family=family)
        if storage == "int8":
            store_as_int8(block.layers)
        return block.to(device).train(block.training)

    @property
    def needs_positions(self) -> bool:
        """Whether each call must tell the tokens' places along the axes."""
        return self.mode == "3d" and self.rotary is not None

    def forward(self, tokens: Tokens, *, positions: Tensor | None = None) -> Tokens:
        """Map `[b, n, width]` to `[b, n, width]`, in the tokens' own precision whatever the block is kept in.

        Args:
            positions: places `[n]` in a sequence (by default 0 to n - 1), or `[n, 3]` along x, y, z for `3d`.

        Raises:
            ValueError: tokens or positions of another shape.
            BlockError: within `nn.DataParallel`.
        """
        if getattr(self, "_is_replica", False):
            raise BlockError("nn.DataParallel cannot copy this block; use DistributedDataParallel")
        if tokens.ndim != 3 or tokens.shape[-1] != self.width:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, the block needs [b, n, {self.width}]")
        given = tokens.dtype
        if autocast_dtype(tokens.device.type) is None:
            tokens = tokens.to(self._kept_dtype(given))
        angles = self._angles(tokens, positions)
        for layer, window, kind in zip(self.layers, self._windows, self._kinds, strict=True):
            mask, is_causal = self._visibility(tokens.shape[1], window, tokens.device)
            known: dict[str, Any] = {"attention_mask": mask, "is_causal": is_causal}
            if kind in angles:
                known["position_embeddings"] = angles[kind]
            run = partial(layer, **known)
            keeps = not (self.gradient_checkpointing and self.training and torch.is_grad_enabled())
            tokens = run(tokens) if keeps else checkpoint(run, tokens, use_reentrant=False)
        return (tokens if self.norm is None else self.norm(tokens)).to(given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process our attention is not known yet."""
        super().__setstate__(state)
        register()

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - PyTorch's signature
        """Set the mode of the block; its layers stay in evaluation, where they drop nothing out."""
        super().train(mode)
        self.layers.eval()
        return self

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Everything that came from the language model, under names that LoRA does not alter."""
        return {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.named_parameters()
            if ".lora_" not in name
        }

    def refuse_another(self, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
        """Let `load_state_dict` replace no frozen weights by others: a control would be one by its name alone.

        Raises:
            BlockError: the state has another block under these names.
        """
        for name, own in self.state_dict().items() if self.is_frozen else ():
            new = state.get(prefix + name)
            if ".lora_" in name or own.is_meta or new is None or new.shape != own.shape:
                continue
            if not torch.equal(own.cpu(), new.detach().cpu().to(own.dtype)):
                raise BlockError(
                    f"these weights hold another frozen block than {self.name} ({name} differs); load the trainable ones alone (medvisionllama.checkpoint.trainable)"
                )

    def sha256(self) -> str:
        """Hash of these tensors' names and bytes."""
        return tensors_sha256(self.frozen_tensors())

    def _kept_dtype(self, default: torch.dtype) -> torch.dtype:
        """Precision of the layers, which 8-bit storage leaves to their norms and scales."""
        dtypes = (value.dtype for value in self.parameters() if value.is_floating_point())
        return next(dtypes, default)

    def _angles(self, tokens: Tensor, positions: Tensor | None) -> dict[str | None, Angles]:
        """Angles for each kind of layer; empty for families that have none."""
        if not self._turned:
            return {}
        # Angles in the products' precision keep queries and keys in it.
        dtype = autocast_dtype(tokens.device.type) or tokens.dtype
        like = tokens.new_empty(0, dtype=dtype)
        if self.rotary is None:
            return {kind: no_angles(getattr(self, f"at_origin_{kind}"), like) for kind in self._turned}
        if positions is None:
            if self.needs_positions:
                raise ValueError(
                    "rotary='3d' needs positions of shape [n, 3]: each token's place along x, y, z"
                )
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        wanted = (tokens.shape[1], 3) if self.needs_positions else (tokens.shape[1],)
        if tuple(positions.shape) != wanted:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}, rotary={self.mode!r} needs {wanted}"
            )
        angles = axial_angles if self.needs_positions else sequence_angles
        return {kind: angles(self.rotary, positions, like, kind) for kind in self._turned}

    def _visibility(
        self, length: int, window: int | None, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        """What a layer's tokens may see: a mask `[n, n]` that is True there, or the kernel's own causal mode."""
        if window is None or length <= window + 1:
            return None, self._hides_what_follows
        row = torch.arange(length, device=device)
        distance = row[:, None] - row[None]
        near = distance.abs() <= window
        return (near & (distance >= 0) if self._hides_what_follows else near), False


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hash names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_options(
    weights: BlockWeights,
    rotary: Rotary,
    *,
    storage: BlockStorage,
    frozen: bool,
    dtype: torch.dtype,
    layers: Sequence[int],
) -> None:
    choices = (("weights", weights, WEIGHTS), ("rotary", rotary, ROTARY), ("storage", storage, STORAGE))
    for option, value, known in choices:
        # 1 equals True, and is no choice.
        if not any(value is choice or (value == choice and isinstance(value, str)) for choice in known):
            raise BlockError(f"{option}={value!r} is not known; known: {', '.join(map(repr, known))}")
    if not all(isinstance(layer, int) for layer in layers):
        raise BlockError(f"layers={layers!r} is not known; give numbers, as layers=(-1,) or range(28, 30)")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BlockError(
            f"dtype={dtype!r} cannot hold a block; give torch.float32, bfloat16, float16 or float64"
        )
    if storage == "int8" and dtype == torch.float16:
        raise BlockError(
            "products with 8-bit integers overflow float16; give torch.bfloat16 or storage='full'"
        )
    if storage == "int8" and not frozen:
        raise BlockError("8-bit integers cannot be trained; give frozen=False or storage='int8', not both")


def _check_lora(rank: int, targets: Sequence[str], weights: BlockWeights, *, frozen: bool) -> None:
    if rank < 0:
        raise BlockError(f"lora_rank={rank} is negative; 0 leaves LoRA out")
    if targets and not rank:
        raise BlockError(f"lora_targets={targets!r} has no effect without lora_rank; give both")
    if rank and weights == "identity":
        raise BlockError("weights='identity' has no layer for LoRA; leave out lora_rank")
    if rank and not frozen:
        raise BlockError("an unfrozen block needs no LoRA; give frozen=False or lora_rank, not both")
