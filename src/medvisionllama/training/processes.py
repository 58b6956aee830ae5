"""What the processes of one run agree on: who goes first, whose clock counts, whether anyone was interrupted.

Each method is a collective: all processes must call it, in the same order. With one process all of them are free.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from medvisionllama.errors import ConfigError, MedVisionLlamaError, OtherProcessError


class Processes:
    """The processes that `accelerate launch` or `torchrun` started for one run; one if nobody did."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.num = accelerator.num_processes
        self.index = accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def first(self, value: float) -> float:
        """The first process's value: those that judged time for themselves would part ways and wait forever."""
        return value if self.num == 1 else float(broadcast(self._number(value)))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, element by element."""
        return self.sum(values) / self.num

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - a value to agree on, not an option
        """Whether it is true in any process."""
        return flag if self.num == 1 else bool(self.sum(self._number(float(flag))) > 0)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, element by element."""
        if self.num == 1:
            return values
        total = values.to(self.accelerator.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    @contextmanager
    def machine_first(self) -> Iterator[bool]:
        """Let one process of each machine do what the others then find done; yields whether this is the one.

        Raises:
            OtherProcessError: one of those failed; its own error says why.
        """
        leads, failed = self.accelerator.is_local_main_process, False
        try:
            if leads:
                yield True
        except BaseException:
            failed = True
            raise
        finally:
            others_failed = self.any(failed)
        if others_failed:
            raise OtherProcessError("another process of this run failed; its message says why")
        if not leads:
            yield False

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)


PATIENCE = timedelta(days=1)
"""The others wait while the first prepares scans, and the launcher ends them if one dies."""
_MEETINGS = count()
_MEETING_PLACE = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHED = {*_MEETING_PLACE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"}
"""Environment variables by which launchers tell a process its place."""


def meet(device: torch.device) -> None:
    """Join the processes that a launcher started, unless they are joined; without one there are none.

    The launcher's store outlives a run, and what its processes wrote of themselves there would lead those of the
    session's next run to addresses that are gone. So each run has keys of its own.
    """
    if not dist.is_available() or dist.is_initialized() or not os.environ.keys() >= _MEETING_PLACE:
        return
    # Its functions have the group of all processes as a default. Imported by someone once we are joined, they keep
    # that group past its end, and gloo's threads with it, which abort the process if they outlive the interpreter.
    import torch.distributed.nn.functional  # noqa: F401 - where nothing is joined it costs a start

    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"run{next(_MEETINGS)}", store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )


@contextmanager
def joined_processes(make: Callable[[], Accelerator]) -> Iterator[Accelerator]:
    """Join the processes of a run, and leave them when it is over: what follows is the first one's alone.

    A script that joined them itself keeps them.
    """
    ours = not (dist.is_available() and dist.is_initialized())
    accelerator = make()
    try:
        yield accelerator
    except BaseException as error:
        # Processes agree on our errors. With any other, NCCL could wait for those that never come.
        if ours and (isinstance(error, MedVisionLlamaError) or accelerator.device.type == "cpu"):
            accelerator.state.destroy_process_group()
        raise
    if ours:
        accelerator.end_training()


def sum_with_gradient(sums: Tensor) -> Tensor:
    """Sum over the processes of a run, of which each has the gradient of its own share.

    DDP then averages the processes' gradients, where those of shares of a sum must be added: hence the factor.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    total = sums.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (sums - sums.detach())


def check_launcher() -> None:
    """Raise ConfigError if the launcher was asked for what would take our weights apart."""
    for name, option in _UNSUPPORTED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"accelerate launch {option} divides the trained weights too, of which every process here needs the whole; launch with --multi_gpu, and divide the frozen block with --set train.shard_block=true"
            )


_UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}


def launched_in_vain() -> bool:
    """True if `accelerate launch --cpu --num_processes N` was asked for several processes and started one.

    Without an MPI hostfile it sets the port that they would meet at, and no number of processes.
    """
    known = os.environ
    return "ACCELERATE_MIXED_PRECISION" in known and "MASTER_PORT" in known and "WORLD_SIZE" not in known
