"""One training step of the `paper` preset at 128³, around a randomly initialised block of Llama-3.1-8B's shape.

    python benchmarks/paper_step.py --batch 4

Time is split by part; peak memory is the process's own high-water mark.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch

from medvisionllama._files import write_json
from medvisionllama.config import load_config
from medvisionllama.devices import choose_device, fast_layout, use_bf16
from medvisionllama.networks.factory import build_network
from medvisionllama.run_dir import machine_facts
from medvisionllama.training.losses import SupervisedSegmenter
from medvisionllama.training.optim import make_optimizer

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--block-dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    block = [f"network.block.{setting}" for setting in ("weights=random", f"dtype={arguments.block_dtype}")]
    config = load_config("paper", block)
    assert config.data.crop_size is not None
    device = choose_device("auto")
    bf16 = use_bf16(arguments.precision, device)
    network = build_network(
        config.network,
        num_channels=1,
        num_outputs=1,
        crop_size=config.data.crop_size,
        strides=((8, 8, 8), (1, 1, 1), (1, 1, 1)),
    )
    built = peak_gib()
    model = SupervisedSegmenter(fast_layout(network).to(device), num_outputs=1, auxiliary_weight=0.0).train()
    optimizer = make_optimizer(model, config.train)
    images = torch.randn(arguments.batch, 1, *config.data.crop_size, device=device)
    labels = (torch.rand(arguments.batch, *config.data.crop_size, device=device) > 0.9).long()
    seconds = [step(model, optimizer, images, labels, bf16=bf16) for _ in range(arguments.steps)]
    result = {
        "batch": arguments.batch,
        "precision": "bf16" if bf16 else "fp32",
        "seconds": [round(value, 1) for value in seconds],
        "peak_gib_built": round(built, 2),
        "peak_gib": round(peak_gib(), 2),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "machine": machine_facts()["hardware"],
        "system": platform.platform(),
    }
    kept = "_block_bf16" if arguments.block_dtype == "bfloat16" else ""
    name = f"paper_step_batch{arguments.batch}_{result['precision']}{kept}.json"
    write_json(RESULTS / name, result)
    print(json.dumps(result, indent=2))


def step(
    model: SupervisedSegmenter,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    bf16: bool,
) -> float:
    started = time.monotonic()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = model(images, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss)
    return time.monotonic() - started


def peak_gib() -> float:
    """High-water mark of this process's memory (the GPU's own, on a GPU)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
