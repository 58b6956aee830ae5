"""What it costs to load one block of a checkpoint of 16 GB in four files: bytes read, bytes served, peak memory.

    python benchmarks/block_source.py

Writes a random checkpoint of Llama 3.1 8B's shape to `--scratch` (17 GB free needed), loads a layer from the folder
and once more from a local server with byte ranges, each in a fresh process, and deletes it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from medvisionllama._files import write_json
from medvisionllama.llm.catalog import CATALOG
from medvisionllama.run_dir import machine_facts

RESULT = Path(__file__).parent / "results" / "block_source.json"
LAYER = 31


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    root = Path(tempfile.mkdtemp(prefix="block-source-", dir=arguments.scratch))
    try:
        folder = root / "org" / "model"
        checkpoint_bytes = write_checkpoint(folder)
        rows: list[dict[str, Any]] = [{"source": "folder", **in_a_fresh_process(str(folder), {})}]
        rows.append({"source": "http", **over_http(root)})
    finally:
        shutil.rmtree(root)
    block_bytes = rows[0]["block_bytes"]
    for row in rows:
        moved = row.get("bytes_served", row["bytes_read"])
        row["moved_over_block"] = round(moved / block_bytes, 4)
        row["peak_above_block_mb"] = round((row["peak_bytes"] - row["bytes_at_start"] - block_bytes) / 1e6)
        print(json.dumps(row))
    result = {
        "checkpoint_bytes": checkpoint_bytes,
        "num_files": 4,
        "rows": rows,
        "machine": machine_facts()["hardware"],
    }
    write_json(RESULT, result)


def write_checkpoint(folder: Path) -> int:
    """Write config, index and four files of bfloat16; the values do not matter, so they repeat."""
    from safetensors.torch import save_file

    settings = CATALOG["llama-3.1-8b"].settings
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    width, hidden, num_layers = (
        settings["hidden_size"],
        settings["intermediate_size"],
        settings["num_hidden_layers"],
    )
    shapes = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    layer_content = {part: torch.randn(shape).to(torch.bfloat16) for part, shape in shapes.items()}
    homes: dict[str, str] = {}
    for number in range(4):
        name = f"model-{number + 1:05d}-of-00004.safetensors"
        content = {
            f"model.layers.{layer}.{part}.weight": tensor.clone()
            for layer in range(number * num_layers // 4, (number + 1) * num_layers // 4)
            for part, tensor in layer_content.items()
        }
        vocabulary = (settings["vocab_size"], width)
        if number == 0:
            content["model.embed_tokens.weight"] = torch.zeros(vocabulary, dtype=torch.bfloat16)
        if number == 3:
            content["lm_head.weight"] = torch.zeros(vocabulary, dtype=torch.bfloat16)
            content["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save_file(content, folder / name)
        homes |= dict.fromkeys(content, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def over_http(root: Path) -> dict[str, int | float]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from range_server import serving  # type: ignore[import-not-found]

    with serving(root) as server, tempfile.TemporaryDirectory(dir=root) as cache:
        environment = {"HF_ENDPOINT": server.url, "MEDVISIONLLAMA_CACHE": cache}
        row = in_a_fresh_process("org/model", environment)
        return {**row, "bytes_served": server.served}


def in_a_fresh_process(source: str, environment: dict[str, str]) -> dict[str, int | float]:
    command = [sys.executable, __file__, "--load", source]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    output = subprocess.run(command, env=clean | environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def load(source: str) -> dict[str, int | float]:
    """Load one layer in its own precision; report what it took."""
    start, started = peak_bytes(), time.perf_counter()
    from medvisionllama.llm import FrozenBlock

    block = FrozenBlock.from_pretrained(source, layers=(LAYER,), dtype=torch.bfloat16)
    took = {
        "seconds": round(time.perf_counter() - started, 2),
        "block_bytes": sum(t.numel() * t.element_size() for t in block.frozen_tensors().values()),
        "bytes_at_start": start,
        "peak_bytes": peak_bytes(),
    }
    # The first time, the modules of transformers are read too; so the bytes are those of a second time.
    del block
    read = bytes_read()
    FrozenBlock.from_pretrained(source, layers=(LAYER,), dtype=torch.bfloat16)
    return {**took, "bytes_read": bytes_read() - read}


def peak_bytes() -> int:
    """Peak resident memory of this program; `ru_maxrss` would begin with that of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def bytes_read() -> int:
    """What read calls returned to this process, cached by the system or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


if __name__ == "__main__":
    main()
