"""Seconds of a training step, and the share of its parts: ours beside MONAI's networks, on the same batches.

python benchmarks/step.py --data ../shared/data/Task04_Hippocampus --cases 14

Steps of all arms are taken in turns, so that other work on the machine meets all alike; compare ratios. A step is
one network's in all threads, whatever the arm trains in the few-shot table. `optimiser` is with clipping and the
average of the weights, and training makes batches ahead, beside the step before.
"""

import argparse
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch

from few_shot_arms import ARMS
from medvisionllama._files import write_json
from medvisionllama.checkpoint import trainable
from medvisionllama.config import load_config
from medvisionllama.data.sampling import BatchSampler
from medvisionllama.devices import autocast, choose_device, fast_layout
from medvisionllama.networks.factory import build_network
from medvisionllama.progress import Silent
from medvisionllama.run_dir import machine_facts
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.optim import AveragedWeights, make_optimizer
from medvisionllama.training.prepare import PreparedData, prepare_data

PARTS = ("batch", "forward", "backward", "optimiser")
RESULTS = Path(__file__).parent / "results"


class Trained:
    """One arm, and what each of its steps took."""

    def __init__(self, arm: str, data: PreparedData, arguments: argparse.Namespace) -> None:
        spec = ARMS[arm]
        self.config = load_config(spec.rival or "small", {**spec.overrides, "data.path": str(arguments.data)})
        self.device = choose_device(self.config.train.device)
        self.sampler = BatchSampler(
            data.train,
            data.plan,
            self.config.data,
            self.config.augment,
            batch_size=self.config.train.batch_size,
            seed=0,
        )
        network = fast_layout(build_network(self.config.network, **data.plan.network_shapes)).to(self.device)
        self.model = SupervisedSegmenter(
            network,
            num_outputs=data.plan.num_outputs,
            auxiliary_weight=self.config.train.auxiliary_weight,
        ).train()
        self.parameters = trainable(network)
        self.optimizer = make_optimizer(network, self.config.train)
        self.average = AveragedWeights(self.parameters, self.config.train.ema_decay)
        self.seconds: list[dict[str, float]] = []

    def step(self, number: int) -> None:
        """Take a step and note its parts."""
        times = [time.perf_counter()]
        images, labels = self.sampler.batch(number)
        images, labels = images.to(self.device), labels.to(self.device)
        times.append(self._now())
        with autocast(self.config.train.precision, self.device):
            loss = self.model(images, labels)
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(number)
        times.append(self._now())
        lengths = [after - before for before, after in pairwise(times)]
        self.seconds.append(dict(zip(PARTS, lengths, strict=True)))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    config = load_config(overrides={"data.path": str(arguments.data), "data.num_cases": arguments.cases})
    data = prepare_data(config, drawn=None, progress=Silent())
    arms = {arm: Trained(arm, data, arguments) for arm in arguments.arms.split(",")}
    for number in range(arguments.warmup + arguments.steps):
        for arm in arms.values():
            arm.step(number)
    lines = [line(name, arm, arguments.warmup) for name, arm in arms.items()]
    table = pd.DataFrame(lines)
    table["times_first"] = (table["seconds"] / table["seconds"][0]).round(2)
    print(table.to_string(index=False))
    facts = {
        "data": arguments.data.name,
        "crop": data.plan.crop_size,
        "batch_size": config.train.batch_size,
        "threads": arguments.threads,
        "hardware": machine_facts()["hardware"],
        "arms": table.to_dict("records"),
    }
    write_json(RESULTS / f"step_{arguments.data.name}.json", facts)


def line(name: str, arm: Trained, warmup: int) -> dict[str, object]:
    """Median of a step, its spread, and the share of each part."""
    kept = arm.seconds[warmup:]
    totals = sorted(sum(parts.values()) for parts in kept)
    shares = {part: sum(parts[part] for parts in kept) / sum(totals) for part in PARTS}
    return {
        "arm": name,
        "seconds": round(statistics.median(totals), 4),
        "least": round(totals[0], 4),
        "most": round(totals[-1], 4),
        **{part: round(share, 3) for part, share in shares.items()},
    }


def parse() -> argparse.Namespace:
    default = Path(os.environ.get("MEDVISIONLLAMA_DATA", "../shared/data")) / "Task04_Hippocampus"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--cases", type=int, default=14)
    parser.add_argument(
        "--arms",
        default="no-tokens,no-block,block,dynunet-16,unet-16,unet++-8,segresnet-8,unetr-4,swin_unetr-12",
        help=f"some of {', '.join(ARMS)}; slow ones take long",
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
