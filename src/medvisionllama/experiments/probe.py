"""How long a step takes here: a few real ones, on noise of the right shape."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from medvisionllama.config import Config
from medvisionllama.devices import autocast, choose_device, fast_layout
from medvisionllama.networks.factory import build_network
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.optim import make_optimizer
from medvisionllama.types import NetworkShapes

_SECONDS = 1.0
_LONG_SECONDS = 3.0


@dataclass(frozen=True)
class Timing:
    """Seconds on this machine, with the threads of now."""

    step: float
    """Of one optimiser step, batch and all; augmentation is not in it."""
    forward: float
    """Of one crop in evaluation."""


def time_steps(config: Config, shapes: NetworkShapes) -> Timing:
    """Train the network of a configuration on noise for about a second, and segment a crop of it.

    The block is filled with random values: its time does not depend on them, and nothing is fetched.

    Raises:
        BlockError: not even the block's settings can be had.
    """
    device = choose_device(config.train.device)
    block = config.network.block
    if block.weights != "identity":
        block = block.model_copy(update={"weights": "random"})
    network = fast_layout(build_network(config.network.model_copy(update={"block": block}), **shapes)).to(
        device
    )
    model = SupervisedSegmenter(
        network, num_outputs=shapes["num_outputs"], auxiliary_weight=config.train.auxiliary_weight
    ).train()
    optimizer = make_optimizer(network, config.train)
    size = (shapes["num_channels"], *shapes["crop_size"])

    def step(batch: int) -> None:
        images = torch.randn(batch, *size, device=device)
        labels = torch.randint(max(2, shapes["num_outputs"]), (batch, *size[1:]), device=device)
        for _ in range(config.train.accumulate):
            with autocast(config.train.precision, device):
                loss = model(images, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())

    batch = config.train.batch_size
    if device.type == "cuda":
        # The first step of all loads libraries and kernels, for longer than any other takes.
        step(1)
    warm = _seconds(lambda: step(1), once=True)
    if warm > _LONG_SECONDS:
        # Too long to repeat: the crops of a batch cost alike.
        training = warm * batch
    else:
        step(batch)
        training = _seconds(lambda: step(batch))
    network.eval()
    image = torch.randn(1, *size, device=device)
    with torch.no_grad(), autocast(config.train.precision, device):
        forward = _seconds(lambda: float(network(image).mean()), once=warm > _LONG_SECONDS)
    return Timing(training, forward)


def _seconds(work: Callable[[], object], *, once: bool = False) -> float:
    """Median of as many repetitions as fit in a second."""
    times: list[float] = []
    while not times or (not once and sum(times) < _SECONDS):
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return statistics.median(times)
