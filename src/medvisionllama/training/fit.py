"""`fit`: from a configuration to a run folder. Reads top to bottom: data, network, loop."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from medvisionllama._files import lock_if_free, with_home, write_json, write_text
from medvisionllama.checkpoint import frozen, trainable
from medvisionllama.config import Config, write_config
from medvisionllama.data.cache import describe
from medvisionllama.data.planning import read_plan
from medvisionllama.data.sampling import BatchSampler, check_share
from medvisionllama.data.splits import write_splits
from medvisionllama.devices import (
    choose_device,
    convolution_caution,
    device_words,
    emulation_caution,
    fast_layout,
    use_bf16,
)
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.llm import CATALOG
from medvisionllama.llm.block import tensors_sha256
from medvisionllama.networks.factory import build_network, check_insert
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.progress import Progress, Silent
from medvisionllama.run_dir import RunDir, machine_facts
from medvisionllama.training.loop import TrainingLoop
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.members import check_members, others_beside
from medvisionllama.training.prepare import PreparedData, prepare_data
from medvisionllama.training.processes import (
    PATIENCE,
    Processes,
    check_launcher,
    joined_processes,
    launched_in_vain,
    meet,
)
from medvisionllama.training.seen import check_strangers
from medvisionllama.training.self_training import SelfTraining
from medvisionllama.training.start import begin_with, read_start, started_words
from medvisionllama.training.validation import validate_cases

_IN_VAIN = (
    "this is one process: accelerate launch --cpu starts several by MPI only; "
    "use accelerate launch --multi_gpu --num_processes N, or torchrun --nproc_per_node N, with --set train.device=cpu"
)


@dataclass(frozen=True)
class RunResult:
    """What `fit` did; of several members, steps and Dice are the first one's."""

    path: Path
    finished: bool
    """False if it was interrupted; `fit(config, resume=True)` goes on."""
    steps: int
    seconds: float
    validation_dice: float | None
    """None if no case was left to validate."""
    is_main: bool = True
    """False in all but the first process of a distributed run, which alone writes and prints."""


def fit(config: Config, *, resume: bool = False, progress: Progress | None = None) -> RunResult:
    """Train one run and leave its folder: best weights, history, plan, splits and manifest.

    Args:
        config: `data.path` and `out` must be set; see `load_config`.
        resume: go on from the last save in `out`.
        progress: shows bars; silent by default.

    Raises:
        DataError: the dataset cannot be used as it is.
        ConfigError: settings that do not fit the machine or the data.
        CheckpointError: `out` already holds a run, or holds none to resume.

    >>> config = load_config("small", {"data.path": "Task04_Hippocampus", "out": "runs/hip"})  # doctest: +SKIP
    >>> fit(config).validation_dice  # doctest: +SKIP
    """
    return fit_since(config, started=time.monotonic(), resume=resume, progress=progress)


def fit_since(
    config: Config,
    *,
    started: float,
    resume: bool = False,
    is_member: bool = False,
    progress: Progress | None = None,
    echo_seconds: float = 0.0,
) -> RunResult:
    """Do what `fit` does in a run whose minutes began at `started`, as `time.monotonic` counts.

    Args:
        is_member: of a run whose splits file `config.data.splits` is, so with no other patients than it has.
        echo_seconds: see `interruptible`.
    """
    if config.data.path is None or config.out is None:
        raise ConfigError("fit needs data.path (the dataset) and out (the run folder)")
    config = with_absolute_paths(config)
    check_launcher()
    with joined_processes(lambda: make_accelerator(config)) as accelerator:
        return _fit(
            config,
            accelerator,
            resume=resume,
            is_member=is_member,
            progress=progress or Silent(),
            started=started,
            echo_seconds=echo_seconds,
        )


