"""The report of an experiment: its tables, compared and written as a page."""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from medvisionllama.errors import ConfigError
from medvisionllama.evaluation.comparison import (
    Family,
    average_ranks,
    compare,
    shared_over_fractions,
    shared_runs,
    summarise_arms,
)
from medvisionllama.evaluation.repetitions import CELL
from medvisionllama.evaluation.statistics import critical_difference
from medvisionllama.experiments.collect import Frames, collect
from medvisionllama.experiments.matrix import Matrix, PlannedRun, expand, variant_name
from medvisionllama.experiments.store import Experiment
from medvisionllama.progress import Progress
from medvisionllama.reports.html import write_report
from medvisionllama.reports.study import Study, percent
from medvisionllama.reports.study_page import write_study
from medvisionllama.run_dir import RunDir


def report_experiment(
    experiment: Experiment, *, reference: str | None, family: Family, pages: bool, progress: Progress
) -> Path:
    """Write results/index.html and the tables beside it; see `verbs.report`."""
    runs = expand(experiment.matrix)
    frames = collect(experiment, runs, experiment.states(runs), progress=progress)
    known = list(dict.fromkeys(frames.runs["arm"]))
    if reference is not None and reference not in known:
        raise ConfigError(f"reference {reference!r} is no arm; arms: {', '.join(known)}")
    chosen = reference or experiment.matrix.reference
    folder = experiment.results
    if chosen != experiment.matrix.reference:
        folder = folder / f"against-{chosen}"
    if family == "task":
        folder = folder / "by-task"
    links = _run_pages(experiment, frames.runs, folder, write=pages, progress=progress)
    return write_study(_study(experiment, runs, frames, chosen, family, links), folder)


def _study(
    experiment: Experiment,
    runs: Sequence[PlannedRun],
    frames: Frames,
    reference: str,
    family: Family,
    links: dict[str, str],
) -> Study:
    matrix = experiment.matrix
    comparisons = compare(
        frames.runs,
        frames.cases,
        reference=reference,
        family=family,
        train_patients=frames.train_patients,
    )
    summary = summarise_arms(frames.runs, frames.cases, train_patients=frames.train_patients)
    # An arm that only some models have would leave hardly a block to rank the others in.
    counts = _blocks(summary)
    everywhere = [str(name) for name, count in counts.items() if count == counts.max()]
    ranks = average_ranks(
        frames.runs, frames.cases, "dice", arms=everywhere, train_patients=frames.train_patients
    )
    blocks = int(ranks["num_blocks"].max()) if len(ranks) else 0
    return Study(
        name=matrix.name,
        about=matrix.about,
        matrix=_matrix_yaml(matrix),
        reference=reference,
        family=family,
        runs=frames.runs,
        cases=frames.cases,
        curves=frames.curves,
        comparisons=comparisons,
        summary=summary,
        few_shot=summarise_arms(
            shared_over_fractions(frames.runs),
            frames.cases,
            metrics=["dice"],
            train_patients=frames.train_patients,
        ),
        arms=arm_words(matrix),
        ranks=ranks if blocks > 1 else None,
        critical_difference=critical_difference(len(ranks), blocks) if blocks > 1 else None,
        notes=[*_notes(experiment, runs, frames.code), *_unranked(frames.runs, everywhere)],
        compute=_compute(frames.runs),
        links=links,
    )


