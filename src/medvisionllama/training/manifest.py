"""What a run's folder tells of it before it trains: machine, network and cases, division, plan and settings."""

from typing import Any

from medvisionllama._files import write_json, write_text
from medvisionllama.checkpoint import frozen, trainable
from medvisionllama.config import Config, write_config
from medvisionllama.data.cache import describe
from medvisionllama.data.splits import write_splits
from medvisionllama.llm.block import tensors_sha256
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.run_dir import RunDir, machine_facts
from medvisionllama.training.loop import TrainingLoop
from medvisionllama.training.prepare import PreparedData


def network_facts(network: TokenSegmenter) -> dict[str, Any]:
    """What identifies the network: sizes, and the block's name and hash."""
    held = frozen(network)
    block = network.block
    return {
        "format": 1,
        "trainable_parameters": sum(parameter.numel() for parameter in trainable(network).values()),
        "frozen_parameters": sum(tensor.numel() for tensor in held.values()),
        "frozen_sha256": tensors_sha256(held),
        "block": None if block is None else {"name": block.name, "sha256": block.sha256()},
    }


def sessions_of(run_dir: RunDir, loop: TrainingLoop, *, precision: str) -> dict[str, Any]:
    """Machine, versions and revision that a run began with, and under `resumed` those that it went on with.

    Those of now count only if this session has something to train. The hardware's `device` is what trains, as a
    machine may have a GPU that is not used: cpu or cuda.
    """
    facts = machine_facts()
    hardware = {**facts["hardware"], "device": loop.accelerator.device.type}
    now = {**facts, "hardware": hardware, "precision": precision}
    if not loop.state.step:
        return {**now, "resumed": []}
    before = run_dir.read_manifest()
    began = {key: before[key] for key in now}
    return {**began, "resumed": [*before["resumed"], *([] if loop.timetable.is_over else [now])]}


def write_run_files(
    run_dir: RunDir,
    config: Config,
    data: PreparedData,
    network: dict[str, Any],
    about: dict[str, Any],
) -> None:
    """Write everything that does not change while training; config.yaml last, as it makes the folder a run."""
    chosen = data.selection
    parts = {"train": chosen.train, "validation": chosen.validation, "test": chosen.test}
    manifest = {
        **about,
        "seed": config.train.seed,
        **data.hashes,
        "fingerprint": describe(data.train, data.plan),
        "network": network,
        # With their patients, as those of a folder are no cases of the dataset, which would know them.
        "unlabelled": {case.case_id: case.patient_id for case in data.unlabelled},
        "num_cases": {part: len(names) for part, names in parts.items()},
        "cases": parts,
    }
    write_json(run_dir.manifest, manifest)
    write_splits(data.splits, run_dir.splits)
    write_text(run_dir.plan, data.plan.model_dump_json(indent=2) + "\n")
    write_config(config, run_dir.config)
