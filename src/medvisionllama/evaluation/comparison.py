"""Arms against a reference arm: paired by run, compared by patient, adjusted over a family of tests.

Runs of two arms are pairs where task, model, fraction, fold and seed agree. A patient's value is the mean over the
repetitions in which it was tested, so seeds and folds make the value of a patient steadier and never add patients.
Seeds may bring splits of their own: then patients are tested in some repetitions only, the same ones in both arms.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from medvisionllama.errors import DataError
from medvisionllama.evaluation.repetitions import (
    CELL,
    DECIMALS,
    LOWER_IS_BETTER,
    METRICS,
    Key,
    Repetition,
    check_pair,
    finished,
)
from medvisionllama.evaluation.statistics import (
    bootstrap_interval,
    cohens_dz,
    friedman_p,
    holm,
    patients_needed,
    rank_biserial,
    run_p,
    smallest_p,
    wilcoxon_p,
)

Family = Literal["report", "task"]
FAMILIES: dict[str, list[str]] = {"report": ["metric"], "task": ["metric", "task"]}
"""Tests that Holm adjusts together: those that agree in these columns."""
DETECTABLE = {"dice": 0.01, "nsd": 0.01}
"""Mean difference for which `patients_needed` is given; none for millimetres."""
COMPARISONS = [
    *(*CELL, "metric", "arm", "reference", "num_patients", "num_runs", "mean", "reference_mean"),
    *("difference", "low", "high", "seed_sd", "p", "p_holm", "effect", "dz", "patients_needed"),
    *("wins", "losses", "ties", "left_out", "smallest_p", "family_size", "seed_p"),
]
SUMMARY = [
    *("task", "model", "arm", "fraction", "metric", "num_patients", "num_runs"),
    *("mean", "low", "high", "seed_sd", "median", "q1", "q3", "num_empty"),
]


def compare(
    runs: pd.DataFrame,
    cases: pd.DataFrame,
    *,
    reference: str,
    metrics: Sequence[str] = METRICS,
    family: Family = "report",
    train_patients: Mapping[str, Collection[str]] | None = None,
) -> pd.DataFrame:
    """One row per task, model, fraction, metric and arm, against the reference arm of the same task and model.

    `difference`, its interval, `effect` and `dz` are the arm minus the reference, whichever is better; `wins` are
    patients for whom the arm is better. `num_runs` counts pairs of runs, `left_out` the pairs that are planned but
    of which one or both are not done. An arm without a pair keeps its row, without numbers.

    `p` and `p_holm` are over patients and speak of these trainings; `seed_p` is over runs (t test, not adjusted).
    An arm differs where both do: trainings vary, and that alone makes p small.

    Args:
        family: tests that Holm adjusts together, always of one metric: `report` all of them, `task` those of one
            task. Choose before you look. With `report`, the default, nobody can say that tables were cut until
            something was significant.
        train_patients: see `finished`.

    Raises:
        DataError: no such reference, paired runs with other splits or patients, or what `finished` refuses.
    """
    done = finished(runs, cases, metrics=metrics, train_patients=train_patients)
    arms = sorted(set(runs["arm"]))
    if reference not in arms:
        raise DataError(f"no run has the reference arm {reference!r}; choose one of {', '.join(arms)}")
    rows: list[dict[str, Any]] = []
    for cell, planned in _cells(runs):
        for arm in sorted(set(planned) - {reference}):
            either = planned[arm] | planned.get(reference, set())
            pairs = []
            for repetition in sorted(either):
                ours, theirs = done.get((*cell, arm, *repetition)), done.get((*cell, reference, *repetition))
                if ours and theirs:
                    check_pair(ours, theirs)
                    pairs.append((ours, theirs))
            names = dict(zip(CELL, cell, strict=True)) | {"arm": arm, "reference": reference}
            names |= {"num_runs": len(pairs), "left_out": len(either) - len(pairs)}
            rows += [{**names, "metric": metric, **_compare(pairs, metric)} for metric in metrics]
    table = pd.DataFrame(rows, columns=COMPARISONS)
    for _, group in table.groupby(FAMILIES[family]):
        table.loc[group.index, "p_holm"] = holm(group["p"])
        table.loc[group.index, "family_size"] = int(group["p"].notna().sum())
    order = pd.Series({metric: place for place, metric in enumerate(metrics)})
    table = table.sort_values(
        [*CELL, "metric", "arm"],
        key=lambda column: column.map(order) if column.name == "metric" else column,
        ignore_index=True,
    )
    return table.astype({"family_size": int})


def summarise_arms(
    runs: pd.DataFrame,
    cases: pd.DataFrame,
    *,
    metrics: Sequence[str] = METRICS,
    train_patients: Mapping[str, Collection[str]] | None = None,
) -> pd.DataFrame:
    """One row per task, model, arm, fraction and metric, over all runs that are done.

    Mean, its 95 % interval, median and quartiles are over patients, `seed_sd` is over the means of runs, and
    `num_empty` counts the cases and classes of which a mask was empty. Arms of which other runs are done are not
    comparable here; `compare` pairs them.

    Raises:
        DataError: what `finished` refuses.
    """
    done = finished(runs, cases, metrics=metrics, train_patients=train_patients)
    rows: list[dict[str, Any]] = []
    for cell, planned in _cells(runs):
        for arm in sorted(planned):
            keys: list[Key] = [(*cell, arm, *repetition) for repetition in sorted(planned[arm])]
            repetitions = [done[key] for key in keys if key in done]
            names = dict(zip(CELL, cell, strict=True)) | {"arm": arm, "num_runs": len(repetitions)}
            rows += [{**names, "metric": metric, **_summarise(repetitions, metric)} for metric in metrics]
    return pd.DataFrame(rows, columns=SUMMARY)


def shared_runs(runs: pd.DataFrame, arms: Collection[str]) -> pd.DataFrame:
    """The runs of some arms in the repetitions that all of these arms have done.

    A mean over a hard fold and one over an easy fold say nothing about the arms.
    """
    done = runs[(runs["state"] == "done") & runs["arm"].isin(arms)]
    present = done.groupby([*CELL, "fold", "seed"])["arm"].transform("nunique")
    return done[present == len(set(arms))]


def shared_over_fractions(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of those folds and seeds in which each arm of a task and model has done all fractions that it has.

    A curve that joins other folds or seeds shows other test patients, and not what more cases do.
    """
    done = runs[runs["state"] == "done"]
    points = done.assign(point=done["arm"].astype(str) + " " + done["fraction"].astype(str))
    wanted = points.groupby(["task", "model"])["point"].transform("nunique")
    present = points.groupby(["task", "model", "fold", "seed"])["point"].transform("nunique")
    return done[present == wanted]


