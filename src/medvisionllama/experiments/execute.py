"""What a worker does with one run: fit, open the test cases, write the facts of the report."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from medvisionllama._files import write_json
from medvisionllama.config import Config, read_config, write_config
from medvisionllama.data.index import open_configured
from medvisionllama.devices import choose_device
from medvisionllama.evaluation.evaluate import mean_dice
from medvisionllama.evaluation.evaluate_run import evaluate_run
from medvisionllama.experiments.fair import matched_settings, sizes_of_run
from medvisionllama.experiments.matrix import WITHOUT_EFFECT, PlannedRun, variant_name
from medvisionllama.experiments.store import Experiment, RunFiles
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir, code_words, sessions
from medvisionllama.training.fit import RunResult, fit, with_absolute_paths

_TRAINED = ("steps", "seconds", "validation_dice")


def execute(experiment: Experiment, run: PlannedRun, *, progress: Progress) -> bool:
    """Begin a run or go on with it; return False if it was interrupted.

    Raises:
        MedVisionLlamaError: whatever training or evaluation finds wrong.
    """
    files = experiment.files(run.run_id)
    if files.trained.is_file():
        _keep_up(experiment, run, files)
    else:
        result = _train(experiment, run, files, progress)
        if not result.finished:
            return False
        write_json(files.trained, {key: getattr(result, key) for key in _TRAINED})
    started = time.monotonic()
    dice = {run.arm: mean_dice(evaluate_run(files.path, progress=progress))}
    for variant in run.also:
        table = evaluate_run(files.path, block_removed=variant == "block_removed", progress=progress)
        dice[variant_name(run.arm, variant)] = mean_dice(table)
    seconds = time.monotonic() - started
    write_json(files.done, _facts(files, dice, seconds))
    # Weights and tables stay; what only an unfinished run needs would fill the disk.
    shutil.rmtree(RunDir(files.path).state.parent, ignore_errors=True)
    return True


def _train(experiment: Experiment, run: PlannedRun, files: RunFiles, progress: Progress) -> RunResult:
    config, begun = _begin(experiment, run, files)
    return fit(config, resume=begun, progress=progress)


def _begin(experiment: Experiment, run: PlannedRun, files: RunFiles) -> tuple[Config, bool]:
    """Settings of a run, and whether it goes on."""
    places = _places(experiment, run, files)
    if not files.config.is_file():
        data = places["data.path"]
        return run.config(data=data, out=files.path, more=matched_settings(run, data=data)), False
    # What changes no result is as the matrix says now; a run may go on with another device.
    now = {key: value for key, value in run.settings.items() if key in WITHOUT_EFFECT}
    return read_config(files.config, {**now, **places}), True


def _places(experiment: Experiment, run: PlannedRun, files: RunFiles) -> dict[str, Path]:
    """Where the dataset and the run are now: either may have moved since the run began."""
    return {"data.path": experiment.data_of(run), "out": files.path}


def _keep_up(experiment: Experiment, run: PlannedRun, files: RunFiles) -> None:
    """Write into a trained run's config.yaml where its dataset is now; all that evaluates it reads that file."""
    now = with_absolute_paths(read_config(files.config, _places(experiment, run, files)))
    if now != read_config(files.config):
        write_config(now, files.config)


def _facts(files: RunFiles, dice: dict[str, float], evaluation_seconds: float) -> dict[str, Any]:
    run_dir = RunDir(files.path)
    config = read_config(run_dir.config)
    manifest, history = run_dir.read_manifest(), run_dir.read_history()
    patients = open_configured(config.data).patients
    # Of a run that went on on another machine the last one is named.
    last = sessions(manifest)[-1]
    hardware = last["hardware"]
    on_gpu = choose_device(config.train.device).type == "cuda"
    device = hardware["gpu"] if on_gpu else f"{hardware['processor']}, {hardware['threads']} threads"
    return {
        "run_id": files.path.name,
        "splits_sha256": manifest["splits_sha256"],
        "data_sha256": manifest["data_sha256"],
        "cases": {part: len(names) for part, names in manifest["cases"].items()},
        "patients": {
            part: sorted({patients[name] for name in names}) for part, names in manifest["cases"].items()
        },
        **json.loads(files.trained.read_text()),
        "evaluation_seconds": round(evaluation_seconds, 2),
        "test_dice": dice,
        "gate_rms": history[-1].get("gate_rms") if history else None,
        **sizes_of_run(config, run_dir),
        "attempts": len(files.read_failures()) + 1,
        "machine": f"{device}, {last['precision']}",
        "made_with": sorted({code_words(session) for session in sessions(manifest)}),
    }
