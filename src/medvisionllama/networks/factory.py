"""From settings to a network: the only place in `networks/` that knows the configuration."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medvisionllama.config import BlockConfig, NetworkConfig
from medvisionllama.errors import ConfigError
from medvisionllama.llm import FrozenBlock, embed_prompt
from medvisionllama.networks.embeds import PatchEmbed, StemEmbed
from medvisionllama.networks.heads import LinearHead, SkipHead, UpsampleHead
from medvisionllama.networks.inserts import LLMInsert, MLPInsert
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.vit import VisionTransformer, grid_after
from medvisionllama.types import Triple


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
    embed: nn.Module
    head: nn.Module
    if config.head == "skip":
        embed = StemEmbed(
            num_channels, config.width, channels=config.stem_channels, strides=strides, tokens=config.tokens
        )
        head = SkipHead(
            config.width, num_outputs, channels=config.stem_channels, strides=strides, tokens=config.tokens
        )
        stride: Sequence[int] = [a * b * c for a, b, c in zip(*strides, strict=True)]
    else:
        embed = PatchEmbed(num_channels, config.width, patch_size=config.patch_size)
        kind = LinearHead if config.head == "linear" else UpsampleHead
        head = kind(config.width, num_outputs, patch_size=config.patch_size)
        stride = [config.patch_size] * 3
    if any(size % step for size, step in zip(crop_size, stride, strict=True)):
        raise ConfigError(
            f"the crop {tuple(crop_size)} is not a multiple of the token stride {tuple(stride)}"
        )
    if not config.tokens:
        return TokenSegmenter(embed, nn.Identity(), nn.Identity(), nn.Identity(), head)
    grid = grid_after(crop_size, stride)
    first = config.positions == "before_encoder"
    encoder = _transformer(config, config.insert_after, grid if first else None)
    decoder = _transformer(config, config.depth - config.insert_after, None if first else grid)
    return TokenSegmenter(embed, encoder, build_insert(config, grid=grid, seed=seed), decoder, head)


def build_insert(config: NetworkConfig, *, grid: Triple, seed: int = 0) -> nn.Module:
    """Build what sits between encoder and decoder.

    Args:
        grid: number of tokens along x, y, z.
    """
    gated = config.gate == "zero"
    if config.insert == "none":
        return nn.Identity()
    if config.insert == "mlp":
        return MLPInsert(config.width, ratio=config.mlp_ratio, dropout=config.dropout, gated=gated)
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


def check_insert(config: NetworkConfig) -> None:
    """Build the insert and let it go: what it needs is fetched, or found missing, before scans are prepared.

    Raises:
        BlockError: a source, layer, projection or prompt that does not exist.
    """
    if config.tokens:
        build_insert(config, grid=(1, 1, 1))


def build_block(config: BlockConfig, *, seed: int = 0) -> FrozenBlock:
    """Build the frozen block."""
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
        seed=seed,
    )


def build_prompt(config: BlockConfig, *, seed: int = 0) -> Tensor | None:
    """Build the prompt's rows, if there is a prompt."""
    if not config.prompt:
        return None
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