def _fit(
    config: Config,
    accelerator: Accelerator,
    *,
    resume: bool,
    is_member: bool,
    progress: Progress,
    started: float,
    echo_seconds: float,
) -> RunResult:
    assert config.out is not None, "checked above"
    run_dir = RunDir(config.out)
    processes = Processes(accelerator)
    if not processes.is_main:
        progress = Silent()
    if launched_in_vain():
        progress.say(_IN_VAIN)
    with processes.machine_first() as is_first:
        if is_first:
            check_share(config.train.batch_size, processes.num)
            check_members(config.train.members, processes.num)
            if resume:
                run_dir.check_resumable()
            else:
                run_dir.check_unused(config.data.splits)
            check_insert(config.network)
        start = None
        # A run that goes on has them in its own weights, and the earlier run may be gone.
        if config.train.start_from is not None and not run_dir.state.is_file():
            start = read_start(RunDir(config.train.start_from))
        strangers = (
            None if start is None else partial(check_strangers, start.run_dir, start.seen, config.data)
        )
        drawn = run_dir.splits if resume else config.data.splits
        data = prepare_data(
            config, drawn=drawn, begun=resume or is_member, progress=progress, check_division=strangers
        )
        if resume:
            check_unchanged(run_dir, data)
            if not is_member:  # whose own test nobody scores
                test = run_dir.cases_of("test", data.selection.test, otherwise="start a new run")
                data = replace(data, selection=replace(data.selection, test=test))
    if not run_dir.state.is_file():
        check_time_left(config, processes.first(time.monotonic() - started), progress)
    torch.manual_seed(config.train.seed)
    network = fast_layout(build_network(config.network, **data.plan.network_shapes, seed=config.train.seed))
    started_from = None
    if start is not None:
        started_from = begin_with(network, start, config=config, plan=data.plan)
        progress.say(started_words(started_from, network))
    elif run_dir.state.is_file():
        started_from = run_dir.read_manifest().get("started_from")
    facts = network_facts(network)
    loop = TrainingLoop(
        SupervisedSegmenter(
            network, num_outputs=data.plan.num_outputs, auxiliary_weight=config.train.auxiliary_weight
        ),
        make_sampler(config, data, accelerator),
        lambda module, patience, interrupted: validate_cases(
            module,
            data.validation,
            data.plan,
            config,
            accelerator,
            patience_seconds=patience,
            interrupted=interrupted,
        ),
        config.train,
        run_dir,
        accelerator,
        SelfTraining(data.train, data.unlabelled, data.plan, config, run_dir, accelerator),
        facts=facts,
        started=started,
    )
    with alone_in(run_dir, processes):
        if not resume:
            check_still_unused(run_dir, processes, config.data.splits)
        # Before anything is written: what cannot go on stays as it was.
        loop.resume()
        if processes.is_main:
            sessions = sessions_of(run_dir, loop, precision=accelerator.mixed_precision)
            write_run_files(run_dir, config, data, facts, {**sessions, "started_from": started_from})
        say_long_warmup(config, loop.timetable.total_steps, progress)
        progress.say(f"training on {device_words(config.train.device, config.train.precision)}")
        device, bf16 = accelerator.device, accelerator.mixed_precision == "bf16"
        block_dtype = config.network.block.dtype if config.network.has_block else None
        for caution in (
            convolution_caution(device, bf16=bf16, cudnn=torch.backends.cudnn.version()),
            emulation_caution(device, bf16=bf16, block_dtype=block_dtype),
        ):
            if caution:
                progress.say(caution)
        if config.train.members > 1:
            progress.say(
                f"{config.train.members} networks train side by side; predictions are the mean of theirs"
            )
        with others_beside(config, resume=resume, started=started, progress=progress) as others:
            finished = loop.run(progress, echo_seconds=echo_seconds)
            if finished:
                say_never_found(run_dir, len(data.validation), progress)
                finished = others.finish()
                for member in others.members if finished else ():
                    say_never_found(member.run_dir, len(data.validation), progress)
    accelerator.free_memory()
    return RunResult(
        path=run_dir.path,
        finished=finished,
        steps=loop.state.step,
        seconds=loop.state.elapsed_seconds,
        validation_dice=loop.state.kept,
        is_main=processes.is_main,
    )


def with_absolute_paths(config: Config) -> Config:
    """Resolve paths, so that the run can be used from any folder."""

    def absolute(path: Path) -> Path:
        return with_home(path).resolve()

    assert config.data.path is not None, "checked by the caller"
    assert config.out is not None, "checked by the caller"
    splits = None if config.data.splits is None else absolute(config.data.splits)
    data = config.data.model_copy(update={"path": absolute(config.data.path), "splits": splits})
    block = config.network.block
    local = absolute(Path(block.source))
    if block.source not in CATALOG and local.exists():
        block = block.model_copy(update={"source": str(local)})
    network = config.network.model_copy(update={"block": block})
    unlabelled = config.unlabelled
    if isinstance(unlabelled.scans, Path):
        unlabelled = unlabelled.model_copy(update={"scans": absolute(unlabelled.scans)})
    train = config.train
    if train.start_from is not None:
        train = train.model_copy(update={"start_from": absolute(train.start_from)})
    changes = {"data": data, "network": network, "unlabelled": unlabelled, "train": train}
    return config.model_copy(update={**changes, "out": absolute(config.out)})


