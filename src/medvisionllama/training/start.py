"""What a run begins with, if not with nothing: the weights of an earlier run, as far as they fit.

A weight fits that has the same name and shape. Some fit in shape and not in meaning, and begin anew: outputs for
other classes, blocks of a transformer that is cut otherwise, an insert of another kind. Channels are found by their
names, and positions of another grid of tokens are interpolated.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medvisionllama._files import files_sha256
from medvisionllama.checkpoint import frozen, load_tensors, trainable
from medvisionllama.config import Config, NetworkConfig, read_config
from medvisionllama.data.planning import Plan, read_plan
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.llm.block import tensors_sha256
from medvisionllama.networks.factory import build_meta_network
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.vit import LearnedPositions
from medvisionllama.run_dir import RunDir
from medvisionllama.training.seen import Seen, seen_by

_MEANING = {
    "encoder": ("num_heads", "insert_after", "positions"),
    "decoder": ("num_heads", "insert_after", "positions"),
    "insert": ("insert", "mapper", "mapper_rank", "gate", "insert_mlp_ratio", "block"),
    # Refined, full resolution adds to the logits of stride 2; else it has all of them.
    "head.out": ("refine",),
    "head.out_coarse": ("refine",),
}
"""Settings that change what a part of the network computes, and no shape."""
_KEPT_OTHERWISE = {"dtype", "storage", "gradient_checkpointing"}
"""Settings of a block that change no result, or the frozen tensors, which are compared."""


@dataclass(frozen=True)
class Start:
    """An earlier run, read and not yet in any network."""

    run_dir: RunDir
    config: Config
    plan: Plan
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """What the weights' file tells of their network: among others `frozen_sha256`."""
    weights_sha256: str
    seen: Seen


@dataclass(frozen=True)
class _Layout:
    """What some weights of a network are for."""

    inputs: set[str]
    """Names of those that see the scan's channels."""
    outputs: set[str]
    positions: Mapping[str, LearnedPositions]


def read_start(run_dir: RunDir) -> Start:
    """Read an earlier run.

    Raises:
        CheckpointError: it is no run, has no weights yet, is damaged, or just gets others.
        ConfigError: its settings cannot be read.
    """
    run_dir.check()
    sha256 = files_sha256([run_dir.best])
    tensors, facts = load_tensors(run_dir.best)
    if files_sha256([run_dir.best]) != sha256:
        raise CheckpointError(f"{run_dir.path} is being trained; wait for its end, or begin with another run")
    config, plan = read_config(run_dir.config), read_plan(run_dir)
    return Start(run_dir, config, plan, tensors, facts, sha256, seen_by(run_dir))


@torch.no_grad()
def begin_with(network: TokenSegmenter, start: Start, *, config: Config, plan: Plan) -> dict[str, Any]:
    """Put an earlier run's weights into a new network, where they fit, and return what the manifest keeps of that.

    Args:
        config, plan: of the new run.

    Raises:
        ConfigError: no layer fits.
    """
    parameters = trainable(network)
    kept = _fitting(network, start, config, plan)
    positions = _positions(network)
    if not any(tensor.ndim > 1 and name not in positions for name, tensor in kept.items()):
        raise ConfigError(
            f"no layer of {start.run_dir.path} (preset {start.config.preset}) fits this network (preset {config.preset}); give --preset {start.config.preset} and its network.* settings, or begin without it"
        )
    for name, tensor in kept.items():
        parameters[name].copy_(tensor)
    return {
        "run": str(start.run_dir.path),
        "weights_sha256": start.weights_sha256,
        "kept_parameters": sum(tensor.numel() for tensor in kept.values()),
        "fresh": _layers([name for name in parameters if name not in kept], of=parameters),
        "unused": _layers(sorted(start.tensors.keys() - kept.keys()), of=start.tensors),
        "seen": start.seen,
    }


def started_words(facts: Mapping[str, Any], network: TokenSegmenter) -> str:
    """Say in one line what a run begins with."""
    num_parameters = sum(parameter.numel() for parameter in trainable(network).values())
    share = facts["kept_parameters"] / num_parameters
    kept = f"begins with {share:.0%} of its {num_parameters / 1e6:.2f} million weights from {facts['run']}"
    fresh = f"; anew: {', '.join(facts['fresh'])}" if facts["fresh"] else ""
    # What is anew here is mostly what is left there.
    left = [part for part in facts["unused"] if part not in facts["fresh"]]
    return kept + fresh + (f"; not used: {', '.join(left)}" if left else "")


