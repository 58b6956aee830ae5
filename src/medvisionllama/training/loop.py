"""The training loop: steps, validations, saves.

A step is a function of the seed, the step's number and the weights: batch, augmentation and dropout are drawn from
them alone. So on a CPU a run limited by epochs or steps that was killed and resumed repeats exactly what the
uninterrupted run does. On a GPU it does so to rounding: cuDNN may add up a weight's gradient in any order. One
limited by minutes goes on from the same weights, but its learning rate follows the clock. Several processes share
each batch and do together what one would, but for rounding and for dropout, of which each draws its own.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from medvisionllama._machine import available_cores
from medvisionllama.checkpoint import copy_into, load_tensors, save_tensors, trainable
from medvisionllama.config import TrainConfig
from medvisionllama.data.sampling import BatchSampler
from medvisionllama.errors import CheckpointError
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir
from medvisionllama.training.ahead import Ahead
from medvisionllama.training.interrupts import interruptible
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.optim import (
    AveragedWeights,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    plateau_drops,
    restore_optimizer,
    set_learning_rate,
)
from medvisionllama.training.processes import Processes
from medvisionllama.training.self_training import SelfTraining
from medvisionllama.training.sharding import prepare_sharded
from medvisionllama.training.timetable import MOST_MASKS, LoopState, Timetable, total_steps

_ECHO_SECONDS = 2.0
"""Within it a launcher passes on to its processes a Ctrl-C that the terminal has sent them already."""

Validate = Callable[[TokenSegmenter, float | None, Callable[[], bool]], dict[str, Any]]
"""Segments the validation cases and returns a record with the key `dice`; that is None if there are none, and then
the latest weights are kept. If it would take longer than so many seconds, it may give up and return
`would_take_seconds` alone; once interrupted, it gives up and returns `interrupted`."""


class TrainingLoop:
    """Owns weights, optimiser and state of one run; `run` goes on until the end or an interrupt."""

    def __init__(
        self,
        model: SupervisedSegmenter,
        sampler: BatchSampler,
        validate: Validate,
        config: TrainConfig,
        run_dir: RunDir,
        accelerator: Accelerator,
        self_training: SelfTraining,
        *,
        facts: dict[str, Any],
        started: float,
    ) -> None:
        self.sampler = sampler
        device = accelerator.device
        self.batches = Ahead(
            batch_maker(sampler, device),
            num_batch_threads(config, device),
            one_core_each=device.type == "cuda",
        )
        self.validate = validate
        self.config = config
        self.run_dir = run_dir
        self.self_training = self_training
        self.accelerator = accelerator
        self.processes = Processes(accelerator)
        self.facts = facts
        self.network = model.network
        self.parameters = trainable(self.network)
        optimizer = make_optimizer(self.network, config)
        if config.shard_block and self.processes.num > 1:
            self.model = prepare_sharded(model, self.processes)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = AveragedWeights(self.parameters, config.ema_decay) if config.ema_decay else None
        self.timetable = Timetable(config, total_steps(config, len(sampler.cases)))
        self._clock = started
        self._saved_at = time.monotonic()

    @property
    def state(self) -> LoopState:
        """Where the run is."""
        return self.timetable.state

    def run(self, progress: Progress, *, echo_seconds: float = 0.0) -> bool:
        """Train to the end; return False if interrupted, with everything saved.

        Args:
            echo_seconds: see `interruptible`; at least as long as a launcher takes, if there is one.
        """
        echo = max(echo_seconds, _ECHO_SECONDS) if self.processes.num > 1 else echo_seconds
        with (
            self.batches,
            interruptible(echo_seconds=echo) as interrupted,
            progress.track("training", 1.0) as advance,
        ):
            if not self.state.step:
                self._tick()
                self.timetable.begin()
            if self.timetable.is_over:
                # By a limit that is shorter now: its last save says that it was not.
                self.save()
            while not self.timetable.is_over:
                # Before a step: a run that was interrupted in one of these was saved without it, and begins here.
                if self.state.step and self.timetable.validation_due():
                    validated = self._validate(progress, interrupted)
                    self.save()
                    if not validated:
                        return False
                    continue
                if self.timetable.masks_due(self.self_training.due):
                    advance(self.timetable.progress, "segmenting the scans without labels")
                    if not self._relabel(progress, interrupted):
                        self.save()
                        return False
                loss = self._step()
                self.state.loss_sum += loss
                self._tick()
                advance(self.timetable.progress, self._note(loss))
                if time.monotonic() - self._saved_at > self.config.save_seconds:
                    self.save()
                if self.processes.any(interrupted()):
                    self.save()
                    return False
        return True

    def save(self) -> None:
        """Write the resume state as one file."""
        if not self.processes.is_main:
            return
        tensors: dict[str, Tensor] = {
            f"weights/{name}": parameter for name, parameter in self.parameters.items()
        }
        tensors |= {
            f"optimizer/{name}": value
            for name, value in optimizer_tensors(self._inner_optimizer(), self.parameters).items()
        }
        if self.average:
            tensors |= {f"average/{name}": value for name, value in self.average.values.items()}
        facts = {**self.facts, "state": asdict(self.state), "finished": self.timetable.is_over}
        save_tensors(self.run_dir.state, tensors, facts)
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Go back to the last save; without one, begin.

        Raises:
            CheckpointError: the state is damaged, or was made with other frozen weights.
        """
        where = self.run_dir.state
        if where.is_file():
            self._restore(where)
        if self.processes.any(self.state.step != self.processes.first(self.state.step)):
            raise CheckpointError(
                f"the processes see different saves of the run at {where}; --out must be on a disk that all machines share"
            )
        if self.processes.is_main:
            # A validation of this very step may have been noted and not saved; it is made again.
            self.run_dir.rewind_history(self.state.validated_step)

    def _restore(self, where: Path) -> None:
        tensors, facts = load_tensors(where)
        if facts.get("frozen_sha256") != self.facts["frozen_sha256"]:
            raise CheckpointError(
                f"{where} was trained around another frozen block than the one loaded now; use the same network.block"
            )
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "average": {}}
        for full, tensor in tensors.items():
            kind, _, name = full.partition("/")
            parts[kind][name] = tensor
        copy_into(self.network, parts["weights"], where=where)
        restore_optimizer(self._inner_optimizer(), self.parameters, parts["optimizer"])
        if self.average:
            for name, value in parts["average"].items():
                self.average.values[name].copy_(value)
        self.timetable.state = LoopState(**facts["state"])
        self.sampler.pseudo_labelled = self.self_training.masks_of(self.state.pseudo_round)
        self._clock = time.monotonic() - self.state.elapsed_seconds

    def _step(self) -> float:
        self.model.train()
        rate = learning_rate(
            self.config,
            progress=self.timetable.training_progress,
            step=self.state.step,
            plateau_drops=plateau_drops(self.state.dices),
        )
        set_learning_rate(self._inner_optimizer(), rate)
        # Dropout draws from the global generator; seeding it here leaves no generator state to save.
        torch.manual_seed(_step_seed(self.config.seed, self.sampler.rank, self.state.step))
        device = self.accelerator.device
        # Read, with the gradient, when all is computed: a GPU that is asked in between waits for its next orders.
        mean = torch.zeros((), dtype=torch.float64, device=device)
        for part in range(self.config.accumulate):
            images, labels = self.batches[self.state.step * self.config.accumulate + part]
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            last = part + 1 == self.config.accumulate
            # Gradients travel once a step, with the last batch.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(images, labels) / self.config.accumulate
                self.accelerator.backward(loss)
            mean += loss.detach()
        gradient = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        total, norm = torch.stack([self.processes.mean(mean), gradient.double()]).tolist()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise CheckpointError(
                f"the loss became {total} and its gradient {norm} at step {self.state.step}; go on from the last save with --resume and a lower --set train.learning_rate, or --set train.precision=fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.state.step)
        self.state.step += 1
        return float(total)

    def _validate(self, progress: Progress, interrupted: Callable[[], bool]) -> bool:
        """Validate; False if interrupted, and then the run that goes on makes it anew."""
        before = time.monotonic()
        with self._averaged_weights():
            record = self.validate(self.network, self.timetable.validation_patience, interrupted)
            if record.get("interrupted"):
                return False
            too_long = record.pop("would_take_seconds", None)
            if too_long is not None and not record:
                self._put_off_validation(too_long, progress)
                return True
            dice = record["dice"]
            if dice is not None:
                self.state.dices.append(dice)
            if self.state.keeps_last and self.processes.is_main:
                facts = {**self.facts, "step": self.state.step, "validation_dice": dice}
                save_tensors(self.run_dir.best, self.parameters, facts)
        self._tick()
        loss = self.state.loss_sum / max(1, self.state.step - self.state.validated_step)
        self.timetable.validated(self.processes.first(time.monotonic() - before))
        if self.processes.is_main:
            self.run_dir.append_history(
                {
                    "step": self.state.step,
                    "seconds": round(self.state.elapsed_seconds, 2),
                    "loss": loss,
                    **record,
                }
            )
        if too_long is not None:
            self.state.would_take_seconds = too_long
            if self.timetable.progress < 1.0:
                self._say_validated_late(too_long, progress)
        return True

    def _put_off_validation(self, seconds: float, progress: Progress) -> None:
        self._tick()
        kept = self.timetable.put_off_validation(seconds)
        late = "" if kept == seconds else f", {(seconds - kept) / 60:.2g} minutes longer than that"
        self._say_validated_late(seconds, progress, late)

    def _say_validated_late(self, seconds: float, progress: Progress, late: str = "") -> None:
        progress.say(
            f"segmenting the validation cases takes about {seconds / 60:.2g} of the {self.config.max_minutes:g} minutes, so from now on it is done once, at the end{late}; --max-minutes gives more to both"
        )

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The network as it is validated and saved."""
        if self.average:
            self.average.swap()
        yield
        if self.average:
            self.average.swap()

    def _relabel(self, progress: Progress, interrupted: Callable[[], bool]) -> bool:
        """Give a round of masks; False if interrupted, and then the run that goes on makes the round anew."""
        before, number = self.state.pseudo_round, self.state.pseudo_round + 1
        patience = self.timetable.mask_patience(self.self_training.config.unlabelled.rounds)
        started = time.monotonic()
        with self._averaged_weights():
            found = self.self_training.give_masks(
                self.network, number, patience_seconds=patience, interrupted=interrupted
            )
        if self.processes.any(interrupted()):
            return False
        if patience is not None and time.monotonic() - started > patience:
            progress.say(
                f"{len(found)} of {len(self.self_training.chosen(number))} scans without labels got masks this time; masks may take {MOST_MASKS:.0%} of the {self.config.max_minutes:g} minutes, and --max-minutes gives more to both"
            )
        self.state.pseudo_step, self.state.pseudo_seconds = self.state.step, self.state.elapsed_seconds
        self.sampler.pseudo_labelled = found
        # Those made ahead know nothing of the new masks.
        self.batches.forget()
        self.state.pseudo_round = number
        self._tick()
        self.save()
        if before and self.processes.is_main:
            self.self_training.forget(before)
        return True

    def _note(self, loss: float) -> str:
        kept = self.state.kept
        validated = "" if kept is None else f"  validation Dice {kept:.4f}"
        return f"step {self.state.step}  loss {loss:.3f}{validated}"

    def _tick(self) -> None:
        self.state.elapsed_seconds = self.processes.first(time.monotonic() - self._clock)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner


def batch_maker(sampler: BatchSampler, device: torch.device) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The sampler's batches; for a GPU in memory that it copies from by itself, while it computes."""

    def pinned(number: int) -> tuple[Tensor, Tensor]:
        images, labels = sampler.batch(number)
        return images.pin_memory(), labels.pin_memory()

    return pinned if device.type == "cuda" else sampler.batch


def num_batch_threads(config: TrainConfig, device: torch.device) -> int:
    """As set; by default none on a CPU, whose cores the network needs, and one a core beside a GPU, 4 to 16."""
    if config.batch_threads is not None:
        return config.batch_threads
    if device.type == "cpu":
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # torchrun keeps each of several processes to one thread, which says nothing of their cores.
    cores = torch.get_num_threads() if processes == 1 else len(available_cores()) // processes
    return max(4, min(16, cores // config.members))


def _step_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
