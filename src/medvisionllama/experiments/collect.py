"""From the folders of finished runs to the tables of a report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from medvisionllama.errors import CheckpointError
from medvisionllama.evaluation.evaluate import mean_dice, read_table
from medvisionllama.evaluation.evaluate_run import Scored
from medvisionllama.evaluation.metrics import Measures
from medvisionllama.experiments.matrix import PlannedRun, Variant, variant_name
from medvisionllama.experiments.store import Experiment, State
from medvisionllama.progress import Progress, Silent
from medvisionllama.run_dir import RunDir

_PLACE = ["run_id", "task", "model", "arm", "fraction", "fold", "seed"]
_FACTS = [
    *("splits_sha256", "steps", "seconds", "evaluation_seconds", "validation_dice", "trainable", "frozen"),
    *("gflops", "gate_rms", "attempts", "machine", "data_sha256"),
]
"""What a run's own record tells, under the same names."""
_RUN_COLUMNS = [*_PLACE, "state", *_FACTS, "train_cases", "test_cases", "test_dice", "error", "variant_of"]
_CURVE_COLUMNS = [*_PLACE, "step", "seconds", "loss", "dice"]
_CASE_COLUMNS = [
    *(*_PLACE, "splits_sha256", "case_id", "patient_id", "class"),
    *(field.name for field in fields(Measures)),
]

_ROUNDING = 1e-5
"""Tables have six digits."""


@dataclass(frozen=True)
class Frames:
    """Tables of an experiment."""

    runs: pd.DataFrame
    """A row for each planned run, and one for each further evaluation of its weights."""
    cases: pd.DataFrame
    """A row for each finished run, test case and class."""
    curves: pd.DataFrame
    """A row for each validation."""
    train_patients: dict[str, tuple[str, ...]]
    """Those that each finished run was trained or chosen by."""
    code: frozenset[str]
    """Versions and revisions of the code that made the finished runs."""


def collect(
    experiment: Experiment,
    runs: Sequence[PlannedRun],
    states: Mapping[str, State],
    *,
    progress: Progress | None = None,
) -> Frames:
    """Read every run of an experiment.

    Raises:
        CheckpointError: a finished run whose files are missing or damaged.
    """
    rows: list[dict[str, Any]] = []
    cases: list[pd.DataFrame] = []
    curves: list[dict[str, Any]] = []
    patients: dict[str, tuple[str, ...]] = {}
    code: set[str] = set()
    with (progress or Silent()).track("reading runs", len(runs)) as advance:
        for number, run in enumerate(runs, start=1):
            files = experiment.files(run.run_id)
            facts = (files.read_done() if states[run.run_id] == "done" else None) or {}
            failures = files.read_failures() if states[run.run_id] != "planned" else []
            for variant in (None, *run.also):
                rows.append(_run_row(run, variant, states[run.run_id], facts or _failure(failures)))
                if facts:
                    cases.append(_cases(run, variant, facts, files.path))
            if facts:
                patients[run.run_id] = (
                    *facts["patients"]["train"],
                    *facts["patients"]["validation"],
                )
                code |= set(facts["made_with"])
                curves += _curve_rows(run, files.path)
            advance(number)
    _check_tolerance(cases)
    return Frames(
        pd.DataFrame(rows, columns=_RUN_COLUMNS),
        pd.concat(cases, ignore_index=True) if cases else pd.DataFrame(columns=_CASE_COLUMNS),
        pd.DataFrame(curves, columns=_CURVE_COLUMNS),
        patients,
        frozenset(code),
    )


def is_as_told(table: pd.DataFrame, dice: float) -> bool:
    """Whether a table still has the mean class Dice that the record of its run tells."""
    return abs(mean_dice(table) - dice) <= _ROUNDING


def _check_tolerance(cases: Sequence[pd.DataFrame]) -> None:
    """Raise CheckpointError if NSD was not measured with one tolerance in the runs of each task."""
    first: dict[str, tuple[float, str]] = {}
    for table in cases:
        if table.empty:
            continue
        task, run_id, tolerance = table.iloc[0][["task", "run_id", "tolerance_mm"]]
        before, other = first.setdefault(task, (tolerance, run_id))
        if tolerance != before:
            raise CheckpointError(
                f"runs {other} and {run_id} were measured with tolerances of {before:g} and {tolerance:g} mm; evaluate one again: medvisionllama evaluate RUN --tolerance-mm {before:g}"
            )


def _names(run: PlannedRun, variant: Variant | None) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "task": run.task,
        "model": run.model,
        "arm": run.arm if variant is None else variant_name(run.arm, variant),
        "fraction": run.fraction,
        "fold": run.fold,
        "seed": run.seed,
    }


def _failure(failures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is told of a run that is not done; it may not have failed either."""
    return {"attempts": len(failures), "error": failures[-1]["error"]} if failures else {}


def _run_row(
    run: PlannedRun, variant: Variant | None, state: State, facts: Mapping[str, Any]
) -> dict[str, Any]:
    names = _names(run, variant)
    cases = facts.get("cases", {})
    row = {key: facts.get(key) for key in _FACTS}
    if variant is not None:
        # The weights are those of the run itself: its training is counted there.
        row |= {"seconds": 0.0, "evaluation_seconds": 0.0} if state == "done" else {}
        # Its network is smaller than the one that was trained, and has not been validated.
        row |= {"frozen": None, "gflops": None, "gate_rms": None, "validation_dice": None}
    return {
        **names,
        "state": state,
        **row,
        "train_cases": cases.get("train"),
        "test_cases": cases.get("test"),
        "test_dice": facts.get("test_dice", {}).get(names["arm"]),
        "error": facts.get("error", ""),
        "variant_of": "" if variant is None else run.arm,
    }


def _cases(run: PlannedRun, variant: Variant | None, facts: Mapping[str, Any], path: Path) -> pd.DataFrame:
    file = Scored(RunDir(path), block_removed=variant == "block_removed").table
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing, though the run is done; delete {path / 'done.json'}, and `experiment run` evaluates it again"
        )
    table = read_table(file)
    told, names = facts.get("test_dice", {}), _names(run, variant)
    if names["arm"] in told and not is_as_told(table, told[names["arm"]]):
        raise CheckpointError(
            f"{file} was written again since the run was done (mean class Dice {mean_dice(table):.4f}, then {told[names['arm']]:.4f}), so it may be cleaned or measured otherwise than the others; delete {path / 'done.json'}, and postprocessing.json if it alone has one, and `experiment run` evaluates it again"
        )
    for place, (name, value) in enumerate({**names, "splits_sha256": facts["splits_sha256"]}.items()):
        table.insert(place, name, value)
    return table


def _curve_rows(run: PlannedRun, path: Path) -> Iterator[dict[str, Any]]:
    for record in RunDir(path).read_history():
        yield {**_names(run, None), **{key: record[key] for key in ("step", "seconds", "loss", "dice")}}