def _fitting(network: TokenSegmenter, start: Start, config: Config, plan: Plan) -> dict[str, Tensor]:
    """The earlier run's weights that fit, by the names and in the shapes of the new network's."""
    other = tuple(f"{part}." for part in _other_parts(start, network, config))
    found = {name: tensor for name, tensor in start.tensors.items() if not name.startswith(other)}
    ours, theirs = _layout(config.network, plan), _layout(start.config.network, start.plan)
    same_classes = _same_classes(start, config, plan)
    order = _channel_order(start.plan.channels, plan.channels)
    for name in found.keys() & (ours.outputs | theirs.outputs):
        if not same_classes or name not in ours.outputs & theirs.outputs:
            del found[name]
    for name in found.keys() & (ours.inputs | theirs.inputs):
        if order is None or name not in ours.inputs & theirs.inputs:
            del found[name]
        else:
            found[name] = found[name][:, order]
    for name in found.keys() & ours.positions.keys() & theirs.positions.keys():
        found[name] = ours.positions[name].interpolated(found[name], theirs.positions[name].grid)
    shapes = {name: parameter.shape for name, parameter in trainable(network).items()}
    kept = {name: tensor for name, tensor in found.items() if shapes.get(name) == tensor.shape}
    if any(name.startswith("insert.") and name not in kept for name in shapes):
        # An open gate before mappers that know nothing would let noise in.
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith("insert.")}
    return kept


def _other_parts(start: Start, network: TokenSegmenter, config: Config) -> set[str]:
    """Parts of the network that would compute something else with equal weights."""
    ours, theirs = (_meaning(which.network) for which in (config, start.config))
    other = {part for part, keys in _MEANING.items() if any(ours[key] != theirs[key] for key in keys)}
    if start.facts.get("frozen_sha256") != tensors_sha256(frozen(network)):
        other.add("insert")
    return other


def _meaning(config: NetworkConfig) -> dict[str, Any]:
    values = config.model_dump()
    return {
        **values,
        "block": {key: value for key, value in values["block"].items() if key not in _KEPT_OTHERWISE},
    }


def _same_classes(start: Start, config: Config, plan: Plan) -> bool:
    """Whether outputs mean the same: equal names in equal order. Numbers are no names outside their own dataset."""
    unnamed = any(name == f"class {value}" for value, name in plan.classes.items())
    if unnamed and start.config.data.path != config.data.path:
        return False
    return (
        list(start.plan.classes.values()) == list(plan.classes.values()) and start.plan.merged == plan.merged
    )


def _channel_order(before: Sequence[str], now: Sequence[str]) -> list[int] | None:
    """Where each channel was before; None if they are others, which a single one never is."""
    if len(before) == len(now) == 1 or list(before) == list(now):
        return list(range(len(now)))
    if len(set(before)) < len(before) or not set(now) <= set(before):
        return None
    return [list(before).index(channel) for channel in now]


def _layout(config: NetworkConfig, plan: Plan) -> _Layout:
    """Tell by the shapes of three networks, whatever the architecture.

    They have no insert, whose weights are judged as a whole, and whose block need not be here.
    """
    without = NetworkConfig.model_validate(config.model_dump() | {"insert": "none", "insert_mlp_ratio": None})
    shapes, more_inputs, more_outputs = plan.network_shapes, plan.network_shapes, plan.network_shapes
    more_inputs["num_channels"] += 1
    more_outputs["num_outputs"] += 1
    network = build_meta_network(without, **shapes)
    return _Layout(
        inputs=_other_shapes(network, build_meta_network(without, **more_inputs)),
        outputs=_other_shapes(network, build_meta_network(without, **more_outputs)),
        positions=_positions(network),
    )


def _other_shapes(network: nn.Module, other: nn.Module) -> set[str]:
    """Names of the weights that have another shape in another network."""
    shapes = {name: tensor.shape for name, tensor in other.named_parameters()}
    return {name for name, tensor in network.named_parameters() if tensor.shape != shapes[name]}


def _positions(network: nn.Module) -> dict[str, LearnedPositions]:
    return {
        f"{name}.table": module
        for name, module in network.named_modules()
        if isinstance(module, LearnedPositions)
    }


def _layers(names: Iterable[str], *, of: Mapping[str, Tensor]) -> list[str]:
    """Weights in few words: a part of the network if all of it is meant, else its layers."""
    names = list(names)
    whole = {name.partition(".")[0] for name in of} - {
        name.partition(".")[0] for name in of.keys() - set(names)
    }
    return list(
        dict.fromkeys(
            part if (part := name.partition(".")[0]) in whole else name.rpartition(".")[0] for name in names
        )
    )
