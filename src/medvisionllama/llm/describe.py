"""`list_models` and `show`: what a source is and what its block costs, without reading a tensor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medvisionllama.errors import BlockError
from medvisionllama.llm.cache import BlockCache
from medvisionllama.llm.catalog import CATALOG, CatalogEntry
from medvisionllama.llm.families import family_of
from medvisionllama.llm.fetched import FetchedSource
from medvisionllama.llm.filling import empty_layers
from medvisionllama.llm.gguf import GgufSource
from medvisionllama.llm.hub import cache_of
from medvisionllama.llm.reader import CheckpointReader
from medvisionllama.llm.sources import Source, open_source, resolve_layers


def list_models() -> list[dict[str, Any]]:
    """Tell name, family, width, layers, megabytes of a layer, licence and state of each model of the catalogue."""
    return [
        {
            "name": entry.name,
            "family": family_of(entry.settings["model_type"]).name,
            "width": entry.settings["hidden_size"],
            "layers": entry.settings["num_hidden_layers"],
            "MB/layer": round(layer_parameters(entry) * entry.bytes_per_parameter / 1e6, 1),
            "licence": entry.licence.replace(" Community License", "").replace(" Terms of Use", ""),
            "state": _state(entry),
        }
        for entry in CATALOG.values()
    ]


def _state(entry: CatalogEntry) -> str:
    kept = (BlockCache(entry.name) if entry.wheel else cache_of(entry.repo)).layers()
    if kept:
        return f"cached: {kept[0]}" if len(kept) == 1 else f"{len(kept)} cached"
    return "gated" if entry.gated else "can be pulled"


def show(source: str | Path, *, layers: Sequence[int] = (-1,)) -> dict[str, Any]:
    """Tell family, sizes, positions, mask, and the bytes of some layers against those of the checkpoint.

    Raises:
        BlockError: no such source or layer.
    """
    opened = open_source(source)
    entry = CATALOG.get(str(source))
    family = family_of(opened.settings["model_type"])
    config = family.make_config(opened.settings)
    positions = resolve_layers(layers, config.num_hidden_layers)
    modules, norm = empty_layers(family, config, positions)
    parameters = sum(
        parameter.numel() for module in (*modules, norm) if module for parameter in module.parameters()
    )
    block_bytes, total = _block_bytes(opened, positions, parameters, entry), _checkpoint_bytes(opened)
    heads = config.num_attention_heads
    return {
        "name": opened.name,
        "title": entry.title if entry else None,
        "family": family.name,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "positions": "rotary" if family.rotary_class else "none (the model adds them to its embeddings)",
        "mask": "causal" if family.is_causal(config) else "none",
        "layers": list(positions),
        "parameters": parameters,
        "block_bytes": block_bytes,
        "checkpoint_bytes": total,
        "share_of_checkpoint": round(block_bytes / total, 6) if total else None,
        "licence": entry.licence if entry else None,
        "gated": entry.gated if entry else None,
        "cached_layers": list(opened.cache.layers()) if isinstance(opened, FetchedSource) else None,
        "folder": str(opened.cache.folder) if isinstance(opened, FetchedSource) else str(Path(source)),
    }


def layer_parameters(entry: CatalogEntry) -> int:
    """Count the parameters of one layer of a catalogue's model, the last one."""
    family = family_of(entry.settings["model_type"])
    config = family.make_config(entry.settings)
    (layer,), _ = empty_layers(family, config, [config.num_hidden_layers - 1])
    return sum(parameter.numel() for parameter in layer.parameters())


def _block_bytes(
    opened: Source, positions: Sequence[int], parameters: int, entry: CatalogEntry | None
) -> int:
    """As the checkpoint stores them: from its directory if it lies here, else from the type of its numbers."""
    if entry:
        return int(parameters * entry.bytes_per_parameter)
    if isinstance(opened, CheckpointReader | GgufSource):
        try:
            return opened.layer_bytes(positions, family_of(opened.settings["model_type"]))
        except BlockError:
            pass  # a folder without weights still has a configuration
    dtype = getattr(torch, str(opened.settings.get("dtype") or opened.settings.get("torch_dtype")), None)
    return parameters * (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize


def _checkpoint_bytes(opened: Source) -> int | None:
    try:
        return opened.checkpoint_bytes()
    except BlockError:
        return None
