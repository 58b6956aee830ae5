"""`fit`: from a configuration to a run folder. Reads top to bottom: data, network, loop."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from medvisionllama._files import with_home
from medvisionllama.config import Config
from medvisionllama.data.sampling import BatchSampler, check_share
from medvisionllama.devices import (
    choose_device,
    convolution_caution,
    device_words,
    emulation_caution,
    fast_layout,
    use_bf16,
)
from medvisionllama.errors import ConfigError
from medvisionllama.llm import CATALOG
from medvisionllama.networks.factory import build_network, check_insert
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.progress import Progress, Silent
from medvisionllama.run_dir import RunDir
from medvisionllama.training.checks import (
    alone_in,
    check_still_unused,
    check_time_left,
    check_unchanged,
    say_long_warmup,
    say_never_found,
)
from medvisionllama.training.loop import TrainingLoop
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.manifest import network_facts, sessions_of, write_run_files
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
from medvisionllama.training.start import Start, begin_with, read_start, started_words
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
    data, start = _prepared(config, run_dir, processes, resume=resume, is_member=is_member, progress=progress)
    if not run_dir.state.is_file():
        check_time_left(config, processes.first(time.monotonic() - started), progress)
    network, started_from = _network(config, run_dir, data, start, progress)
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
        _say_what_trains(config, accelerator, loop.timetable.total_steps, progress)
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


def _prepared(
    config: Config,
    run_dir: RunDir,
    processes: Processes,
    *,
    resume: bool,
    is_member: bool,
    progress: Progress,
) -> tuple[PreparedData, Start | None]:
    """Refuse what cannot be trained, then read the run that this one begins with, if any, and prepare the data."""
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
    return data, start


def _network(
    config: Config, run_dir: RunDir, data: PreparedData, start: Start | None, progress: Progress
) -> tuple[TokenSegmenter, dict[str, Any] | None]:
    """Build the network, and tell what the manifest keeps of the run whose weights it begins with."""
    torch.manual_seed(config.train.seed)
    network = fast_layout(build_network(config.network, **data.plan.network_shapes, seed=config.train.seed))
    started_from = None
    if start is not None:
        started_from = begin_with(network, start, config=config, plan=data.plan)
        progress.say(started_words(started_from, network))
    elif run_dir.state.is_file():
        started_from = run_dir.read_manifest()["started_from"]
    return network, started_from


def _say_what_trains(
    config: Config, accelerator: Accelerator, total_steps: int | None, progress: Progress
) -> None:
    """Name the device, the number of networks, and what makes this run slower or worse than need be."""
    say_long_warmup(config, total_steps, progress)
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
