"""nnU-Net v2 itself on our split, in our minutes, scored with our measures.

python benchmarks/nnunet_train.py DATA --cases 14 --minutes 20 --seed 0 --out runs/nnunet

It plans from the training and validation cases alone. Its minutes run from the start of planning to the end of
training, as ours do; the imports of its packages and prediction are left out. See nnunet_trainer.py for what
differs from a stock run.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunet

if TYPE_CHECKING:
    import pandas as pd

    from medvisionllama.data.splits import Selection

TRAINER = Path(__file__).with_name("nnunet_trainer.py")
_NUMBER = 1  # of the dataset; each run has a folder of its own


class NnunetError(RuntimeError):
    """nnU-Net failed, or the folder is another run's; one line."""


@dataclass(frozen=True)
class NnunetResult:
    """Where the masks of the test cases are, and how they came about."""

    masks: Path
    version: str
    iterations: int
    planning_seconds: float
    training_seconds: float
    predicting_seconds: float
    num_removals: int
    """Rules by which components are removed, chosen on the validation cases; 0 if none pays."""
    patch_size: tuple[int, ...]
    batch_size: int
    spacing_mm: tuple[float, ...]
    num_parameters: int
    losses: tuple[float, ...]
    """Mean training loss of each tenth of the time; nnU-Net's lies below 0 where Dice outweighs cross-entropy."""
    pseudo_dices: tuple[float, ...]
    """Dice of one validation batch after each tenth."""


def train_and_score(
    data: Path,
    *,
    cases: int | None,
    minutes: float,
    work: Path,
    environment: Path,
    threads: int,
    seed: int,
    exclude: Sequence[str] = (),
) -> "tuple[pd.DataFrame, NnunetResult, Selection]":
    """Divide the cases as our own training would, train nnU-Net on them and measure its masks of the test cases.

    Args:
        cases: training cases, by whole patients; by default the whole fold.
        seed: of the split and of the training.
        exclude: cases or patients to leave out.

    Raises:
        NnunetError: another request's folder, or a part that failed.
        ValueError: a dataset or settings that cannot be used as they are.
    """
    from medvisionllama.cli._progress import TerminalProgress
    from medvisionllama.config import load_config
    from medvisionllama.evaluation.evaluate import evaluate_folders
    from medvisionllama.training.prepare import divide

    chosen = {
        "data.path": str(data),
        "data.num_cases": cases,
        "data.split_seed": seed,
        "data.exclude": list(exclude),
    }
    _, _, selection = divide(load_config(overrides=chosen), drawn=None)
    result = train_and_predict(
        data,
        train=selection.train,
        validation=selection.validation,
        test=selection.test,
        minutes=minutes,
        work=work,
        environment=environment,
        threads=threads,
        seed=seed,
    )
    table = evaluate_folders(result.masks, data / "labelsTr", progress=TerminalProgress())
    return table, result, selection


def train_and_predict(
    data: Path,
    *,
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    minutes: float,
    work: Path,
    environment: Path,
    threads: int = 2,
    seed: int = 0,
) -> NnunetResult:
    """Train on exactly these cases and segment the test cases; a finished part of the same request is kept.

    Args:
        data: an MSD folder of one channel; only read.
        work: a folder for this run alone; a training that was broken off starts over.
        environment: holds nnU-Net, or is made so.
        threads: processes of the preprocessing, and threads of the network.

    Raises:
        NnunetError: another request's folder, or a part that failed.
        ValueError: cases in two parts or in none.
    """
    data, work, environment = data.resolve(), work.resolve(), environment.resolve()
    request = make_request(
        data, train=train, validation=validation, test=test, minutes=minutes, threads=threads, seed=seed
    )
    if work == data or data in work.parents:
        raise NnunetError(f"{work} lies in the dataset, which is only read; name another folder")
    python = nnunet.install(environment)
    settle(work, request)
    if not (work / "train.json").is_file():
        for name in ("raw", "preprocessed", "results"):
            shutil.rmtree(work / name, ignore_errors=True)
        name = nnunet.write_raw(data, _NUMBER, work, [*train, *validation])
        nnunet.write_splits(name, work, train, validation)
        _run(python, "train", work, request, limit=120 * minutes + 1800)
    if not (work / "predict.json").is_file():
        for name in ("validation_masks", "test_masks", "masks"):
            shutil.rmtree(work / name, ignore_errors=True)
            (work / name).mkdir()
        _run(python, "predict", work, request, limit=None)
    return read_result(work)


