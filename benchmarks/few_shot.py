"""Few labels, equal minutes: our preset, its controls and its rivals on the same cases, machine and clock.

python benchmarks/few_shot.py --rows hippocampus-14 --arms no-tokens,unet-16,nnunet --seeds 0
python benchmarks/few_shot.py --preset large    # one GPU: all cases, 30 minutes each

Without --rows, --arms and --seeds it makes the whole table (107 hours with `small`). Each cell (row, arm, seed)
runs in a process of its own on two cores (`large`: on all), writes its per-case table to results/few_shot/, and
is skipped from then on; so the table may grow over many sessions and machines. --minutes makes a shorter table,
kept apart from the full one.

A tuned rival (`unet-16-tuned`) first chooses its learning rate on the validation cases, in three runs of a
quarter of the minutes each, which do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from medvisionllama.run_dir import RunDir

RESULTS = Path(__file__).parent / "results" / "few_shot"


@dataclass(frozen=True)
class Row:
    """A dataset, and how much of it trains for how long."""

    data: str
    cases: int | None
    """Training cases, by whole patients; None for all of the fold."""
    minutes: float
    thick: bool = True
    """Whether slices are so thick that the plan makes the grid coarser."""


@dataclass(frozen=True)
class Arm:
    """One of MONAI's networks or our own, and what is set over it."""

    rival: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    """Whether its learning rate is chosen before, on the validation cases, in minutes that do not count."""


NNUNET = "nnunet"
TUNED = "-tuned"
RATES = (7e-4, 2e-3, 6e-3)
"""Learning rates that a rival may choose from; the one in the middle is ours."""
TUNING_SHARE = 0.25
"""Of its minutes, for a run with each."""
UNLABELLED = "self-training"
NATIVE = "native-spacing"
ROWS = {
    "hippocampus-14": Row("Task04_Hippocampus", 14, 20, thick=False),
    "hippocampus-all": Row("Task04_Hippocampus", None, 30, thick=False),
    # Two frames a patient.
    "acdc-4": Row("Task101_ACDC", 8, 20),
    "sunnybrook-5": Row("Task104_SunnybrookLV", 10, 20),
    "acdc-all": Row("Task101_ACDC", None, 30),
    "sunnybrook-all": Row("Task104_SunnybrookLV", None, 30),
}
TABLES = {
    "small": ("hippocampus-14", "hippocampus-all", "acdc-4", "sunnybrook-5"),
    "large": ("hippocampus-all", "acdc-all", "sunnybrook-all"),
}
"""The rows of each preset's table."""
ARMS = {
    "block": Arm(),
    "random-block": Arm(overrides={"network.block.weights": "random"}),
    "no-block": Arm(overrides={"network.insert": "none", "network.gate": "none"}),
    "no-tokens": Arm(overrides={"network.tokens": False}),
    # What the scans without labels add: those of the fold that the row leaves out.
    UNLABELLED: Arm(overrides={"network.tokens": False, "unlabelled.scans": "unused"}),
    NATIVE: Arm(overrides={"network.tokens": False, "data.coarsest_mm": 0}),
    "no-context": Arm(overrides={"network.tokens": False, "network.context_channels": None}),
    **{
        f"{name}-{width}{TUNED * tuned}": Arm(name, {"network.base_channels": width}, tuned)
        for name, widths in {
            "unet": (16, 32),
            "unet++": (8, 32),
            "dynunet": (16, 32),
            "segresnet": (8, 16),
            "unetr": (4, 16),
            "swin_unetr": (12, 24),
        }.items()
        for width in widths
        for tuned in (False, True)
    },
}


def main() -> None:
    arguments = parse()
    if arguments.cell:
        run_cell(arguments)
        return
    rows = names(arguments.rows, ROWS, default=TABLES[arguments.preset])
    fair = [arm for arm, spec in ARMS.items() if spec.tuned or not spec.rival]
    arms = names(arguments.arms, {**ARMS, NNUNET: None}, default=[*fair, NNUNET])
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    # Seed by seed, so that stopping early leaves whole repetitions.
    for seed in seeds:
        for row in rows:
            for arm in arms:
                if says_nothing(ROWS[row], arm):
                    continue
                if not (folder(arguments, row) / f"{arm}-s{seed}.json").is_file():
                    print(f"{row}, {arm}, seed {seed}", flush=True)
                    command = [sys.executable, __file__, *sys.argv[1:], "--cell", row, arm, str(seed)]
                    # A rival that fails is missing from the table, and the others go on.
                    if subprocess.run(command, check=False).returncode:
                        print(f"{row}, {arm}, seed {seed} failed", flush=True)
    for row in rows:
        where = folder(arguments, row)
        if table := [json.loads(path.read_text()) for path in sorted(where.glob("*-s*.json"))]:
            summary = summarise(table, where)
            summary.to_csv(where / "summary.csv", index=False)
            print(f"\n{row}, {minutes_of(arguments, row):g} minutes on {arguments.threads} cores")
            print(summary.to_string(index=False))


