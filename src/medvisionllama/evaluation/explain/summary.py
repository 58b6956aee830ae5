"""Scores of maps over cases: means over patients with intervals, and differences to the trained network."""

import pandas as pd

from medvisionllama.evaluation.statistics import bootstrap_interval, patient_means

MEASURES = ("hit", "hit_near", "energy_ratio", "auc")
_MAP = ["stage", "kind", "class"]


def summarise_scores(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network, map and class: each measure's mean over patients and its 95 % bootstrap interval (BCa).

    Cases whose mask has no voxel of a class are left out of that class. For the other networks
    `auc_difference` is the mean over patients of the trained one's AUC minus theirs on the same cases.
    """
    rows = []
    for (network, *names), group in table.groupby(["network", *_MAP], sort=False):
        scored = group[group["hit"].notna()]
        row = {"network": network, **dict(zip(_MAP, names, strict=True))}
        row |= {"cases": len(scored), "patients": int(scored["patient_id"].nunique())}
        for share in ("volume_share", "near_share"):
            means = patient_means(list(scored[share]), list(scored["patient_id"]))
            row[share] = float(means.mean()) if len(means) else float("nan")
        for measure in MEASURES:
            row |= _mean(measure, scored[measure], scored["patient_id"])
        if network != "trained":
            theirs = table[table["network"] == "trained"].merge(scored, on=["case_id", *_MAP])
            row |= _mean("auc_difference", theirs["auc_x"] - theirs["auc_y"], theirs["patient_id_y"])
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(name: str, values: "pd.Series[float]", patients: "pd.Series[str]") -> dict[str, float]:
    """Mean over patients and its interval; NaN where there is nothing to average."""
    known = values.notna()
    if not known.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    kept, whose = list(values[known]), list(patients[known])
    low, high = bootstrap_interval(kept, whose)
    return {name: float(patient_means(kept, whose).mean()), f"{name}_low": low, f"{name}_high": high}