def average_ranks(
    runs: pd.DataFrame,
    cases: pd.DataFrame,
    metric: str,
    *,
    arms: Collection[str] | None = None,
    train_patients: Mapping[str, Collection[str]] | None = None,
) -> pd.DataFrame:
    """Average rank of each arm (1 is best), for a diagram of critical differences (Demsar 2006).

    Blocks are task, model and fraction; a block counts by the runs that all arms have done (`shared_runs`), and not
    at all if there are none. Blocks of one task share patients, so Friedman's p and the critical difference are too
    small unless each task makes one block.

    Args:
        arms: rank these only, so that an arm that few blocks have does not cost the others their blocks.
        train_patients: see `finished`.

    Returns:
        Columns arm, rank, num_blocks, friedman_p and num_runs (of each arm, in all blocks), best arm first; empty
        without a block.

    Raises:
        DataError: runs to be ranked that differ in splits or patients, or what `finished` refuses.
    """
    ranked = sorted(set(runs["arm"] if arms is None else arms))
    shared = shared_runs(runs, ranked)
    columns = ["arm", "rank", "num_blocks", "friedman_p", "num_runs"]
    if shared.empty:
        return pd.DataFrame(columns=columns)
    done = finished(shared, cases, metrics=[metric], train_patients=train_patients)
    means = pd.DataFrame([_block_means(cell, planned, done, metric) for cell, planned in _cells(shared)])
    ranks = means.round(DECIMALS).rank(axis=1, ascending=metric in LOWER_IS_BETTER)
    table = ranks.mean().rename_axis("arm").rename("rank").reset_index()
    table = table.assign(
        num_blocks=len(ranks), friedman_p=friedman_p(ranks.to_numpy()), num_runs=len(shared) // len(ranked)
    )
    return table.sort_values(["rank", "arm"], ignore_index=True)[columns]


