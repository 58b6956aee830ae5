"""Preprocessing throughput against nnU-Net's own preprocessor: cases and megabytes a second, two workers each.

    python benchmarks/io_preprocess.py --data DIR

Both start from the same .nii.gz files and end with what their training reads. Ours: hash, RAS, resampling where
the spacing differs (linear), foreground voxels and statistics, float32 `.npy` flushed to disk. nnU-Net's
(`3d_fullres`): crop to non-zero, normalisation, resampling where the spacing differs (order-3 splines), foreground
voxels, compressed blosc2. In neither set does the spacing differ, so neither resamples. nnU-Net starts two
processes, we two threads; what it takes them to start is measured by an empty pool before each turn, and given
apart.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nnunet
from medvisionllama._files import write_json
from medvisionllama.run_dir import machine_facts

FOLDER = Path(__file__).parent
RESULT = FOLDER / "results" / "io_preprocess.json"
TASKS = {"Task04_Hippocampus": 4, "Task101_ACDC": 101}
WORKERS = 2

OURS = """
import json, sys, time
from pathlib import Path
import torch
from medvisionllama.config import DataConfig
from medvisionllama.data.cache import build_cache
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import open_dataset
from medvisionllama.data.planning import make_plan
torch.set_num_threads(1)
started = time.perf_counter()
dataset = open_dataset(Path(sys.argv[1]))
plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=True, patch_size=None)
planned = time.perf_counter()
build_cache(dataset.cases, plan, folder=Path(sys.argv[2]), workers=int(sys.argv[3]))
print(json.dumps({"plan_s": planned - started, "seconds": time.perf_counter() - planned}))
"""

NNUNET_PLAN = """
import json, sys, time
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
if __name__ == "__main__":
    started = time.perf_counter()
    extract_fingerprints([int(sys.argv[1])], num_processes=int(sys.argv[2]), show_progress_bar=False)
    plan_experiments([int(sys.argv[1])])
    print(json.dumps({"plan_s": time.perf_counter() - started}))
"""

NNUNET = """
import json, multiprocessing, sys, time
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
def nothing(_): return DefaultPreprocessor.__name__
if __name__ == "__main__":
    number, workers = int(sys.argv[1]), int(sys.argv[2])
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(nothing, range(workers), chunksize=1)
    ready = time.perf_counter()
    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(number, "3d_fullres", "nnUNetPlans", num_processes=workers)
    print(json.dumps({"start_s": ready - started, "seconds": time.perf_counter() - ready}))
"""


def main() -> None:
    arguments = parse()
    scratch = Path(tempfile.mkdtemp(prefix="io-preprocess-", dir=arguments.scratch))
    try:
        python = nnunet.install(arguments.nnunet or scratch / "nnunet")
        rows = [
            measure(arguments.data / name, number, scratch, python, arguments.turns)
            for name, number in TASKS.items()
        ]
    finally:
        shutil.rmtree(scratch)
    result = {
        "nnunet": nnunet.VERSION,
        "workers": WORKERS,
        "rows": rows,
        "machine": machine_facts()["hardware"],
    }
    write_json(RESULT, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("MEDVISIONLLAMA_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None, help="the real scans")
    parser.add_argument("--nnunet", type=Path, help="environment with nnU-Net, made here if it is not there")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


def measure(data: Path, number: int, scratch: Path, python: Path, turns: int) -> dict:
    """Both tools on one dataset, taking turns, each time in a fresh process and into an empty folder."""
    content = json.loads((data / "dataset.json").read_text())
    files = [data / entry[part] for entry in content["training"] for part in ("image", "label")]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    name = nnunet.write_raw(data, number, scratch)
    theirs = nnunet.environment(scratch)
    planned = fresh(python, NNUNET_PLAN, [number, WORKERS], scratch, theirs)
    ours: list[dict] = []
    others: list[dict] = []
    for _ in range(turns):
        cache = scratch / "ours"
        ours.append(fresh(Path(sys.executable), OURS, [data, cache, WORKERS], scratch, our_environment()))
        ours[-1]["disk_mb"] = folder_mb(cache)
        shutil.rmtree(cache)
        others.append(fresh(python, NNUNET, [number, WORKERS], scratch, theirs))
        [written] = (scratch / "preprocessed" / name).glob("*3d_fullres")
        others[-1]["disk_mb"] = folder_mb(written)
        shutil.rmtree(written)
    num_cases = len(content["training"])
    row = {
        "dataset": data.name,
        "num_cases": num_cases,
        "compressed_mb": round(size_mb, 1),
        "ours": summary(ours, num_cases, size_mb),
        "nnunet": {**summary(others, num_cases, size_mb), "plan_s": round(planned["plan_s"], 2)},
    }
    row["times_faster"] = round(row["nnunet"]["seconds"] / row["ours"]["seconds"], 2)
    running = statistics.median([turn["seconds"] - turn["start_s"] for turn in others])
    row["times_faster_without_their_start"] = round(running / row["ours"]["seconds"], 2)
    print(json.dumps(row, indent=2))
    return row


def fresh(python: Path, code: str, arguments: Sequence[object], scratch: Path, environment: dict) -> dict:
    """Run a script in a process of its own; it prints its figures as JSON, last."""
    script = scratch / "script.py"  # a file, since processes that it spawns import it again
    script.write_text(code)
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=scratch
    )
    return json.loads(done.stdout.splitlines()[-1])


def our_environment() -> dict[str, str]:
    source = str(FOLDER.parent / "src")
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}


def folder_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def summary(turns: Sequence[dict], num_cases: int, size_mb: float) -> dict:
    """Medians, and the range of the time."""
    seconds = [turn["seconds"] for turn in turns]
    middle = statistics.median(seconds)
    known = {
        key: round(statistics.median([turn[key] for turn in turns]), 2)
        for key in turns[0]
        if key != "seconds"
    }
    return {
        "seconds": round(middle, 3),
        "seconds_range": [round(min(seconds), 3), round(max(seconds), 3)],
        "cases_per_s": round(num_cases / middle, 2),
        "mb_per_s": round(size_mb / middle, 2),
        **known,
    }


if __name__ == "__main__":
    main()
