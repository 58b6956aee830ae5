"""From settings to a network: the only place in `networks/` that knows the configuration."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, assert_never

import torch
from torch import Tensor, nn

from medvisionllama.config import BlockConfig, NetworkConfig
from medvisionllama.errors import ConfigError
from medvisionllama.llm import FrozenBlock, embed_prompt
from medvisionllama.llm.prompt import empty_prompt
from medvisionllama.networks.context import has_context
from medvisionllama.networks.embeds import PatchEmbed, StemEmbed
from medvisionllama.networks.heads import LinearHead, SkipHead, UpsampleHead
from medvisionllama.networks.inserts import LLMInsert, MLPInsert
from medvisionllama.networks.matching import Match, deeper, ratio_for, wider
from medvisionllama.networks.monai_nets import build_rival
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.sizes import Sizes, sizes_of
from medvisionllama.networks.vit import VisionTransformer, grid_after
from medvisionllama.types import NetworkShapes, SizeCriterion, Triple


class _Skips(TypedDict):
    """What stem and skip head must agree on; `grid` is what the strides leave of the crop."""

    channels: Triple
    strides: Sequence[Triple]
    tokens: bool
    context: tuple[int, int] | None
    grid: Triple


def build_network(
    config: NetworkConfig,
    *,
    num_channels: int,
    num_outputs: int,
    crop_size: Triple,
    strides: Sequence[Triple],
    seed: int = 0,
) -> TokenSegmenter:
    """Build the network of a run.

    Args:
        crop_size: voxels of the input; fixes the number of learned positions.
        strides: downsampling of the stem's two further stages and of the tokens, for the skip head.

    Raises:
        BlockError: the block cannot be had.
    """
    if config.architecture != "tokens":
        rival = build_rival(
            config.architecture,
            num_channels=num_channels,
            num_outputs=num_outputs,
            crop_size=crop_size,
            strides=strides,
            base_channels=config.base_channels,
        )
        _check_norms(rival)
        return rival
    skips = config.head == "skip"
    stride = [math.prod(steps) for steps in zip(*strides, strict=True)] if skips else [config.patch_size] * 3
    if any(size % step for size, step in zip(crop_size, stride, strict=True)):
        raise ConfigError(
            f"the crop {tuple(crop_size)} is not a multiple of the token stride {tuple(stride)}"
        )
    embed: StemEmbed | PatchEmbed
    head: nn.Module
    if skips:
        _check_stem(crop_size, strides)
        grid = grid_after(crop_size, stride)
        context = config.context_channels if has_context(grid) else None
        shared = _Skips(
            channels=config.stem_channels, strides=strides, tokens=config.tokens, context=context, grid=grid
        )
        embed = StemEmbed(num_channels, config.width, **shared)
        head = SkipHead(
            config.width,
            num_outputs,
            **shared,
            join_convolutions=config.join_convolutions,
            refine=config.refine,
        )
    else:
        embed = PatchEmbed(num_channels, config.width, patch_size=config.patch_size)
        kind = LinearHead if config.head == "linear" else UpsampleHead
        head = kind(config.width, num_outputs, patch_size=config.patch_size)
    if not config.tokens:
        return TokenSegmenter(embed, nn.Identity(), nn.Identity(), nn.Identity(), head)
    grid = grid_after(crop_size, embed.stride)
    first = config.positions == "before_encoder"
    encoder = _transformer(config, config.insert_after, grid if first else None)
    decoder = _transformer(config, config.depth - config.insert_after, None if first else grid)
    return TokenSegmenter(embed, encoder, build_insert(config, grid=grid, seed=seed), decoder, head)


def _check_stem(crop_size: Triple, strides: Sequence[Triple]) -> None:
    """Raise ConfigError if the stem ends with a single cell, of which an instance norm has nothing to scale."""
    stem = grid_after(crop_size, [math.prod(steps) for steps in zip(*strides[:2], strict=True)])
    if math.prod(stem) == 1:
        raise ConfigError(
            f"the first two of data.strides={[list(steps) for steps in strides]} leave one cell of the crop {tuple(crop_size)}; choose smaller ones, or a larger data.crop_size"
        )


def _check_norms(network: nn.Module) -> None:
    """Raise ConfigError for batch norms: a run saves and averages trainable weights, not what such a norm saw."""
    for name, module in network.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise ConfigError(
                f"{name} keeps running statistics ({type(module).__name__}), which a run does not save; build the network with instance or group norms"
            )


def build_meta_network(config: NetworkConfig, **shapes: Unpack[NetworkShapes]) -> TokenSegmenter:
    """Build the network with shapes and no values: without its memory, and no weights are read or fetched.

    Rotary positions are left out: they have no parameter, and not all of transformers computes them there.

    Raises:
        BlockError: the block is unknown, or the tokenizer of its prompt is not here.
    """
    block = config.block.model_copy(update={"rotary": False})
    # LoRA is drawn before it is let go.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_network(config.model_copy(update={"block": block}), **shapes)


def network_sizes(config: NetworkConfig, **shapes: Unpack[NetworkShapes]) -> Sizes:
    """Count a network's parameters and the operations of one crop; see `networks/sizes.py` for what counts.

    Raises:
        BlockError: the block is unknown, or the tokenizer of its prompt is not here.
    """
    network = build_meta_network(config, **shapes)
    return sizes_of(network, num_channels=shapes["num_channels"], crop_size=shapes["crop_size"])


def match_mlp(
    config: NetworkConfig, target: Sizes, *, by: SizeCriterion, **shapes: Unpack[NetworkShapes]
) -> Match:
    """Find the MLP that, in the insert's place, makes the network as large as `target`; a gate stays.

    Raises:
        ConfigError: no MLP is small enough, or the network has no place for one.
    """
    _check_insertable(config)

    def sizes_at(hidden: int) -> Sizes:
        return network_sizes(
            _changed(config, insert="mlp", insert_mlp_ratio=ratio_for(config.width, hidden)), **shapes
        )

    return wider(target, sizes_at, by=by, width=config.width)


def match_depth(
    config: NetworkConfig, target: Sizes, *, by: SizeCriterion, **shapes: Unpack[NetworkShapes]
) -> Match:
    """Find the depth that, without an insert, brings the network nearest to `target`; one more block at least.

    Raises:
        ConfigError: the network without an insert is as large already, or has no transformer.
    """
    _check_insertable(config)

    def sizes_at(depth: int) -> Sizes:
        return network_sizes(_changed(config, insert="none", depth=depth), **shapes)

    return deeper(target, sizes_at, by=by, depth=config.depth)


def build_insert(config: NetworkConfig, *, grid: Triple, seed: int = 0) -> nn.Module:
    """Build what sits between encoder and decoder.

    Args:
        grid: number of tokens along x, y, z.
    """
    gated = config.gate == "zero"
    if config.insert == "none":
        return nn.Identity()
    if config.insert == "mlp":
        ratio = config.insert_mlp_ratio or config.mlp_ratio
        return MLPInsert(config.width, ratio=ratio, dropout=config.dropout, gated=gated)
    if config.insert == "llm":
        return LLMInsert(
            config.width,
            build_block(config.block, seed=seed),
            mapper=config.mapper,
            rank=config.mapper_rank,
            gated=gated,
            seed=seed,
            grid=grid,
            prompt=build_prompt(config.block, seed=seed),
        )
    assert_never(config.insert)


def check_insert(config: NetworkConfig) -> None:
    """Build the insert and let it go: what it needs is fetched, or found missing, before scans are prepared.

    Raises:
        BlockError: a source, layer, projection or prompt that does not exist.
    """
    if config.has_tokens:
        build_insert(config, grid=(1, 1, 1))


def build_block(config: BlockConfig, *, seed: int = 0) -> FrozenBlock:
    """Build the frozen block."""
    device = "meta" if _shapes_only() else "cpu"
    # What a family computes, and does not store, needs values even then.
    with torch.device("cpu"):
        return FrozenBlock.from_pretrained(
            config.source,
            layers=config.layers,
            rotary=config.rotary,
            causal=config.causal,
            final_norm=config.final_norm,
            weights=config.weights,
            frozen=config.frozen,
            lora_rank=config.lora_rank,
            lora_targets=config.lora_targets,
            storage=config.storage,
            dtype=getattr(torch, config.dtype),
            gradient_checkpointing=config.gradient_checkpointing,
            device=device,
            seed=seed,
        )


def build_prompt(config: BlockConfig, *, seed: int = 0) -> Tensor | None:
    """Build the prompt's rows, if there is a prompt."""
    if not config.prompt:
        return None
    if _shapes_only():
        return empty_prompt(config.source, config.prompt)
    return embed_prompt(config.source, config.prompt, control=config.prompt_control, seed=seed)


def _transformer(config: NetworkConfig, depth: int, positions: Triple | None) -> VisionTransformer:
    return VisionTransformer(
        depth,
        width=config.width,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        positions=positions,
    )


def _changed(config: NetworkConfig, **changes: Any) -> NetworkConfig:
    return NetworkConfig.model_validate(config.model_dump() | changes)


def _check_insertable(config: NetworkConfig) -> None:
    if not config.has_tokens:
        raise ConfigError(
            "network.tokens=false has no transformer to match; set network.tokens=true or leave the matched arm out"
        )


def _shapes_only() -> bool:
    """Whether this is `build_meta_network`."""
    return torch.empty(0).is_meta