def _matrix_yaml(matrix: Matrix) -> str:
    """A matrix as YAML that `read_matrix` would take, without what it leaves as it is by default."""
    settings = matrix.model_dump(mode="json", exclude_defaults=True)
    text: str = yaml.safe_dump(
        settings, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return text


def arm_words(matrix: Matrix) -> dict[str, str]:
    """What each arm is in one line, further evaluations included."""
    words = {}
    for arm in matrix.expanded_arms():
        words[arm.name] = arm.spec.about
        for variant in arm.spec.also:
            words[variant_name(arm.name, variant)] = f"{arm.name}, its frozen block left out after training"
    return words


def _blocks(summary: pd.DataFrame) -> pd.Series:
    """In how many cells of the matrix each arm has a mean Dice."""
    dice = summary[(summary["metric"] == "dice") & summary["mean"].notna()]
    return dice["arm"].value_counts(sort=False)


def _unranked(runs: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    """What the mean ranks leave out of the arms that they rank, in a line; no line if it is nothing."""
    done = runs[(runs["state"] == "done") & runs["arm"].isin(arms)]
    shared = shared_runs(runs, arms)
    counts = {arm: int((done["arm"] == arm).sum() - (shared["arm"] == arm).sum()) for arm in arms}
    words = ", ".join(f"{count} of {arm}" for arm, count in counts.items() if count)
    if not words:
        return []
    kept = set(shared[CELL].itertuples(index=False, name=None))
    lost = [
        f"{task}, {model}, {percent(fraction)}"
        for task, model, fraction in done[CELL].drop_duplicates().itertuples(index=False, name=None)
        if (task, model, fraction) not in kept
    ]
    blocks = f", and so the blocks without a run that all have: {'; '.join(lost)}" if lost else ""
    return [
        "Mean ranks are over the runs that all ranked arms have done. Runs that another of these arms lacks are "
        f"left out ({words}){blocks}."
    ]


def _notes(experiment: Experiment, runs: Sequence[PlannedRun], code: frozenset[str]) -> list[str]:
    notes = []
    if experiment.matrix.split_per_seed:
        notes.append(
            "Each seed has a division of the patients of its own, the same one in every arm: a patient may train in "
            "one seed and be tested in another, never both in one run."
        )
    numbers = {(run.task, run.model): run.settings.get("data.num_cases") for run in runs}
    words = [f"{task}, {model}: {number}" for (task, model), number in numbers.items() if number is not None]
    if words:
        notes.append(
            f"100 % of the training cases stands for as many as data.num_cases names ({'; '.join(words)})."
        )
    strangers = experiment.strangers(runs)
    if strangers:
        notes.append(
            f"The folder holds {len(strangers)} runs that the matrix does not name; they are in no table."
        )
    if len(code) > 1:
        # A run's id does not say which code made it.
        notes.append(f"The runs were made by {len(code)} versions of the code: {', '.join(sorted(code))}.")
    return notes


def _compute(runs: pd.DataFrame) -> dict[str, str]:
    done = runs[runs["state"] == "done"]
    training, evaluation = (
        pd.to_numeric(done[column]).sum() / 3600 for column in ("seconds", "evaluation_seconds")
    )
    machines = [str(machine) for machine in dict.fromkeys(done["machine"]) if machine]
    return {
        "trainings done": str(int((done["variant_of"] == "").sum())),
        "hours of training, all runs added up": f"{training:.2f}",
        "hours of evaluation on the test cases": f"{evaluation:.2f}",
        "each run on": "; ".join(machines) or "nothing yet",
    }


def _run_pages(
    experiment: Experiment, runs: pd.DataFrame, folder: Path, *, write: bool, progress: Progress
) -> dict[str, str]:
    """Write the page of each finished run that has none of its last evaluation, and say where they are."""
    done = list(dict.fromkeys(runs.loc[runs["state"] == "done", "run_id"]))
    folders = {run_id: RunDir(experiment.files(run_id).path) for run_id in done}
    missing = [run_dir for run_dir in folders.values() if write and not _has_page(run_dir)]
    with progress.track("pages of runs", max(1, len(missing))) as advance:
        for number, run_dir in enumerate(missing, start=1):
            write_report(run_dir.path)
            advance(number)
    pages = {run_id: run_dir.report for run_id, run_dir in folders.items()}
    return {run_id: os.path.relpath(page, folder) for run_id, page in pages.items() if page.is_file()}


def _has_page(run_dir: RunDir) -> bool:
    """Whether a run has a page that is no older than its evaluation."""
    page = run_dir.report
    return page.is_file() and page.stat().st_mtime >= run_dir.evaluation.stat().st_mtime
