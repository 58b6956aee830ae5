"""Few labels, equal minutes: our preset, its controls and its rivals on the same cases, machine and clock.

python benchmarks/few_shot.py --rows hippocampus-14 --arms no-tokens,unet-16,nnunet --seeds 0
python benchmarks/few_shot.py --preset large    # one GPU: all cases, 30 minutes each

Without --rows, --arms and --seeds it makes the whole table, which takes days with `small`; how many hours is said
first. Each cell (row, arm, seed) runs in a process of its own on two cores (`large`: on all), writes its per-case
table to results/few_shot/, and is skipped from then on; so the table may grow over many sessions. Arms are compared
on one machine only, and each machine has its own cells. --minutes makes a shorter table, kept apart.

Our arms are two networks side by side, as `small` is, or one, as `large` is; a rival is two (`unet-16`) or one
(`unet-16-one-network`), which suits networks of slow steps better. A tuned rival (`unet-16-tuned`) is one, and
first chooses its learning rate on the validation cases, in three runs of a quarter of the minutes each, which do
not count. Nor do those of the run on another hospital's scans that an arm in `-begun` begins with.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from few_shot_arms import (
    ARMS,
    NNUNET,
    RATES,
    ROWS,
    START_MINUTES,
    TABLES,
    TUNING_SHARE,
    says_nothing,
)
from few_shot_cell import INTERRUPTED, cell_path, folder, minutes_of, run_cell
from few_shot_summary import machine_slug, summarise

RESULTS = Path(__file__).parent / "results" / "few_shot"


def main() -> None:
    arguments = parse()
    if arguments.cell:
        run_cell(arguments)
        return
    # Not above: a cell tells torch of its threads before it is imported.
    from medvisionllama.run_dir import machine_facts

    arguments.machine = machine_slug(machine_facts()["hardware"] | {"threads": arguments.threads})
    rows = names(arguments.rows, ROWS, default=TABLES[arguments.preset])
    fair = [arm for arm, spec in ARMS.items() if (spec.tuned or not spec.rival) and not spec.begun]
    arms = names(arguments.arms, {**ARMS, NNUNET: None}, default=[*fair, NNUNET])
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    # Seed by seed, so that stopping early leaves whole repetitions.
    due = [
        (row, arm, seed)
        for seed in seeds
        for row in rows
        for arm in arms
        if not says_nothing(ROWS[row], arm, arguments.preset)
        and not cell_path(arguments, row, arm, seed).is_file()
    ]
    hours = sum(training_minutes(arguments, row, arm) for row, arm, _ in due) / 60
    print(f"{len(due)} cells to make: {hours:.1f} hours of training", flush=True)
    failed: list[str] = []
    for row, arm, seed in due:
        print(f"{row}, {arm}, seed {seed}", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", row, arm, str(seed)]
        code = run_to_end(command)
        if code == INTERRUPTED:
            raise SystemExit(INTERRUPTED)
        # A rival that fails is missing from the table, and the others go on.
        if code:
            failed.append(f"{row}, {arm}, seed {seed}")
            print(f"{failed[-1]} failed", flush=True)
    for row in rows:
        where = folder(arguments, row)
        if not (summary := summarise(where)).empty:
            summary.to_csv(where / "summary.csv", index=False)
            print(f"\n{row}, {minutes_of(arguments, row):g} minutes on {arguments.threads} cores")
            print(summary.to_string(index=False))
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def run_to_end(command: Sequence[str]) -> int:
    """Run a cell and return its exit code; told to stop, wait until it has saved and return `INTERRUPTED`.

    A cell that is left behind would take the cores of the next one.
    """
    process, told = subprocess.Popen(command), []

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                code = process.wait()
                return INTERRUPTED if told else code
            except KeyboardInterrupt:
                # A terminal has told the cell too.
                told.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def training_minutes(arguments: argparse.Namespace, row: str, arm: str) -> float:
    """Minutes of a cell, with those in which a rate is chosen or an earlier run made; without the test."""
    if arm == NNUNET:
        return minutes_of(arguments, row)
    tuning = TUNING_SHARE * len(RATES) * ARMS[arm].tuned
    return minutes_of(arguments, row) * (1 + tuning) + START_MINUTES * ARMS[arm].begun


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
    parser.add_argument(
        "--published",
        action="store_true",
        help="only the scans of our tables (cases.json), where a dataset holds others too",
    )
    parser.add_argument("--minutes", type=float, help="instead of each row's own")
    parser.add_argument("--threads", type=int, help="CPU cores; by default 2 for small, all for large")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--nnunet", type=Path, default=Path("runs/nnunet-env"), help="nnU-Net's environment, made if missing"
    )
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = arguments.threads or (2 if arguments.preset == "small" else cores)
    arguments.threads = min(wanted, cores)
    return arguments


if __name__ == "__main__":
    main()
