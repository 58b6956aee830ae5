"""What predicting a large CT costs: memory, time, and the share that is not the network.

    python benchmarks/io_predict.py

Makes an artificial CT of 512 × 512 × 800 voxels of 0.8 × 0.8 × 1 mm with five organs, trains `small` on small
volumes of the same kind for a minute, and segments the CT in a fresh process, by default with both networks and
all views: read, resample, run windows, bring six classes back to 210 million voxels, write. `--fast` looks once,
as `predict --fast` does. Export is all that follows the network: interpolating probabilities back, taking the
likeliest class, turning the mask to the scan's orientation, and writing it compressed.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medvisionllama import api
from medvisionllama._files import write_json
from medvisionllama.run_dir import machine_facts

RESULTS = Path(__file__).parent / "results"
SHAPE, SPACING = (512, 512, 800), (0.8, 0.8, 1.0)
# Centre and radii as shares of the body, and mean in Hounsfield units.
ORGANS = {
    "liver": ((0.35, 0.5, 0.55), (0.18, 0.2, 0.12), 110),
    "spleen": ((0.7, 0.6, 0.55), (0.08, 0.1, 0.07), 140),
    "kidney": ((0.65, 0.65, 0.4), (0.07, 0.07, 0.08), 180),
    "lung": ((0.5, 0.45, 0.8), (0.3, 0.25, 0.12), -800),
    "spine": ((0.5, 0.75, 0.5), (0.05, 0.05, 0.45), 400),
}


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(timed_prediction(*map(Path, arguments.child), fast=arguments.fast)))
        return
    root = Path(tempfile.mkdtemp(prefix="io-predict-", dir=arguments.scratch))
    try:
        scan = root / "big.nii.gz"
        write_ct(scan, None, SHAPE, SPACING, seed=0)
        trained = train(root, arguments.overlap)
        command = [sys.executable, __file__, "--child", str(trained), str(scan), str(root / "masks")]
        command += ["--fast"] if arguments.fast else []
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        facts = json.loads(printed.splitlines()[-1])
    finally:
        shutil.rmtree(root)
    result = {
        "shape": SHAPE,
        "spacing_mm": SPACING,
        "classes": len(ORGANS),
        "overlap": arguments.overlap,
        **facts,
        "machine": machine_facts()["hardware"],
    }
    print(json.dumps(result, indent=2))
    write_json(RESULTS / f"io_predict{'_fast' if arguments.fast else ''}.json", result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--overlap", type=float, default=0.5, help="of windows; 0.5 is the preset's")
    parser.add_argument("--fast", action="store_true", help="one view instead of all")
    parser.add_argument("--child", nargs=3, metavar=("RUN", "SCAN", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def train(root: Path, overlap: float) -> Path:
    """Train for a minute on small volumes of the same kind."""
    data = root / "data"
    entries = []
    for number in range(10):
        names = [f"./{part}/ct_{number:02d}.nii.gz" for part in ("imagesTr", "labelsTr")]
        write_ct(data / names[0], data / names[1], (140, 140, 160), (1.5, 1.5, 1.5), seed=number + 1)
        entries.append({"image": names[0], "label": names[1]})
    labels = {"0": "background", **{str(value): name for value, name in enumerate(ORGANS, start=1)}}
    write_json(
        data / "dataset.json",
        {"name": "CT", "modality": {"0": "CT"}, "labels": labels, "training": entries},
    )
    overrides = {"inference.overlap": overlap, "data.spacing_mm": (1.5, 1.5, 1.5)}
    api.train(
        data,
        out=root / "run",
        max_minutes=1,
        overrides={**overrides, "train.num_validations": 1},
        test=False,
    )
    return root / "run"


def write_ct(
    image_path: Path, label_path: Path | None, shape: tuple[int, int, int], spacing: Any, *, seed: int
) -> None:
    """Write a body with organs, slice by slice; orientation left-posterior-superior, as scanners have it."""
    rng = np.random.default_rng(seed)
    image, label = np.empty(shape, np.int16), np.zeros(shape, np.uint8)
    x, y = np.meshgrid(*(np.linspace(0, 1, size) for size in shape[:2]), indexing="ij")
    body = ((x - 0.5) / 0.45) ** 2 + ((y - 0.5) / 0.38) ** 2 < 1
    for number, z in enumerate(np.linspace(0, 1, shape[2])):
        plane = np.where(body, 40.0, -1000.0)
        for value, (centre, radii, mean) in enumerate(ORGANS.values(), start=1):
            distance = sum(
                ((axis - at) / radius) ** 2 for axis, at, radius in zip((x, y, z), centre, radii, strict=True)
            )
            inside = distance < 1
            plane[inside] = mean
            label[..., number][inside] = value
        image[..., number] = plane + rng.normal(0, 20, plane.shape)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    for path, array in ((image_path, image), (label_path, label)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)


def timed_prediction(run: Path, scan: Path, out: Path, *, fast: bool) -> dict[str, Any]:
    """Segment one scan and say where the time went; runs in a process of its own, whose peak memory is told."""
    from medvisionllama.inference import batch, predictor

    seconds: dict[str, float] = {"read_and_resample": 0.0, "network": 0.0}
    measure(predictor.Predictor, "prepare", seconds, "read_and_resample")
    planes = predictor.Member.planes

    def timed(*arguments: Any) -> Iterator[Any]:
        source = planes(*arguments)
        while True:
            started = time.perf_counter()
            piece = next(source, None)
            seconds["network"] += time.perf_counter() - started
            if piece is None:
                return
            yield piece

    predictor.Member.planes = timed  # type: ignore[method-assign, assignment]
    measure(batch, "write_mask", seconds, "write")
    started = time.perf_counter()
    [record] = api.predict(run, [scan], out=out, fast=fast)
    total = time.perf_counter() - started
    seconds["loading_the_run"] = total - record["seconds"]
    export = record["seconds"] - seconds["network"] - seconds["read_and_resample"]
    mask = nib.load(record["mask"])
    return {
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30, 2),
        "seconds": {
            key: round(value, 1) for key, value in {**seconds, "export": export, "total": total}.items()
        },
        "export_share": round(export / total, 4),
        "mask_shape": list(mask.shape),
        "volumes_ml": record["volumes_ml"],
        "threads": len(os.sched_getaffinity(0)),
    }


def measure(owner: Any, name: str, seconds: dict[str, float], key: str) -> None:
    """Add the time that calls of a function take to `seconds[key]`."""
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - started

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
