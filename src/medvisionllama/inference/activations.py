"""Token maps of a trained network: what its own tokens look like at each stage, on the scan's own grid.

Everything is read off the network's forward pass by hooks; nothing is added to it. Two kinds of maps:

`norm`, the length of each token's vector after a stage. After the block that is after its last layer and before the
language model's last norm, which would make all lengths nearly equal.
`attention`, how much attention each token receives in a stage's last layer, averaged over heads and queries; the
unit is an even share.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvisionllama.inference.predictor import Member, PreparedScan
from medvisionllama.inference.slabs import native_slabs, slab_thickness
from medvisionllama.inference.windows import slab_axis
from medvisionllama.llm.attention_weights import Attending, attention_received, watching
from medvisionllama.networks.inserts import LLMInsert, MLPInsert
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.vit import SelfAttention, TransformerBlock
from medvisionllama.types import Triple


class MapName(NamedTuple):
    """Which map: after which stage, and of what kind."""

    stage: str
    kind: str


STAGES = ("encoder", "vd1", "block", "vd2", "mlp", "decoder")
"""In the order of the data flow; no network has all of them."""
KINDS = ("norm", "attention")


def stages_of(network: TokenSegmenter) -> dict[str, nn.Module]:
    """The module whose output is a stage's tokens, for each stage that the network has."""
    insert, inside = network.insert, dict[str, nn.Module]()
    if isinstance(insert, LLMInsert):
        inside = {"vd1": insert.vd1, "vd2": insert.vd2}
        if len(insert.block.layers):
            inside["block"] = insert.block.layers[-1]
    elif isinstance(insert, MLPInsert):
        inside = {"mlp": insert}
    found = {"encoder": network.encoder, **inside, "decoder": network.decoder}
    return {stage: found[stage] for stage in STAGES if stage in found}


def token_maps(network: TokenSegmenter, windows: Tensor) -> dict[MapName, Tensor]:
    """Run the network once and return its maps `[b, x, y, z]`, one number a token.

    Raises:
        ValueError: a network without tokens.
    """
    with recorded(network) as record:
        network(windows)
    shape = record.grid
    if shape is None:
        raise ValueError("this network has no tokens")
    names = [MapName(stage, kind) for stage in STAGES for kind in KINDS]
    return {name: record.maps[name].unflatten(1, shape) for name in names if name in record.maps}


class Record:
    """What the hooks saw in the latest forward pass: a number per token `[b, n]` for each map."""

    def __init__(self) -> None:
        self.maps: dict[MapName, Tensor] = {}
        self.grid: Triple | None = None

    def note_grid(self, embedded: tuple[Tensor | None, list[Tensor]]) -> None:
        """Keep the shape of the token grid, from what an embedding returns."""
        grid = embedded[0]
        self.grid = None if grid is None else (grid.shape[2], grid.shape[3], grid.shape[4])

    def note_norm(self, stage: str, num_before: int, tokens: Tensor) -> None:
        """Keep the lengths of a stage's tokens, but for a prompt's before them."""
        lengths = torch.linalg.vector_norm(tokens[:, num_before:].detach().float(), dim=-1)
        self.maps[MapName(stage, "norm")] = lengths

    def note_own_attention(self, stage: str, attention: SelfAttention, projected: Tensor) -> None:
        """Keep the attention of one of our transformer blocks, from what its `qkv` gives."""
        query, key, value = attention.by_head(projected)
        attending = Attending(query, key, value, None, query.shape[-1] ** -0.5)
        self.maps[MapName(stage, "attention")] = attention_received(attending)

    def note_block_attention(
        self, inside: set[nn.Module], num_before: int, module: nn.Module, attending: Attending
    ) -> None:
        """Keep the attention of the frozen layer that is made of the modules `inside`."""
        if module in inside:
            self.maps[MapName("block", "attention")] = attention_received(attending, num_before=num_before)


@contextmanager
def recorded(network: TokenSegmenter) -> Iterator[Record]:
    """Hooks on the network that fill a record in each forward pass; they are gone when the context ends."""
    record, stages, words = Record(), stages_of(network), network.num_prompt_tokens
    with ExitStack() as hooks:

        def after(module: nn.Module, note: Callable[[Any], None]) -> None:
            # A hook that returns nothing leaves the output as it is.
            handle = module.register_forward_hook(lambda _module, _inputs, output: note(output))
            hooks.callback(handle.remove)

        after(network.embed, record.note_grid)
        for stage, module in stages.items():
            after(module, partial(record.note_norm, stage, words if stage == "block" else 0))
        for stage in ("encoder", "decoder"):
            layer = last_layer(stages[stage])
            if layer is not None:
                after(layer.attention.qkv, partial(record.note_own_attention, stage, layer.attention))
        if "block" in stages:
            inside = set(stages["block"].modules())
            hooks.enter_context(watching(partial(record.note_block_attention, inside, words)))
        yield record


def last_layer(transformer: nn.Module) -> TransformerBlock | None:
    """The last transformer block of an encoder or decoder, or None if it has no block."""
    layers = [module for module in transformer.modules() if isinstance(module, TransformerBlock)]
    return layers[-1] if layers else None


def native_maps(
    member: Member, scan: PreparedScan, *, on_share: Callable[[float], None] = lambda share: None
) -> dict[MapName, np.ndarray]:
    """Maps of a whole scan `[x, y, z]`, on its own grid in RAS, as float32.

    Where the network looks through windows, each window's maps are blended with the weights that blend its
    predictions. The scan is not mirrored. A token is drawn at the centre of the voxels it stands for in the head.

    Args:
        on_share: told after each slab which share of the scan is done.
    """
    network, plan = member.network, member.plan
    names: list[MapName] = []

    def stacked(windows: Tensor) -> Tensor:
        maps = token_maps(network, windows)
        names[:] = maps
        grid = torch.stack(list(maps.values()), dim=1)
        whole = [cells * step for cells, step in zip(grid.shape[2:], network.token_stride, strict=True)]
        x, y, z = windows.shape[2:]
        # The last token of an axis may reach past the window.
        return F.interpolate(grid, size=whole, mode="trilinear", align_corners=False)[..., :x, :y, :z]

    axis = slab_axis(scan.ras_shape, [plan])
    grid = scan.grid_of(plan)
    window = member.window(axis, scan.moments, stacked)
    planes = (piece[0] for piece in window.blended(torch.from_numpy(grid)))
    x, y, z = grid.shape[1:]
    thickness = slab_thickness(scan.ras_shape, len(STAGES) * len(KINDS), axis)
    slabs = native_slabs(planes, (x, y, z), scan.ras_shape, axis=axis, thickness=thickness)
    result = np.empty((0, *scan.ras_shape), np.float32)
    start = 0
    for slab in slabs:
        if not start:
            result = np.empty((len(names), *scan.ras_shape), np.float32)
        place = [slice(None)] * 4
        place[axis + 1] = slice(start, start + slab.shape[axis + 1])
        result[tuple(place)] = slab.numpy()
        start += slab.shape[axis + 1]
        on_share(start / scan.ras_shape[axis])
    return dict(zip(names, result, strict=True))


def token_size(member: Member, scan: PreparedScan) -> tuple[float, float, float]:
    """Edges of a token in voxels of the scan's own grid in RAS."""
    edges = np.array(member.network.token_stride)
    x, y, z = (edges * scan.ras_shape / scan.grid_of(member.plan).shape[1:]).tolist()
    return (x, y, z)
