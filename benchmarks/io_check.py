"""How fast `data check` reads ten thousand small volumes, and in how much memory.

    python benchmarks/io_check.py

Writes a dataset of random volumes with labels to `--scratch` (about 2 GB), checks it from the command line in a
fresh process, headers only and whole, and deletes it.
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

import nibabel as nib
import numpy as np

from medvisionllama._files import write_json
from medvisionllama.run_dir import machine_facts

RESULT = Path(__file__).parent / "results" / "io_check.json"
SHAPE = (32, 32, 32)


def main() -> None:
    arguments = parse()
    root = Path(tempfile.mkdtemp(prefix="io-check-", dir=arguments.scratch))
    try:
        write_dataset(root / "data", arguments.cases)
        rows = [
            {"what": what, **timed([str(root / "data"), *options])}
            for what, options in (
                ("headers only", ["--fast"]),
                ("whole", []),
                ("whole, with a page", ["--html", str(root / "check.html")]),
            )
        ]
    finally:
        shutil.rmtree(root)
    for row in rows:
        row["cases_per_second"] = round(arguments.cases / row["seconds"], 1)
        print(json.dumps(row))
    result = {
        "cases": arguments.cases,
        "shape": SHAPE,
        "cores_used": len(os.sched_getaffinity(0)),
        "rows": rows,
        "machine": machine_facts()["hardware"],
    }
    write_json(RESULT, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cases", type=int, default=10_000)
    return parser.parse_args()


def write_dataset(root: Path, num_cases: int) -> None:
    """Every image and every label is different; compressed, as datasets come."""
    rng = np.random.default_rng(0)
    entries = []
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number in range(num_cases):
        name = f"case_{number:05d}.nii.gz"
        image = rng.integers(0, 1000, SHAPE, dtype=np.int16)
        label = np.zeros(SHAPE, np.uint8)
        x, y, z = rng.integers(2, 14, 3)
        label[x : x + 14, y : y + 14, z : z + rng.integers(8, 15)] = 1
        label[x : x + 6, y : y + 6, z : z + 6] = 2
        label[tuple(rng.integers(x + 7, x + 14, 4)), y + 8, z + 3] = 0
        for folder, array in (("imagesTr", image), ("labelsTr", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / folder / name)
        entries.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    content = {
        "name": "Small volumes",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "first", "2": "second"},
        "training": entries,
    }
    (root / "dataset.json").write_text(json.dumps(content))


def timed(arguments: list[str]) -> dict[str, float | str]:
    """Run the command line; wall and processor time, and the highest resident memory of that process.

    On a machine with other work the processor time is what can be compared.
    """
    command = [sys.executable, "-m", "medvisionllama", "data", "check", *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    summary = next(line for line in reversed(lines) if " cases of " in line)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "exit_code": process.returncode,
        "summary": summary,
    }


if __name__ == "__main__":
    main()