def make_request(
    data: Path,
    *,
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    minutes: float,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that the trainer's script is told, and by which a run is recognised.

    Raises:
        ValueError: cases in two parts or in none, or no time.
    """
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not part:
            raise ValueError(f"no {name} case is named; name one at least")
    if len({*train, *validation, *test}) != len(train) + len(validation) + len(test):
        raise ValueError("a case is named twice; train, validation and test cases must differ")
    if minutes <= 0 or threads < 1:
        raise ValueError(
            f"{minutes:g} minutes on {threads} threads is no run; give more than 0 and at least 1"
        )
    listing = nnunet.read_listing(data, _NUMBER, {*train, *validation, *test})
    return {
        "version": nnunet.VERSION,
        "name": listing.name,
        "train": sorted(train),
        "validation": sorted(validation),
        "test": {case: str((data / listing.entries[case]["image"]).resolve()) for case in sorted(test)},
        "minutes": minutes,
        "threads": threads,
        "seed": seed,
    }


def settle(work: Path, request: dict[str, Any]) -> None:
    """Make the folder this request's.

    Raises:
        NnunetError: it holds another request, or something else.
    """
    path = work / "request.json"
    if path.is_file():
        if json.loads(path.read_text()) != request:
            raise NnunetError(f"{work} holds a run with other settings; remove it or name another folder")
    elif work.is_dir() and any(work.iterdir()):
        raise NnunetError(f"{work} is not empty and holds no run; name another folder")
    else:
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(request, indent=1) + "\n")


def read_result(work: Path) -> NnunetResult:
    """Read the facts of a finished run."""
    facts: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for name in ("train", "predict")
        for key, value in json.loads((work / f"{name}.json").read_text()).items()
        if key != "model"
    }
    return NnunetResult(masks=work / "masks", version=nnunet.VERSION, **facts)


def _run(python: Path, verb: str, work: Path, request: dict[str, Any], *, limit: float | None) -> None:
    """Run one part in a session of its own, so that none of its processes outlives it."""
    variables = nnunet.environment(work) | {
        "nnUNet_n_proc_DA": str(request["threads"]),
        "nnUNet_def_n_proc": str(request["threads"]),
    }
    log = work / f"{verb}.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [str(python), "-u", str(TRAINER), verb, str(work)],
            env=variables, cwd=work, stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise NnunetError(f"nnU-Net's part {verb!r} did not end in {limit:.0f} s; see {log}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code or not (work / f"{verb}.json").is_file():
        lines = log.read_text(errors="replace").strip().splitlines()
        raise NnunetError(
            f"nnU-Net's part {verb!r} failed: {lines[-1] if lines else f'exit {code}'}; see {log}"
        )


def main() -> None:
    from medvisionllama.evaluation.evaluate import mean_class_dice, write_table

    arguments = parse()
    try:
        table, result, selection = train_and_score(
            arguments.data,
            cases=arguments.cases,
            minutes=arguments.minutes,
            work=arguments.out,
            environment=arguments.environment,
            threads=arguments.threads,
            seed=arguments.seed,
            exclude=arguments.exclude,
        )
    except (NnunetError, ValueError) as error:
        raise SystemExit(str(error)) from None
    write_table(table, arguments.out / "evaluation.csv")
    facts = {key: value for key, value in asdict(result).items() if key != "masks"}
    print(json.dumps(facts, indent=1))
    dice = mean_class_dice(table)
    print(
        f"mean class Dice {dice.mean():.4f} on {len(dice)} test cases, trained on {len(selection.train)} in "
        f"{arguments.minutes:g} min ({result.iterations} iterations); per case: {arguments.out / 'evaluation.csv'}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="an MSD folder of one channel")
    parser.add_argument(
        "--cases", type=int, help="training cases, by whole patients; by default the whole fold"
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the training")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        help="a patient or case to leave out, repeatable; few_shot.py leaves patient076 of ACDC out",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    default = Path(tempfile.gettempdir()) / "nnunet-env"
    parser.add_argument("--environment", type=Path, default=default, help="made here if it is not there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
