"""What the numbers say, in sentences that claim no more than they do."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from medvisionllama.evaluation.statistics import smallest_p, t_reach
from medvisionllama.reports.study import METRICS, Metric, Study, percent, source

ALPHA = 0.05
MARGIN = 0.01
"""A difference of Dice that would matter; `patients_needed` is about the same one."""
TRUSTED_PATIENTS = 25
"""With fewer, the bootstrap interval is too narrow to rule anything out (decision 0016)."""
KEY = ("task", "model", "fraction", "metric", "arm")


@dataclass(frozen=True)
class Statement:
    """One comparison in words."""

    where: str
    text: str
    verdict: str
    """better, worse or open."""
    source: str
    is_made: bool = True
    """Whether any pair of runs is done; else nothing is open that was looked at."""


def number(value: float, decimals: int) -> str:
    """A rounded number without a minus in front of zero; a dash where there is none.

    >>> number(-0.0001, 3), number(float("nan"), 3)
    ('0.000', '–')
    """
    if pd.isna(value):
        return "–"
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def signed(value: float, decimals: int) -> str:
    """The same with a plus where it is one."""
    text = number(value, decimals)
    return "+" + text if round(value, decimals) > 0 else text


def p_words(p: float) -> str:
    """A p value to two digits."""
    if pd.isna(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def verdict(row: Mapping[Any, Any], metric: Metric) -> str:
    """better or worse where patients differ after Holm's correction and runs differ too, else open.

    Either alone is not enough: a training that went well lifts all its patients at once (decision 0016).
    """
    if not (_is_small(row["p_holm"]) and _is_small(row["seed_p"]) and metric.sign(row["difference"])):
        return "open"
    if _ranks_disagree(row):
        return "open"
    return "better" if metric.sign(row["difference"]) > 0 else "worse"


def _ranks_disagree(row: Mapping[Any, Any]) -> bool:
    """Whether most patients go one way and their mean the other, pulled by a few."""
    return bool(row["effect"] * row["difference"] < 0)


def _is_small(p: float) -> bool:
    return not pd.isna(p) and p < ALPHA


def statement(row: Mapping[Any, Any]) -> Statement:
    """A row of the comparisons in words."""
    metric = METRICS[row["metric"]]
    found = verdict(row, metric)
    where = f"{row['task']}, {row['model']}, {percent(row['fraction'])} of the training cases"
    origin = source("comparisons.csv", row, *KEY)
    patients, runs = int(row["num_patients"]), int(row["num_runs"])
    if not patients:
        return Statement(where, "not compared: no pair of runs is done", found, origin, is_made=False)
    text = (
        f"difference {signed(row['difference'], metric.decimals)} "
        f"({number(row['low'], metric.decimals)} to {number(row['high'], metric.decimals)}), "
        f"p_holm {p_words(row['p_holm'])}, p over runs {p_words(row['seed_p'])}, {patients} patients, "
        f"{runs} {'run' if runs == 1 else 'runs'}: "
    )
    if found == "open":
        text += f"no difference shown{''.join('; ' + reason for reason in _limits(row))}"
    else:
        text += f"{found} than {row['reference']}{''.join('; ' + reason for reason in _doubts(row, metric))}"
    if row.get("left_out"):
        text += f"; {int(row['left_out'])} more planned pairs of runs are not done"
    return Statement(where, text, found, origin)


def _limits(row: Mapping[Any, Any]) -> Iterable[str]:
    """What an absent difference is worth."""
    if _is_small(row["p_holm"]):
        if row["num_runs"] < 2:
            vary = "one training each says nothing of how much trainings vary"
        elif _is_small(row["seed_p"]) or pd.isna(row["seed_p"]):
            vary = "most of them go one way and the mean the other, pulled by a few"
        else:
            vary = (
                f"{int(row['num_runs'])} trainings are too few, or vary too much, to tell "
                f"(SD over runs {number(row['seed_sd'], 3)})"
            )
        yield f"the patients of these trainings differ, but {vary}"
    # The test drops patients without a difference.
    informative = int(row["wins"] + row["losses"])
    if not informative:
        yield "no patient differs"
    elif smallest_p(informative) >= ALPHA:
        yield (
            f"{informative} patients that differ are too few for any p below {ALPHA} "
            f"(the smallest this test can give is {smallest_p(informative):g})"
        )
    elif smallest_p(informative) * (family := row.get("family_size", 1)) >= ALPHA:
        yield (
            f"p of {informative} patients is never below {smallest_p(informative):.2g}, which Holm's correction "
            f"over {family} comparisons may raise to {min(1, smallest_p(informative) * family):.2g}"
        )
    needed = row["patients_needed"]
    if row["metric"] == "dice" and not pd.isna(needed) and math.isfinite(needed):
        if needed > row["num_patients"]:
            yield f"{int(needed)} patients would be needed to detect {MARGIN}"
        elif t_reach(row["seed_sd"], int(row["num_runs"])) < MARGIN:
            yield f"enough patients to detect {MARGIN}, were this the only comparison ({int(needed)} needed)"
        else:
            yield f"enough patients to detect {MARGIN} ({int(needed)} needed), but {_too_few_runs(row)} cannot show it"
    enough = row["num_patients"] >= TRUSTED_PATIENTS
    if row["metric"] == "dice" and enough and row["low"] > -MARGIN and row["high"] < MARGIN:
        rules_out = f"the interval leaves no room for a mean difference of {MARGIN} either way"
        runs_agree = abs(row["difference"]) + t_reach(row["seed_sd"], int(row["num_runs"])) < MARGIN
        yield rules_out + ("" if runs_agree else ", for these trainings; others may differ by more")
    if row["low"] > 0 or row["high"] < 0:
        yield "the interval leaves out 0, but is not corrected for the number of comparisons"


def _too_few_runs(row: Mapping[Any, Any]) -> str:
    if row["num_runs"] < 2:
        return "one training each"
    return f"{int(row['num_runs'])} trainings that vary by {number(row['seed_sd'], 3)} (SD)"


def _doubts(row: Mapping[Any, Any], metric: Metric) -> Iterable[str]:
    """What a shown difference is not."""
    if row["seed_sd"] > abs(row["difference"]):
        yield (
            f"from run to run it varies by more than itself (SD {number(row['seed_sd'], metric.decimals)}), "
            "so another seed may say otherwise"
        )
    if row["metric"] == "dice" and abs(row["difference"]) < MARGIN:
        yield f"smaller than {MARGIN}"


def statements(study: Study) -> dict[str, list[Statement]]:
    """Every comparison by Dice in words, by arm in the order of the page."""
    rows = study.comparisons[study.comparisons["metric"] == "dice"].to_dict(orient="records")
    found = {arm: [statement(row) for row in rows if row["arm"] == arm] for arm in study.arm_names}
    return {arm: lines for arm, lines in found.items() if lines}


def count_words(lines: list[Statement], arm: str, reference: str) -> str:
    """How many comparisons show what, of those that could be made."""
    made = [line for line in lines if line.is_made]
    if not made:
        return f"There is no answer yet: no comparison of {arm} with {reference} could be made."
    missing = len(lines) - len(made)
    more = f" {missing} more could not be made: no pair of runs is done." if missing else ""
    count = {word: sum(line.verdict == word for line in made) for word in ("better", "worse", "open")}
    if len(made) == 1:
        shown = {
            "better": f"{arm} is shown to be better than {reference}",
            "worse": f"{arm} is shown to be worse than {reference}",
            "open": f"no difference between {arm} and {reference} is shown",
        }
        return f"In the one comparison by Dice, {shown[made[0].verdict]}.{more}"
    return (
        f"Of {len(made)} comparisons by Dice, {count['better']} show {arm} to be better than {reference}, "
        f"{count['worse']} show it to be worse, and {count['open']} show no difference.{more}"
    )


def problems(study: Study) -> list[str]:
    """What is missing, and what keeps arms from being compared fairly."""
    lines = list(study.notes)
    states = study.trainings["state"].value_counts()
    unfinished = {name: count for name, count in states.items() if name not in ("done", "failed")}
    if unfinished:
        words = ", ".join(f"{count} {name}" for name, count in unfinished.items())
        lines.append(f"Not all runs are done ({words}): numbers and signs may still change.")
    done = study.state("done")
    if done.empty:
        lines.append("No run is done, so there is nothing to compare.")
    elif study.reference not in set(done["arm"]):
        lines.append(
            f"No run of the reference arm {study.reference} is done, so nothing is compared with it."
        )
    for (task, fold, seed), group in done.groupby(["task", "fold", "seed"], sort=False):
        if group["splits_sha256"].nunique() > 1:
            lines.append(f"{task}, fold {fold}, seed {seed}: the runs were not all made with the same split.")
    for (task, model, fraction), group in done.groupby(["task", "model", "fraction"], sort=False):
        counts = group["arm"].value_counts()
        if counts.nunique() > 1:
            words = ", ".join(f"{arm} {count}" for arm, count in counts.items())
            lines.append(
                f"{task}, {model}, {percent(float(str(fraction)))}: arms have different numbers of runs ({words})."
            )
    return lines + _unlike(done)


def _unlike(done: pd.DataFrame) -> list[str]:
    """In what runs that are compared differ beside their arms, a line for each."""
    lines = []
    groups = [group for _, group in done.groupby(["task", "model", "fraction", "fold", "seed"])]
    files = sum(group["data_sha256"].nunique() > 1 for group in groups)
    if files:
        lines.append(
            f"In {files} of {len(groups)} repetitions the arms were not trained on the same files: scans or labels changed "
            "meanwhile, or an arm trains on scans that the others lack."
        )
    mixed = [group["steps"].nunique() > 1 for group in groups if group["machine"].nunique() > 1]
    if clocks := sum(mixed):
        lines.append(
            f"In {clocks} of {len(groups)} repetitions the arms ran on different machines and made different numbers of "
            "steps: equal minutes were not equal work."
        )
    if alike := len(mixed) - clocks:
        lines.append(
            f"In {alike} of {len(groups)} repetitions the arms made equal steps on different machines, or with other threads "
            "or precision: a part of a small difference may come of that."
        )
    return lines