@contextmanager
def alone_in(run_dir: RunDir, processes: Processes) -> Iterator[None]:
    """Hold a run's folder for this run alone.

    Raises:
        CheckpointError: another one trains in it: a job that was started twice, a terminal that was forgotten.
    """
    with ExitStack() as stack:
        is_free = True
        if processes.is_main:
            # Some disks have no locks, and must not keep anybody from training.
            with suppress(OSError):
                is_free = stack.enter_context(lock_if_free(run_dir.lock, seconds=1.0))
        if processes.any(not is_free):
            raise CheckpointError(
                f"another process is training {run_dir.path}; wait for its end, stop it, or choose another --out"
            )
        yield


def check_still_unused(run_dir: RunDir, processes: Processes, drawn: Path | None = None) -> None:
    """Refuse a folder that another run has filled while the scans were prepared.

    Raises:
        CheckpointError: as `RunDir.check_unused`; its weights would be gone on with under this run's division.
    """
    taken = ""
    if processes.is_main:
        try:
            run_dir.check_unused(drawn)
        except CheckpointError as error:
            taken = str(error)
    if processes.any(bool(taken)):
        raise CheckpointError(taken or f"{run_dir.path} already holds a run")


def check_time_left(config: Config, seconds: float, progress: Progress) -> None:
    """Refuse to train if preparing the scans took all the time of a run; say so if it took a good part.

    Raises:
        ConfigError: nothing would have been learned.
    """
    limit = config.train.max_minutes
    if limit is None or seconds < 6 * limit:
        return
    words = f"preparing the scans took {seconds / 60:.2g} of the {limit:g} minutes of train.max_minutes"
    if seconds >= 60 * limit:
        raise ConfigError(
            f"{words}, so none is left for training; they are kept, so give the same command again, or a larger --max-minutes"
        )
    progress.say(f"{words}; they are kept for the next run")


def say_long_warmup(config: Config, total_steps: int | None, progress: Progress) -> None:
    """Say so if a run limited by epochs or steps ends before its learning rate is anywhere near what was set."""
    warmup = config.train.warmup_steps
    if total_steps is not None and warmup > total_steps / 3:
        progress.say(
            f"look at this: warm-up takes {warmup} of the {total_steps} steps of this run, so it hardly reaches its learning rate; train longer, or give --set train.warmup_steps={total_steps // 10}"
        )


def say_never_found(run_dir: RunDir, num_cases: int, progress: Progress) -> None:
    """Name the classes that the weights which are kept find in no validation case, which a mean Dice hides."""
    if names := run_dir.kept_record().get("never_found"):
        progress.say(
            f"look at this: in {run_dir.path}, {' and '.join(map(repr, names))} was found in none of the {num_cases} validation cases (or of those that have it); train longer, or begin again with another --set train.seed"
        )


def check_unchanged(run_dir: RunDir, data: PreparedData) -> None:
    """Raise CheckpointError if a run that is to go on would see other data than it began with."""
    run_dir.check_same_data(data.hashes)
    before = read_plan(run_dir).decisions.model_dump()
    now = data.plan.decisions.model_dump()
    changed = [name for name, value in now.items() if value != before[name]]
    if changed:
        raise CheckpointError(
            f"the scans, or our rules for them, changed since {run_dir.path} began: its plan differs in {', '.join(changed)}; start a new run"
        )


def make_accelerator(config: Config) -> Accelerator:
    """Set up Accelerate for the chosen device and precision."""
    device = choose_device(config.train.device)
    # Accelerate keeps precision and device for the life of a process; a session of several runs needs each its own.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    meet(device)
    bf16 = use_bf16(config.train.precision, device)
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        cpu=device.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def make_sampler(config: Config, data: PreparedData, accelerator: Accelerator) -> BatchSampler:
    """Batches of the training cases, each shared by the processes of the run."""
    return BatchSampler(
        data.train,
        data.plan,
        config.data,
        config.augment,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        pseudo_share=config.unlabelled.share,
    )


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
    began = {key: before.get(key, value) for key, value in now.items()}
    return {**began, "resumed": [*before.get("resumed", []), *([] if loop.timetable.is_over else [now])]}


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
