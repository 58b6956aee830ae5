"""What a run begins with, if not with nothing: the weights of an earlier run, as far as they fit.

A weight fits that has the same name and shape. Positions of another grid of tokens are interpolated. Two things fit
in shape and not in meaning, and begin anew: outputs for other classes, and what was trained around another block.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medvisionllama._files import files_sha256
from medvisionllama.checkpoint import load_tensors, trainable
from medvisionllama.config import NetworkConfig, read_config
from medvisionllama.data.planning import Plan, read_plan
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.networks.factory import build_meta_network
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.vit import LearnedPositions
from medvisionllama.run_dir import RunDir
from medvisionllama.training.prepare import PreparedData
from medvisionllama.training.seen import patients_by_part


@dataclass(frozen=True)
class Start:
    """An earlier run, read and not yet in any network."""

    run_dir: RunDir
    network: NetworkConfig
    plan: Plan
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """What the weights' file tells of their network: among others `frozen_sha256`."""
    patients: Mapping[str, Collection[str]]
    """Who trained and who validated it, or what it began with itself."""


def read_start(run_dir: RunDir) -> Start:
    """Read an earlier run.

    Raises:
        CheckpointError: it is no run, has no weights yet, or is damaged.
        ConfigError: its settings cannot be read.
    """
    run_dir.check()
    tensors, facts = load_tensors(run_dir.best)
    patients = patients_by_part(run_dir, ())
    return Start(run_dir, read_config(run_dir.config).network, read_plan(run_dir), tensors, facts, patients)


def check_strangers(start: Start, data: PreparedData) -> None:
    """Refuse to begin with weights that know who is to score this run.

    Weights that were chosen by a patient may be chosen by the same again, and not tested.

    Raises:
        DataError: a patient or case of that name trained the earlier run, or validated it and is to test this one.
    """
    seen = {part: {*names, *_case_names(start.run_dir, part)} for part, names in start.patients.items()}
    validate = {*data.selection.validation, *(case.patient_id for case in data.validation)}
    test = {*data.selection.test, *(data.splits.test if data.selection.test else ())}
    for known, kept, what in (
        (seen["train"], validate, "validate"),
        (seen["train"] | seen["validation"], test, "test"),
    ):
        if both := sorted(known & kept):
            raise DataError(
                f"{start.run_dir.path} has seen {both[0]!r}, who is to {what} this run, so the result would leak; take its division by --set data.splits={start.run_dir.splits} and its --fold, begin without it, or rename the cases if these are other people"
            )


@torch.no_grad()
def begin_with(
    network: TokenSegmenter, start: Start, *, config: NetworkConfig, plan: Plan, frozen_sha256: str
) -> dict[str, Any]:
    """Put an earlier run's weights into a new network, where they fit, and return what the manifest keeps of that.

    Args:
        config, plan: of the new network.
        frozen_sha256: of its frozen tensors.

    Raises:
        ConfigError: none of the weights fits.
    """
    parameters = trainable(network)
    outputs = _output_names(config, plan)
    same_classes = list(start.plan.classes.values()) == list(plan.classes.values())
    same_insert = start.network.insert == config.insert and start.facts["frozen_sha256"] == frozen_sha256
    positions = _positions(network)
    before = _positions(_without_insert(start.network, start.plan))
    fresh = []
    for name, parameter in parameters.items():
        tensor = start.tensors.get(name)
        if (name in outputs and not same_classes) or (name.startswith("insert.") and not same_insert):
            tensor = None
        elif tensor is not None and name in positions and name in before:
            tensor = positions[name].interpolated(tensor, before[name].grid)
        if tensor is None or tensor.shape != parameter.shape:
            fresh.append(name)
        else:
            parameter.copy_(tensor)
    num_all = sum(parameter.numel() for parameter in parameters.values())
    num_kept = num_all - sum(parameters[name].numel() for name in fresh)
    if not num_kept:
        raise ConfigError(
            f"no weight of {start.run_dir.path} fits this network (architecture {start.network.architecture}, here {config.architecture}); give its --preset, or begin without it"
        )
    return {
        "run": str(start.run_dir.path),
        "weights_sha256": files_sha256([start.run_dir.best]),
        "kept_parameters": num_kept,
        "fresh": _layers(fresh),
        "patients": {part: sorted(names) for part, names in start.patients.items()},
    }


def started_words(facts: Mapping[str, Any], *, num_parameters: int) -> str:
    """Say in one line what a run began with."""
    kept = f"begins with {facts['run']}: {facts['kept_parameters'] / num_parameters:.0%} of {num_parameters / 1e6:.2f} million weights"
    fresh: list[str] = facts["fresh"]
    return f"{kept}; anew: {', '.join(fresh)}" if fresh else kept


def _case_names(run_dir: RunDir, part: str) -> list[str]:
    names: list[str] = run_dir.read_manifest()["cases"][part]
    return names


def _without_insert(config: NetworkConfig, plan: Plan, *, more_outputs: int = 0) -> TokenSegmenter:
    """Shapes of a network, but for the insert, whose block need not be here."""
    shapes = plan.network_shapes
    shapes["num_outputs"] += more_outputs
    return build_meta_network(config.model_copy(update={"insert": "none"}), **shapes)


def _output_names(config: NetworkConfig, plan: Plan) -> set[str]:
    """Names of the weights whose shapes go by the number of outputs, whatever the architecture."""
    shapes, wider = (
        {
            name: tensor.shape
            for name, tensor in _without_insert(config, plan, more_outputs=more).named_parameters()
        }
        for more in (0, 1)
    )
    return {name for name, shape in shapes.items() if wider[name] != shape}


def _positions(network: nn.Module) -> dict[str, LearnedPositions]:
    return {
        f"{name}.table": module
        for name, module in network.named_modules()
        if isinstance(module, LearnedPositions)
    }


def _layers(names: Sequence[str]) -> list[str]:
    """Layers instead of their weights and biases: `head.out` for `head.out.weight` and `head.out.bias`."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
