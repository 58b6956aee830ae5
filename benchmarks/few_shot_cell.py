"""One cell of the few-shot table: an arm trained on a row's cases for its minutes, and tested."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from few_shot_arms import ARMS, NNUNET, RATES, ROWS, START_MINUTES, TUNING_SHARE
from few_shot_summary import machine_slug, unused_table
from few_shot_unused import score_unused

if TYPE_CHECKING:
    from medvisionllama.run_dir import RunDir

CASES = Path(__file__).parent / "cases.json"
"""Every scan of our tables."""
INTERRUPTED = 130
"""What a program ends with that was told to stop, as shells have it."""


def run_cell(arguments: argparse.Namespace) -> None:
    """Train and test one arm, and write its table and facts."""
    # Before torch is imported, which counts the cores then.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from medvisionllama._files import write_json
    from medvisionllama.evaluation.evaluate import mean_dice, write_table
    from medvisionllama.run_dir import machine_facts

    row, arm, seed = arguments.cell[0], arguments.cell[1], int(arguments.cell[2])
    machine = machine_facts()
    arguments.machine = machine_slug(machine["hardware"])
    started, used = time.monotonic(), os.times()
    train = train_nnunet if arm == NNUNET else train_ours
    table, facts = train(arguments, row, arm, seed)
    now = os.times()
    cores = sum(now[:4]) - sum(used[:4])
    path = cell_path(arguments, row, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, path.with_suffix(".csv"))
    facts = {
        "row": row,
        "arm": arm,
        "seed": seed,
        "minutes": minutes_of(arguments, row),
        "test_dice": round(mean_dice(table), 4),
        **facts,
        # Other work on the machine shows here: a quiet run of two threads uses nearly two.
        "mean_cores_used": round(cores / (time.monotonic() - started), 2),
        "hardware": machine["hardware"],
        "git_revision": machine.get("git_revision"),
    }
    # Whole or not at all: a cell that is there is not made again.
    write_json(path, facts)


def train_ours(
    arguments: argparse.Namespace, row: str, arm: str, seed: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Train our network, or a rival as it is trained, by our own loop."""
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.evaluation.evaluate import mean_dice, write_table
    from medvisionllama.run_dir import revisions

    path, minutes = run_folder(arguments, row, arm, seed), minutes_of(arguments, row)
    rates: dict[float, float] = {}
    for rate in RATES if ARMS[arm].tuned else ():
        probe = path.with_name(f"{path.name}-rate{rate:g}")
        settings = {"train.learning_rate": rate}
        tried = train_run(arguments, row, arm, seed, probe, TUNING_SHARE * minutes, settings)
        rates[rate] = round(tried.kept_record()["dice"], 4)
    chosen: dict[str, Any] = {"train.learning_rate": max(rates, key=rates.__getitem__)} if rates else {}
    if ARMS[arm].begun:
        chosen["train.start_from"] = str(earlier_run(arguments, row, arm).path)
    run = train_run(arguments, row, arm, seed, path, minutes, chosen)
    # As nnU-Net does: components are removed where that pays on the validation cases.
    api.evaluate(run.path, split="validation", choose_cleaning=True, progress=TerminalProgress())
    table = api.evaluate(run.path, progress=TerminalProgress())
    unused = score_unused(run, TerminalProgress())
    if not unused.empty:
        write_table(unused, unused_table(cell_path(arguments, row, arm, seed)))
    history, manifest = run.read_history(), run.read_manifest()
    return table, {
        "validation_dice": round(run.kept_record()["dice"], 4),
        "unused_dice": None if unused.empty else round(mean_dice(unused), 4),
        **({"rates": rates} if rates else {}),
        **({"begun_with": begun_facts(manifest["started_from"], row)} if ARMS[arm].begun else {}),
        "steps": history[-1]["step"],
        "seconds": history[-1]["seconds"],
        "gate_rms": history[-1].get("gate_rms"),
        "trainable": manifest["network"]["trainable_parameters"],
        "frozen": manifest["network"]["frozen_parameters"],
        "precision": manifest["precision"],
        "splits_sha256": manifest["splits_sha256"],
        "train_cases": manifest["cases"]["train"],
        # Of a run that was cut off and went on they may differ.
        "trained_at": revisions(manifest),
    }


def earlier_run(arguments: argparse.Namespace, row: str, arm: str) -> "RunDir":
    """Train what an arm begins with, if it is not there yet: itself, on all cases of another hospital."""
    other = ROWS[row].begin_with
    assert other is not None, "rows without one are left out"
    name = f"few-shot-start-{other}-{START_MINUTES:g}min-{arguments.preset}-{arm}"
    return train_run(arguments, other, arm, 0, machine_folder(arguments) / name, START_MINUTES, {})


def begun_facts(started_from: dict[str, Any], row: str) -> dict[str, Any]:
    """What a cell tells of the run that it began with; whom that saw is no row's patient."""
    kept = {key: started_from[key] for key in ("weights_sha256", "kept_parameters")}
    return {"row": ROWS[row].begin_with, "minutes": START_MINUTES, **kept}