Cell = tuple[str, str, float]
Planned = dict[str, set[tuple[int, int]]]


def _cells(runs: pd.DataFrame) -> list[tuple[Cell, Planned]]:
    """Folds and seeds of every arm, by task, model and fraction."""
    cells: dict[Cell, Planned] = {}
    columns = runs[[*CELL, "arm", "fold", "seed"]]
    for task, model, fraction, arm, fold, seed in columns.itertuples(index=False, name=None):
        planned = cells.setdefault((str(task), str(model), float(fraction)), {})
        planned.setdefault(str(arm), set()).add((int(fold), int(seed)))
    return sorted(cells.items())


def _block_means(
    cell: Cell, planned: Planned, done: Mapping[Key, Repetition], metric: str
) -> dict[str, float]:
    """Mean of each arm over the patients of a block, all arms of the same runs."""
    runs = {arm: [done[(*cell, arm, *key)] for key in sorted(keys)] for arm, keys in planned.items()}
    first, *others = runs.values()
    for other in others:
        for pair in zip(first, other, strict=True):
            check_pair(*pair)
    return {arm: float(_over_patients(members, metric).mean()) for arm, members in sorted(runs.items())}


def _over_patients(repetitions: Sequence[Repetition], metric: str) -> pd.Series:
    """Mean of each patient over the repetitions in which it was tested."""
    stacked = pd.concat([repetition.patients[metric] for repetition in repetitions])
    return stacked.groupby(level="patient_id").mean().round(DECIMALS)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _compare(pairs: Sequence[tuple[Repetition, Repetition]], metric: str) -> dict[str, Any]:
    if not pairs:
        return {"num_patients": 0, "wins": 0, "losses": 0, "ties": 0}
    ours, theirs = (_over_patients(side, metric) for side in zip(*pairs, strict=True))
    differences = (ours - theirs).round(DECIMALS).to_numpy()
    low, high = bootstrap_interval(differences.tolist(), ours.index.tolist())
    better = -differences if metric in LOWER_IS_BETTER else differences
    # Rounded as patients are: equal runs have no spread, whatever the rounding of their means.
    by_run = [round(float((a.patients[metric] - b.patients[metric]).mean()), DECIMALS) for a, b in pairs]
    needed = float("nan")
    if metric in DETECTABLE:
        needed = patients_needed(_spread(differences.tolist()), difference=DETECTABLE[metric])
    return {
        "num_patients": len(differences),
        "mean": ours.mean(),
        "reference_mean": theirs.mean(),
        "difference": differences.mean(),
        "low": low,
        "high": high,
        "seed_sd": _spread(by_run),
        "p": wilcoxon_p(differences),
        "effect": rank_biserial(differences),
        "dz": cohens_dz(differences),
        "patients_needed": needed,
        "wins": int((better > 0).sum()),
        "losses": int((better < 0).sum()),
        "ties": int((better == 0).sum()),
        "smallest_p": smallest_p(len(differences)),
        "seed_p": run_p(by_run),
    }


def _summarise(repetitions: Sequence[Repetition], metric: str) -> dict[str, Any]:
    if not repetitions:
        return {"num_patients": 0}
    patients = _over_patients(repetitions, metric)
    low, high = bootstrap_interval(patients.tolist(), patients.index.tolist())
    return {
        "num_patients": len(patients),
        "mean": patients.mean(),
        "low": low,
        "high": high,
        "seed_sd": _spread([float(repetition.patients[metric].mean()) for repetition in repetitions]),
        "median": patients.median(),
        "q1": patients.quantile(0.25),
        "q3": patients.quantile(0.75),
        "num_empty": sum(repetition.num_empty for repetition in repetitions),
    }