def says_nothing(row: Row, arm: str) -> bool:
    """Whether an arm is the same training as the one without tokens."""
    return (arm == UNLABELLED and row.cases is None) or (arm == NATIVE and not row.thick)


def run_cell(arguments: argparse.Namespace) -> None:
    """Train and test one arm, and write its table and facts."""
    # Before torch is imported, which counts the cores then.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from medvisionllama.evaluation.evaluate import mean_class_dice, write_table
    from medvisionllama.run_dir import machine_facts

    row, arm, seed = arguments.cell[0], arguments.cell[1], int(arguments.cell[2])
    started, used = time.monotonic(), os.times()
    train = train_nnunet if arm == NNUNET else train_ours
    table, facts = train(arguments, row, arm, seed)
    now = os.times()
    cores = sum(now[:4]) - sum(used[:4])
    where = folder(arguments, row)
    where.mkdir(parents=True, exist_ok=True)
    write_table(table, where / f"{arm}-s{seed}.csv")
    machine = machine_facts()
    facts = {
        "row": row,
        "arm": arm,
        "seed": seed,
        "minutes": minutes_of(arguments, row),
        "test_dice": round(float(mean_class_dice(table).mean()), 4),
        **facts,
        # Other work on the machine shows here: a quiet run of two threads uses nearly two.
        "mean_cores_used": round(cores / (time.monotonic() - started), 2),
        "hardware": machine["hardware"],
        "git_revision": machine.get("git_revision"),
    }
    (where / f"{arm}-s{seed}.json").write_text(json.dumps(facts, indent=2) + "\n")


