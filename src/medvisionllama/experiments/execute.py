"""What a worker does with one run: fit, open the test cases, write the facts of the report."""

import shutil
import time
from typing import Any

from medvisionllama._files import write_json
from medvisionllama.config import Config, read_config
from medvisionllama.data.index import open_configured
from medvisionllama.evaluation.evaluate import evaluate_run, mean_class_dice
from medvisionllama.experiments.fair import matched_settings, sizes_of_run
from medvisionllama.experiments.matrix import PlannedRun
from medvisionllama.experiments.store import Experiment, RunFiles
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir
from medvisionllama.training.fit import RunResult, fit


def execute(experiment: Experiment, run: PlannedRun, *, progress: Progress) -> bool:
    """Begin a run or go on with it; return False if it was interrupted.

    Raises:
        MedVisionLlamaError: whatever training or evaluation finds wrong.
    """
    files = experiment.files(run.run_id)
    data = experiment.data_of(run)
    places = {"data.path": data, "out": files.path}
    begun = files.config.is_file()
    if begun:
        config = read_config(files.config, places)
    else:
        config = run.config(data=data, out=files.path, more=matched_settings(run, data=data))
    result = fit(config, resume=begun, progress=progress)
    if not result.finished:
        return False
    started = time.monotonic()
    dice = {run.arm: float(mean_class_dice(evaluate_run(files.path, progress=progress)).mean())}
    for variant in run.also:
        table = evaluate_run(files.path, block_removed=variant == "block_removed", progress=progress)
        dice[variant_name(run.arm, variant)] = float(mean_class_dice(table).mean())
    seconds = time.monotonic() - started
    write_json(files.done, _facts(run, files, config, result, dice, seconds))
    # Weights and tables stay; what only an unfinished run needs would fill the disk.
    shutil.rmtree(RunDir(files.path).state.parent, ignore_errors=True)
    return True


def variant_name(arm: str, variant: str) -> str:
    """Name under which a further evaluation of an arm's weights stands in the tables."""
    return f"{arm}-{variant.replace('_', '-')}"


def _facts(
    run: PlannedRun,
    files: RunFiles,
    config: Config,
    result: RunResult,
    dice: dict[str, float],
    evaluation_seconds: float,
) -> dict[str, Any]:
    run_dir = RunDir(files.path)
    manifest, history = run_dir.read_manifest(), run_dir.read_history()
    patients = open_configured(config.data).patients
    hardware = manifest["hardware"]
    device = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads"
    return {
        "run_id": run.run_id,
        "splits_sha256": manifest["splits_sha256"],
        "data_sha256": manifest["data_sha256"],
        "cases": {part: len(names) for part, names in manifest["cases"].items()},
        "patients": {
            part: sorted({patients[name] for name in names}) for part, names in manifest["cases"].items()
        },
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "evaluation_seconds": round(evaluation_seconds, 2),
        "validation_dice": result.validation_dice,
        "test_dice": dice,
        "gate_rms": history[-1].get("gate_rms") if history else None,
        **sizes_of_run(config, run_dir),
        "attempts": len(files.read_failures()) + 1,
        "machine": f"{device}, {manifest['precision']}",
        "git_revision": manifest["git_revision"],
    }
