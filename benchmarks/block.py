"""What a frozen block costs: forward, and backward to its input, at the width of Llama 3.1 8B.

    python benchmarks/block.py

Three ways, measured in turn in one process so that their ratios hold on any machine: ours; the reference code's way
(full float32 attention matrix, repeated key-value heads); and the floor, the same matrix products with nothing
between them. Peak memory is that of a fresh process for each way: the block's weights and one step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvisionllama._files import write_json
from medvisionllama.llm import FrozenBlock
from medvisionllama.run_dir import machine_facts

RESULTS = Path(__file__).parent / "results"
WIDTH, HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD = 4096, 14_336, 32, 8, 128
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="by default results/block.json, or block_cuda.json on a GPU")
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--memory-of", choices=["ours", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.memory_of:
        print(peak_gib(arguments.memory_of, arguments.tokens[0], arguments.precision, device))
        return
    precisions = arguments.precisions or (["float32", "bfloat16"] if device.type == "cuda" else ["float32"])
    rows = [
        measure(tokens, precision, device, arguments.repeats)
        for tokens in arguments.tokens
        for precision in precisions
    ]
    result = {"rows": rows, "across_precisions": across_precisions(rows)}
    print(json.dumps(result["across_precisions"]))
    out = arguments.out or RESULTS / ("block_cuda.json" if device.type == "cuda" else "block.json")
    write_json(out, {**result, "machine": machine_facts()["hardware"]})


def measure(tokens: int, precision: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time the three ways in turn; report medians and the ratios of each turn."""
    dtype = getattr(torch, precision)
    block = make_block(device, dtype)
    x = torch.randn(1, tokens, WIDTH, device=device, dtype=dtype)
    ways = {
        "ours": there_and_back(block, x),
        "reference": there_and_back(ReferenceBlock(block), x),
        "floor": floor(block, x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, step in ways.items():
            spent = timed(step, device)
            if turn:  # the first one warms up
                seconds[name].append(spent)
    row: dict[str, Any] = {"tokens": tokens, "precision": precision, "device": device.type}
    row |= {f"{name}_s": [round(value, 4) for value in values] for name, values in seconds.items()}
    row["ours_over_floor"] = ratio(seconds["ours"], seconds["floor"])
    row["reference_over_ours"] = ratio(seconds["reference"], seconds["ours"])
    del ways, block
    for name in ("ours", "reference"):
        command = [sys.executable, __file__, "--memory-of", name, "--tokens", str(tokens)]
        output = subprocess.run(
            [*command, "--precision", precision], check=True, capture_output=True, text=True
        )
        row[f"{name}_peak_gib"] = float(output.stdout.split()[-1])
    print(json.dumps(row), flush=True)
    return row


def across_precisions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours in bfloat16 against the reference code as it runs, in float32."""
    found = {(row["tokens"], row["precision"]): row for row in rows}
    result = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        ours, theirs = found.get((tokens, "bfloat16")), found.get((tokens, "float32"))
        if ours and theirs:
            time_ratio = ratio(theirs["reference_s"], ours["ours_s"])
            memory_ratio = round(ours["ours_peak_gib"] / theirs["reference_peak_gib"], 3)
            result.append(
                {
                    "tokens": tokens,
                    "reference_float32_over_ours_bfloat16": time_ratio,
                    "memory_ours_bfloat16_over_reference_float32": memory_ratio,
                }
            )
    return result


def ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Median and range of turn-by-turn ratios."""
    values = [a / b for a, b in zip(first, second, strict=True)]
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib(way: str, tokens: int, precision: str, device: torch.device) -> float:
    """Most memory held at once by weights and one step, above what the interpreter held before."""
    dtype = getattr(torch, precision)
    before = status_gib("VmRSS")
    block = make_block(device, dtype)
    step = there_and_back(
        ReferenceBlock(block) if way == "reference" else block,
        torch.randn(1, tokens, WIDTH, device=device, dtype=dtype),
    )
    if device.type == "cuda":
        step()
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the block
    step()
    return round(status_gib("VmHWM") - before, 3)


def status_gib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def make_block(device: torch.device, dtype: torch.dtype) -> FrozenBlock:
    return FrozenBlock.from_pretrained("llama-3.1-8b", weights="random", device=device, dtype=dtype)


def there_and_back(block: nn.Module, x: Tensor) -> Step:
    """Forward, and backward to the input."""
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        leaf.grad = None
        block(leaf).backward(grad)

    return step


class ReferenceBlock(nn.Module):
    """The same layer as the published code computes it: every score kept, in float32, for every head."""

    def __init__(self, block: FrozenBlock) -> None:
        super().__init__()
        self.layer: Any = block.layers[0]
        self.norm: Any = block.norm

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.layer.self_attn, self.layer.mlp
        h = self.layer.input_layernorm(x)
        batch, length, _ = h.shape
        query = attention.q_proj(h).view(batch, length, HEADS, HEAD).transpose(1, 2)
        key = attention.k_proj(h).view(batch, length, KEY_VALUE_HEADS, HEAD)
        value = attention.v_proj(h).view(batch, length, KEY_VALUE_HEADS, HEAD)
        groups = HEADS // KEY_VALUE_HEADS
        key, value = (t.repeat_interleave(groups, dim=2).transpose(1, 2) for t in (key, value))
        scores = query @ key.transpose(2, 3) / HEAD**0.5
        weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
        attended = (weights @ value).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + attention.o_proj(attended)
        h = self.layer.post_attention_layernorm(x)
        x = x + mlp.down_proj(nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return self.norm(x)


def floor(block: FrozenBlock, x: Tensor) -> Step:
    """The matrix products of a step alone: one each way per matrix, two forward and four back in the attention."""
    layer: Any = block.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    flat = {
        size: torch.randn(x.shape[1], size, device=x.device, dtype=x.dtype) for size in (1024, WIDTH, HIDDEN)
    }
    groups = HEADS // KEY_VALUE_HEADS
    # One group of heads at a time, so that the products and not the memory for all scores are measured.
    query = torch.randn(groups * x.shape[1], HEAD, device=x.device, dtype=x.dtype)
    key = torch.randn(x.shape[1], HEAD, device=x.device, dtype=x.dtype)
    scores = torch.randn(groups * x.shape[1], x.shape[1], device=x.device, dtype=x.dtype)
    wide, narrow = torch.empty_like(query), torch.empty_like(key)

    @torch.no_grad()
    def step() -> None:
        for linear in linears:
            torch.mm(flat[linear.in_features], linear.weight.T)
            torch.mm(flat[linear.out_features], linear.weight)
        for _ in range(KEY_VALUE_HEADS):
            for _ in range(2):  # scores, and their gradient
                torch.mm(query, key.T, out=scores)
            for _ in range(2):  # what is attended to, and the queries' gradient
                torch.mm(scores, key, out=wide)
            for _ in range(2):  # the keys' and the values' gradients
                torch.mm(scores.T, query, out=narrow)

    return step


if __name__ == "__main__":
    main()