def train_ours(
    arguments: argparse.Namespace, row: str, arm: str, seed: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Train our network, or a rival as it is trained, by our own loop."""
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress

    path, minutes = run_folder(arguments, row, arm, seed), minutes_of(arguments, row)
    rates: dict[float, float] = {}
    for rate in RATES if ARMS[arm].tuned else ():
        probe = path.with_name(f"{path.name}-rate{rate:g}")
        settings = {"train.learning_rate": rate}
        rates[rate] = best_dice(train_run(arguments, row, arm, seed, probe, TUNING_SHARE * minutes, settings))
    chosen = {"train.learning_rate": max(rates, key=rates.__getitem__)} if rates else {}
    run = train_run(arguments, row, arm, seed, path, minutes, chosen)
    # As nnU-Net does: components are removed where that pays on the validation cases.
    api.evaluate(run.path, split="validation", choose_cleaning=True, progress=TerminalProgress())
    table = api.evaluate(run.path, progress=TerminalProgress())
    history, manifest = run.read_history(), run.read_manifest()
    return table, {
        "validation_dice": best_dice(run),
        **({"rates": rates} if rates else {}),
        "steps": history[-1]["step"],
        "seconds": history[-1]["seconds"],
        "gate_rms": history[-1].get("gate_rms"),
        "trainable": manifest["network"]["trainable_parameters"],
        "frozen": manifest["network"]["frozen_parameters"],
        "precision": manifest["precision"],
        "splits_sha256": manifest["splits_sha256"],
        "train_cases": manifest["cases"]["train"],
    }


def train_run(
    arguments: argparse.Namespace,
    row: str,
    arm: str,
    seed: int,
    path: Path,
    minutes: float,
    more: dict[str, Any],
) -> "RunDir":
    """Train an arm for some minutes, or go on with a run that was cut off."""
    from medvisionllama import api
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.run_dir import RunDir

    spec, run = ARMS[arm], RunDir(path)
    api.train(
        arguments.data / ROWS[row].data,
        out=path,
        preset=spec.rival or arguments.preset,
        cases=ROWS[row].cases,
        max_minutes=minutes,
        overrides={
            **(settings_but_network(arguments.preset) if spec.rival else {}),
            # Few validations: those of a slow network would eat a good part of its minutes.
            "train.num_validations": 4,
            **spec.overrides,
            "data.split_seed": seed,
            "train.seed": seed,
            **more,
        },
        resume=run.config.is_file(),
        test=False,
        progress=TerminalProgress(),
    )
    return run


def best_dice(run: "RunDir") -> float:
    """Validation Dice of the weights that a run keeps."""
    return round(max(record["dice"] for record in run.read_history()), 4)


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

    table, result, selection = nnunet_train.train_and_score(
        arguments.data / ROWS[row].data,
        cases=ROWS[row].cases,
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
        "precision": "fp32",
        "train_cases": sorted(selection.train),
        "version": result.version,
        "patch_size": result.patch_size,
    }


def summarise(cells: list[dict[str, Any]], where: Path) -> pd.DataFrame:
    """A line for each arm and machine: mean over seeds, spread, paired difference from the arm without tokens.

    Equal minutes on another machine are other steps, so machines are kept apart.
    """
    from medvisionllama.evaluation.evaluate import mean_class_dice, read_table
    from medvisionllama.evaluation.statistics import bootstrap_interval

    tables = {
        (machine_of(cell), cell["arm"], cell["seed"]): read_table(
            where / f"{cell['arm']}-s{cell['seed']}.csv"
        )
        for cell in cells
    }
    dice = {cell: mean_class_dice(table) for cell, table in tables.items()}
    # The unit is the patient: two scans of one heart are no two witnesses.
    patients = pd.concat(tables.values()).groupby("case_id")["patient_id"].first()
    lines = []
    for machine, arm in dict.fromkeys((machine_of(cell), cell["arm"]) for cell in cells):
        own = [cell for cell in cells if (machine_of(cell), cell["arm"]) == (machine, arm)]
        scores = pd.Series([cell["test_dice"] for cell in own])
        line = {
            "arm": arm,
            "seeds": len(own),
            "dice": round(scores.mean(), 4),
            "seed_sd": round(scores.std(), 4),
            "steps": round(sum(cell["steps"] for cell in own) / len(own)),
            "trainable": own[0]["trainable"],
            "cores_used": min(cell["mean_cores_used"] for cell in own),
            "machine": machine,
        }
        pairs = [
            dice[machine, arm, cell["seed"]] - dice[machine, "no-tokens", cell["seed"]]
            for cell in own
            if (machine, "no-tokens", cell["seed"]) in dice and arm != "no-tokens"
        ]
        if pairs:
            difference = pd.concat(pairs)
            low, high = bootstrap_interval(difference.tolist(), patients[difference.index].tolist())
            line |= {
                "minus_no_tokens": round(difference.mean(), 4),
                "low": round(low, 4),
                "high": round(high, 4),
            }
        lines.append(line)
    return pd.DataFrame(lines).sort_values(["machine", "dice"], ascending=[True, False])


def machine_of(cell: dict[str, Any]) -> str:
    """What a cell's minutes were spent on, such as `AMD EPYC, AVX512, 2 threads`."""
    hardware = cell["hardware"]
    if hardware["gpu"]:
        return str(hardware["gpu"])
    return f"{hardware['processor']}, {hardware['instructions']}, {hardware['threads']} threads"


def minutes_of(arguments: argparse.Namespace, row: str) -> float:
    """The row's own, or what was asked for."""
    return float(arguments.minutes or ROWS[row].minutes)


def folder(arguments: argparse.Namespace, row: str) -> Path:
    """Where a row's results lie: those of other minutes or of another preset apart."""
    return arguments.results / table_name(arguments, row)


def run_folder(arguments: argparse.Namespace, row: str, arm: str, seed: int) -> Path:
    """Run folder of a cell; it stays, so that a cell that was cut off goes on."""
    return arguments.runs.resolve() / f"few-shot-{table_name(arguments, row)}-{arm}-s{seed}"


def table_name(arguments: argparse.Namespace, row: str) -> str:
    """Such as `acdc-4-20min`, or `acdc-all-30min-large`."""
    suffix = "" if arguments.preset == "small" else f"-{arguments.preset}"
    return f"{row}-{minutes_of(arguments, row):g}min{suffix}"


def names(asked: str | None, known: dict[str, Any], *, default: Sequence[str] | None = None) -> list[str]:
    """Those asked for, or the default ones, or all."""
    chosen = asked.split(",") if asked else list(default or known)
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"{unknown[0]!r} is unknown; known: {', '.join(known)}")
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("MEDVISIONLLAMA_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default, help="folder that holds the datasets")
    parser.add_argument("--preset", choices=TABLES, default="small", help="ours; large is for one GPU")
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}; by default the preset's table")
    parser.add_argument(
        "--arms", help=f"some of {', '.join(ARMS)}, {NNUNET}; by default ours, the tuned rivals and {NNUNET}"
    )
    parser.add_argument("--seeds", default="0,1,2", help="of the split and of the training")
    parser.add_argument("--minutes", type=float, help="instead of each row's own")
    parser.add_argument("--threads", type=int, help="CPU cores; by default 2 for small, all for large")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--nnunet", type=Path, default=Path("runs/nnunet-env"), help="nnU-Net's environment, made if missing"
    )
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads is None:
        arguments.threads = 2 if arguments.preset == "small" else os.cpu_count()
    return arguments


if __name__ == "__main__":
    main()
