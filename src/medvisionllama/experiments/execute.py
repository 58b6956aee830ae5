"""What a worker does with one run: fit, open the test cases, write the facts of the report."""

import json
import shutil
import time
from operator import attrgetter
from typing import Any

from medvisionllama._files import write_json
from medvisionllama.config import Config, read_config, write_config
from medvisionllama.data.index import open_configured
from medvisionllama.evaluation.evaluate import mean_dice, read_table
from medvisionllama.evaluation.evaluate_run import Scored, evaluate_run, out_of_date
from medvisionllama.experiments.collect import is_as_told
from medvisionllama.experiments.fair import matched_settings, sizes_of_run
from medvisionllama.experiments.matrix import WITHOUT_EFFECT, PlannedRun, Settings, Variant, variant_name
from medvisionllama.experiments.store import Experiment, RunFiles
from medvisionllama.networks.factory import check_insert
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir, code_words, sessions
from medvisionllama.training.fit import RunResult, fit, with_absolute_paths
from medvisionllama.training.prepare import prepare_data
from medvisionllama.training.seen import patients_by_part

_TRAINED = ("steps", "seconds", "validation_dice")


def execute(experiment: Experiment, run: PlannedRun, *, progress: Progress) -> bool:
    """Begin a run or go on with it; return False if it was interrupted.

    Raises:
        MedVisionLlamaError: whatever training or evaluation finds wrong.
    """
    files = experiment.files(run.run_id)
    before: Settings = {}
    if files.trained.is_file():
        _keep_up(experiment, run, files)
        before = _measured(run, files)
    else:
        result = _train(experiment, run, files, progress)
        if not result.finished:
            return False
        write_json(files.trained, {key: getattr(result, key) for key in _TRAINED})
    started = time.monotonic()
    dice: dict[str, float] = dict(before.get("test_dice", {}))
    for name, variant in _evaluations(run).items():
        if name not in dice:
            table = evaluate_run(files.path, block_removed=variant == "block_removed", progress=progress)
            dice[name] = mean_dice(table)
    seconds = before.get("evaluation_seconds", 0.0) + time.monotonic() - started
    write_json(files.done, _facts(files, dice, seconds))
    # Weights and tables stay; what only an unfinished run needs would fill the disk.
    for member in RunDir(files.path).members():
        shutil.rmtree(member.state.parent, ignore_errors=True)
        shutil.rmtree(member.pseudo_labels(1).parent, ignore_errors=True)
    return True


def _evaluations(run: PlannedRun) -> dict[str, Variant | None]:
    """What is measured of a run, by the name that it has in the tables."""
    return {run.arm: None} | {variant_name(run.arm, variant): variant for variant in run.also}


def _measured(run: PlannedRun, files: RunFiles) -> Settings:
    """Facts of what was measured before and is still as it was.

    It is not measured again beside a further evaluation: code that has changed since would score this arm by other
    rules than those that were done with it.
    """
    facts = files.read_done() or {}
    if not facts or not _would_score_alike(RunDir(files.path)):
        return {}
    told, kept = facts.get("test_dice", {}), {}
    for name, variant in _evaluations(run).items():
        file = Scored(RunDir(files.path), block_removed=variant == "block_removed").table
        if name in told and file.is_file() and is_as_told(read_table(file), told[name]):
            kept[name] = told[name]
    return {**facts, "test_dice": kept} if kept else {}


def _would_score_alike(run_dir: RunDir) -> bool:
    """Whether the run's test would be scored by the weights, the cleaning and the tolerance by which it was.

    Where nothing tells, it is not measured again.
    """
    if not run_dir.evaluation.is_file():
        return False
    config = read_config(run_dir.config)
    tolerances = set(read_table(run_dir.evaluation)["tolerance_mm"])
    return tolerances == {config.inference.tolerance_mm} and not out_of_date(run_dir, config)


def _train(experiment: Experiment, run: PlannedRun, files: RunFiles, progress: Progress) -> RunResult:
    config, begun = _begin(experiment, run, files)
    run_dir = RunDir(files.path)
    if config.train.max_minutes is not None and not run_dir.state.is_file():
        # The clock of a run starts before its scans and its block are there: the first arms of a matrix would pay
        # with minutes of training for what all of them use.
        check_insert(config.network)
        drawn = run_dir.splits if begun else config.data.splits
        prepare_data(config, drawn=drawn, begun=begun, progress=progress)
    return fit(config, resume=begun, progress=progress)


def _begin(experiment: Experiment, run: PlannedRun, files: RunFiles) -> tuple[Config, bool]:
    """Settings of a run, its paths absolute, and whether it goes on."""
    now = _now(experiment, run, files)
    if files.config.is_file():
        return with_absolute_paths(read_config(files.config, now)), True
    data = now["data.path"]
    config = run.config(data=data, out=files.path, more=matched_settings(run, data=data))
    return with_absolute_paths(config), False


def _now(experiment: Experiment, run: PlannedRun, files: RunFiles) -> Settings:
    """What may have changed since a run began: where its dataset and its folder are, and what changes no result."""
    data = experiment.data_of(run)
    # Of the whole configuration: what the matrix does not set any more is the preset's again.
    wanted = run.config(data=data, out=files.path)
    free = {key: attrgetter(key)(wanted) for key in WITHOUT_EFFECT}
    return {**free, "data.path": data, "out": files.path}


def _keep_up(experiment: Experiment, run: PlannedRun, files: RunFiles) -> None:
    """Write into a trained run's config.yaml what may have changed; all that evaluates it reads that file."""
    now = with_absolute_paths(read_config(files.config, _now(experiment, run, files)))
    if now != read_config(files.config):
        write_config(now, files.config)


def _facts(files: RunFiles, dice: dict[str, float], evaluation_seconds: float) -> dict[str, Any]:
    run_dir = RunDir(files.path)
    config = read_config(run_dir.config)
    manifest, history = run_dir.read_manifest(), run_dir.read_history()
    dataset = open_configured(config.data, begun=True)
    # Those too by whom the run was trained or chosen that it began with.
    seen = patients_by_part(run_dir, dataset.cases)
    patients = {**seen, "test": {dataset.patients[name] for name in manifest["cases"]["test"]}}
    # Of a run that went on on another machine the last one is named.
    last = sessions(manifest)[-1]
    hardware = last["hardware"]
    on_gpu = hardware["device"] == "cuda"
    device = hardware["gpu"] if on_gpu else f"{hardware['processor']}, {hardware['threads']} threads"
    return {
        "run_id": files.path.name,
        "splits_sha256": manifest["splits_sha256"],
        "data_sha256": manifest["data_sha256"],
        "cases": {part: len(names) for part, names in manifest["cases"].items()},
        "patients": {part: sorted(names) for part, names in patients.items()},
        **json.loads(files.trained.read_text(encoding="utf-8")),
        "evaluation_seconds": round(evaluation_seconds, 2),
        "test_dice": dice,
        "gate_rms": history[-1].get("gate_rms") if history else None,
        **sizes_of_run(config, run_dir),
        "attempts": len(files.read_failures()) + 1,
        "machine": f"{device}, {last['precision']}",
        "made_with": sorted({code_words(session) for session in sessions(manifest)}),
    }