def train_run(
    arguments: argparse.Namespace,
    row: str,
    arm: str,
    seed: int,
    path: Path,
    minutes: float,
    more: dict[str, Any],
) -> "RunDir":
    """Train an arm for some minutes, or go on with a run that was cut off.

    Raises:
        SystemExit: it was cut off now, saved, and must not be scored; or its folder holds another run.
    """
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.run_dir import RunDir

    spec, run = ARMS[arm], RunDir(path)
    preset = spec.rival or arguments.preset
    settings = {
        **(settings_but_network(arguments.preset) if spec.rival else {}),
        **spec.overrides,
        "data.exclude": excluded(arguments, row),
        "data.split_seed": seed,
        "train.seed": seed,
        **more,
    }
    limits = {"data.num_cases": ROWS[row].cases, "train.max_minutes": minutes}
    if run.config.is_file():
        check_begun(run, preset, limits | settings)
    result = api.train(
        arguments.data / ROWS[row].data,
        out=path,
        preset=preset,
        cases=ROWS[row].cases,
        max_minutes=minutes,
        overrides=settings,
        resume=run.config.is_file(),
        test=False,
        progress=TerminalProgress(),
    )
    if not result.finished:
        raise SystemExit(INTERRUPTED)
    return run


def excluded(arguments: argparse.Namespace, row: str) -> list[str]:
    """What a cell leaves out of everything: a row's own patients, and with --published all scans that ours had not.

    Raises:
        SystemExit: a scan of ours is missing, so that no split would be ours.
    """
    spec = ROWS[row]
    if not arguments.published:
        return list(spec.exclude)
    from medvisionllama.data.index import open_dataset

    ours = set(json.loads(CASES.read_text())[spec.data])
    patients = open_dataset(arguments.data / spec.data).patients
    if missing := sorted(ours - patients.keys()):
        raise SystemExit(f"{spec.data} lacks {len(missing)} of the scans of our tables, such as {missing[0]}")
    return [*spec.exclude, *sorted(patients.keys() - ours)]


def check_begun(run: "RunDir", preset: str, settings: dict[str, Any]) -> None:
    """Raise SystemExit if a run was begun with other settings: a preset of before would be scored as today's."""
    from medvisionllama.config import load_config, read_config

    begun, asked = (
        config.model_dump(exclude={"preset": True, "out": True, "data": {"path"}})
        for config in (read_config(run.config), load_config(preset, settings))
    )
    for section, values in asked.items():
        for key, value in values.items():
            if begun[section][key] != value:
                raise SystemExit(
                    f"{run.path} was begun with {section}.{key}={begun[section][key]} and not {value}; move it away, or give another --runs"
                )


def settings_but_network(preset: str) -> dict[str, Any]:
    """Crops, augmentation and schedule of a preset, for a rival to share; its minutes are the row's."""
    from medvisionllama.config.presets import preset_settings

    sections = preset_settings(preset)
    return {
        f"{section}.{key}": value
        for section in ("data", "augment", "train")
        for key, value in sections.get(section, {}).items()
        if key != "max_minutes"
    }


def train_nnunet(
    arguments: argparse.Namespace, row: str, arm: str, seed: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Train nnU-Net itself on the same cases."""
    import nnunet_train
    from medvisionllama.run_dir import machine_facts

    gpu = machine_facts()["hardware"]["gpu"]
    table, result, selection = nnunet_train.train_and_score(
        arguments.data / ROWS[row].data,
        cases=ROWS[row].cases,
        exclude=excluded(arguments, row),
        minutes=minutes_of(arguments, row),
        work=run_folder(arguments, row, arm, seed),
        environment=arguments.nnunet,
        threads=arguments.threads,
        seed=seed,
    )
    return table, {
        "steps": result.iterations,
        "seconds": result.planning_seconds + result.training_seconds,
        "trainable": result.num_parameters,
        # As nnU-Net itself does.
        "precision": "fp16" if gpu else "fp32",
        "train_cases": sorted(selection.train),
        "version": result.version,
        "patch_size": result.patch_size,
    }


def minutes_of(arguments: argparse.Namespace, row: str) -> float:
    """The row's own, or what was asked for."""
    return float(arguments.minutes or ROWS[row].minutes)


def folder(arguments: argparse.Namespace, row: str) -> Path:
    """Where a row's results lie: those of other minutes or of another preset apart."""
    return arguments.results / table_name(arguments, row)


def cell_path(arguments: argparse.Namespace, row: str, arm: str, seed: int) -> Path:
    """Facts of a cell; its table lies beside. Machines have a folder each."""
    return folder(arguments, row) / arguments.machine / f"{arm}-s{seed}.json"


def run_folder(arguments: argparse.Namespace, row: str, arm: str, seed: int) -> Path:
    """Run folder of a cell; it stays, so that a cell that was cut off goes on, on the machine that began it."""
    name = f"few-shot-{table_name(arguments, row)}-{arm}-s{seed}"
    return machine_folder(arguments) / name


def machine_folder(arguments: argparse.Namespace) -> Path:
    """Where the runs of a machine lie."""
    folder: Path = arguments.runs.resolve() / arguments.machine
    return folder


def table_name(arguments: argparse.Namespace, row: str) -> str:
    """Such as `acdc-4-20min`, or `acdc-all-30min-large`."""
    suffix = "" if arguments.preset == "small" else f"-{arguments.preset}"
    return f"{row}-{minutes_of(arguments, row):g}min{suffix}"
