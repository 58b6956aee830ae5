"""A matrix of ten thousand runs: planning it, its status, and the look at its folder before a launch.

python benchmarks/experiment_scan.py

Half of the runs are made to look done, a tenth failed, one is locked; the rest has no folder. Times are of the work
itself, in one process; starting Python and its libraries comes on top and is given beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from medvisionllama._files import lock_if_free, write_json
from medvisionllama.experiments import verbs
from medvisionllama.experiments.launch import launch
from medvisionllama.experiments.matrix import expand
from medvisionllama.experiments.store import Experiment
from medvisionllama.progress import Silent
from medvisionllama.run_dir import machine_facts

RESULT = Path(__file__).parent / "results" / "experiment_scan.json"
WEIGHTS = ["random", "moment_matched", "permuted", "identity", "pretrained"]
MATRIX = {
    "name": "ten-thousand",
    "tasks": {f"task{number}": {"phantoms": 30} for number in range(5)},
    "models": {"small": {}, "narrow": {"set": {"network.width": 96}}},
    "arms": {
        "none": {"set": {"network.insert": "none"}},
        "mlp": {"set": {"network.insert": "mlp"}},
        "block": {"each": {"network.block.weights": WEIGHTS}},
        "layer": {"each": {"network.block.layers": [0, 10, 20]}},
    },
    "reference": "none",
    "fractions": [0.1, 1.0],
    "folds": [0, 1, 2, 3, 4],
    "seeds": list(range(10)),
    "set": {"train.max_steps": 1000},
}


PATIENTS = [f"patient_{number:03d}" for number in range(200)]
FACTS = {
    "splits_sha256": "0" * 64,
    "data_sha256": "0" * 64,
    "cases": {"train": 144, "validation": 36, "test": 20},
    "patients": {"train": PATIENTS[:144], "validation": PATIENTS[144:180], "test": PATIENTS[180:]},
    **{"steps": 1000, "seconds": 60.0, "validation_dice": 0.8, "evaluation_seconds": 5.0},
    **{
        "test_dice": {"none": 0.8},
        "gate_rms": None,
        "trainable": 3_834_337,
        "frozen": 3_540_672,
        "gflops": 2.3,
    },
    **{"attempts": 1, "machine": "two cores", "made_with": ["medvisionllama 0.1.0"]},
}
"""What a finished run with two hundred patients leaves."""


class NoBackend:
    """Starts nothing: what is left of a launch is the look at the folder."""

    num_slots = 0

    def start(self, run_id: str) -> None:
        raise AssertionError(run_id)

    def wait(self, seconds: float) -> list:
        raise KeyboardInterrupt

    def stop(self) -> None:
        """Nothing runs."""


def main() -> None:
    repeats = parse().repeats
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matrix.yaml"
        path.write_text(yaml.safe_dump(MATRIX, sort_keys=False))
        experiment = Experiment.create(Path(folder) / "out", path, data_root=None)
        runs = expand(experiment.matrix)
        fill(experiment, [run.run_id for run in runs])
        held = experiment.files(runs[-1].run_id).lock
        with lock_if_free(held):
            verbs.plan(experiment.path, probe=False)  # imports and phantoms
            times = {
                "plan": seconds(lambda: verbs.plan(experiment.path, probe=False), repeats),
                "status": seconds(lambda: status(experiment.path), repeats),
                "resume scan": seconds(lambda: resume(experiment.path), repeats),
            }
            command = [
                sys.executable,
                "-m",
                "medvisionllama",
                "experiment",
                "status",
                str(experiment.path),
                "--json",
            ]
            times["status, whole command"] = seconds(
                lambda: subprocess.run(command, check=True, capture_output=True), repeats
            )
    facts = {"runs": len(runs), "seconds": times, "machine": machine_facts()["hardware"]}
    write_json(RESULT, facts)
    for name, (low, middle, high) in times.items():
        print(f"{name:24} {middle:6.2f} s ({low:.2f} to {high:.2f}), {len(runs):,} runs")


def fill(experiment: Experiment, run_ids: list[str]) -> None:
    """Give runs the files that their state is read from."""
    for number, run_id in enumerate(run_ids):
        files = experiment.files(run_id)
        if number % 10 < 6 or run_id == run_ids[-1]:
            files.path.mkdir(parents=True)
            files.lock.touch()
            files.config.touch()
            (files.path / "history.jsonl").touch()
        if number % 10 < 5:
            files.done.write_text(json.dumps({"run_id": run_id, **FACTS}, indent=2))
        elif number % 10 == 5:
            files.add_failure("out of memory", "Traceback ...", where="here")


def status(path: Path) -> None:
    """Everything that `experiment status` shows."""
    found = verbs.status(path)
    assert len(found.states) == 10_000
    assert found.count("done") == 5_000
    assert found.count("running") == 1
    assert len(found.failures()) == 1_000
    assert found.seconds_left()


def resume(path: Path) -> None:
    """What a launcher does before its first start."""
    experiment = Experiment.open(path)
    try:
        launch(experiment, expand(experiment.matrix), NoBackend(), progress=Silent())
    except KeyboardInterrupt:
        return


def seconds(work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Least, median and most of several turns."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times), statistics.median(times), max(times)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
