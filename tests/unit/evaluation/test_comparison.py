import math

import numpy as np
import pandas as pd
import pytest

from medvisionllama.errors import DataError
from medvisionllama.evaluation.comparison import (
    COMPARISONS,
    SUMMARY,
    average_ranks,
    compare,
    summarise_arms,
)
from medvisionllama.evaluation.repetitions import KEYS, check_no_leak, finished
from medvisionllama.evaluation.statistics import bootstrap_interval, critical_difference

SPLITS = "aaaaaaaaaaaa0000"
OTHER_SPLITS = "bbbbbbbbbbbb1111"
# The example of test_statistics: differences of six patients, in hundredths 4, -2, 6, 1, -5, 3.
NONE = [0.70, 0.72, 0.60, 0.80, 0.75, 0.50]
BLOCK = [0.74, 0.70, 0.66, 0.81, 0.70, 0.53]


class Study:
    """Tables of runs and cases, filled run by run."""

    def __init__(self):
        self.runs, self.cases = [], []

    def add(self, arm, dice, *, seed=0, fold=0, task="heart", model="small", fraction=1.0, state="done",
            sha256=SPLITS, variant_of="", hd95=None):  # fmt: skip
        """A run; `dice` of patients in order, or by (patient, case, class)."""
        if not isinstance(dice, dict):
            dice = {(f"p{n}", f"c{n}", "left"): value for n, value in enumerate(dice)}
        run_id = f"{task}-{model}-{arm}-{fraction}-{fold}-{seed}"
        names = {"task": task, "model": model, "arm": arm, "fraction": fraction, "fold": fold, "seed": seed}
        self.runs.append(
            {"run_id": run_id, **names, "state": state, "splits_sha256": sha256, "variant_of": variant_of}
        )
        for place, ((patient, case, name), value) in enumerate(dice.items()):
            measures = {"dice": value, "nsd": 1 - value, "hd95_mm": hd95[place] if hd95 else 10 - 10 * value}
            self.cases.append(
                {"run_id": run_id, **names, "splits_sha256": sha256, "case_id": case, "patient_id": patient,
                 "class": name, **measures}
            )  # fmt: skip
        return self

    @property
    def tables(self):
        columns = [
            *KEYS,
            "run_id",
            "splits_sha256",
            "case_id",
            "patient_id",
            "class",
            "dice",
            "nsd",
            "hd95_mm",
        ]
        return pd.DataFrame(self.runs), pd.DataFrame(self.cases, columns=columns)

    def compare(self, reference="none", **options):
        return compare(*self.tables, reference=reference, **options)

    def row(self, metric="dice", **options):
        table = self.compare(**options)
        return table[table["metric"] == metric].iloc[0]


def test_one_pair_of_runs_gives_the_numbers_counted_by_hand():
    row = Study().add("none", NONE).add("block", BLOCK).row()
    assert (row["task"], row["model"], row["fraction"], row["arm"]) == ("heart", "small", 1.0, "block")
    assert row["reference"] == "none"
    assert (row["num_patients"], row["num_runs"], row["left_out"], row["family_size"]) == (6, 1, 0, 1)
    assert (row["mean"], row["reference_mean"]) == (pytest.approx(4.14 / 6), pytest.approx(4.07 / 6))
    assert row["difference"] == pytest.approx(0.07 / 6)
    # Ranks of 1, -2, 3, 4, -5, 6: up 14, down 7; 18 of the 64 signs go as low as 7.
    assert row["p"] == row["p_holm"] == pytest.approx(36 / 64)
    assert row["effect"] == pytest.approx(7 / 21)
    assert row["dz"] == pytest.approx(0.07 / 6 / math.sqrt((91 - 49 / 6) / 5 * 1e-4))
    assert (row["wins"], row["losses"], row["ties"]) == (4, 2, 0)
    assert row["smallest_p"] == 2 / 64
    differences = [round(a - b, 12) for a, b in zip(BLOCK, NONE, strict=True)]
    assert (row["low"], row["high"]) == bootstrap_interval(differences, list("abcdef"))
    assert row["low"] < row["difference"] < row["high"]
    # SD 0.0407 against 0.01: 132 by the t test (n = (1.96 + 0.84)^2 * 16.57 + 2), over 3 / pi.
    assert row["patients_needed"] == pytest.approx((2.8016**2 * 16.57 + 2) * math.pi / 3, abs=1.5)
    assert math.isnan(row["seed_sd"])
    assert math.isnan(row["seed_p"])


def test_tables_have_the_columns_that_reports_read():
    study = Study().add("none", NONE).add("block", BLOCK)
    assert list(study.compare().columns) == COMPARISONS
    assert list(summarise_arms(*study.tables).columns) == SUMMARY
    assert list(study.compare()["metric"]) == ["dice", "nsd", "hd95_mm"]


def test_a_smaller_distance_wins_and_its_difference_is_negative():
    study = Study().add("none", NONE, hd95=[5, 5, 5, 5, 5, 5]).add("block", BLOCK, hd95=[4, 4, 4, 4, 6, 5])
    row = study.row("hd95_mm")
    assert row["difference"] == pytest.approx(-3 / 6)
    # All five have size 1, so rank 3 each; four of them down.
    assert row["effect"] == pytest.approx((3 - 12) / 15)
    assert (row["wins"], row["losses"], row["ties"]) == (4, 1, 1)
    assert math.isnan(row["patients_needed"])


def test_a_patient_with_two_scans_counts_once():
    none = {("p", "p1", "left"): 0.2, ("p", "p2", "left"): 0.6, ("q", "q1", "left"): 0.5}
    block = {("p", "p1", "left"): 0.4, ("p", "p2", "left"): 0.6, ("q", "q1", "left"): 0.8}
    row = Study().add("none", none).add("block", block).row()
    assert row["num_patients"] == 2
    assert (row["reference_mean"], row["mean"]) == (pytest.approx(0.45), pytest.approx(0.65))
    assert row["difference"] == pytest.approx((0.1 + 0.3) / 2)


def test_a_case_is_the_mean_of_its_classes_without_the_merged_foreground():
    none = {("p", "p1", "left"): 0.2, ("p", "p1", "right"): 0.4, ("p", "p1", "foreground"): 0.9}
    block = {("p", "p1", "left"): 0.3, ("p", "p1", "right"): 0.5, ("p", "p1", "foreground"): 0.1}
    row = Study().add("none", none).add("block", block).row()
    assert (row["reference_mean"], row["mean"]) == (pytest.approx(0.3), pytest.approx(0.4))


def test_the_merged_foreground_counts_where_it_is_all_there_is():
    study = (
        Study().add("none", {("p", "p1", "foreground"): 0.2}).add("block", {("p", "p1", "foreground"): 0.5})
    )
    study.add("none", {("p", "p1", "left"): 0.1, ("p", "p1", "foreground"): 0.9}, task="liver")
    study.add("block", {("p", "p1", "left"): 0.2, ("p", "p1", "foreground"): 0.9}, task="liver")
    assert study.compare(metrics=["dice"])["difference"].tolist() == pytest.approx([0.3, 0.1])


def test_seeds_make_a_patient_steadier_and_do_not_make_patients():
    study = Study()
    for seed, (low, high) in enumerate([(0.1, 0.3), (0.2, 0.6)]):
        study.add("none", [0.5, 0.5], seed=seed).add("block", [0.5 + low, 0.5 + high], seed=seed)
    row = study.row()
    assert (row["num_patients"], row["num_runs"]) == (2, 2)
    assert row["difference"] == pytest.approx((0.15 + 0.45) / 2)
    # Means of the two runs: 0.2 and 0.4.
    assert row["seed_sd"] == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert row["p"] == 0.5
    # t = 0.3 / (0.1 * sqrt(2) / sqrt(2)) = 3 with one degree of freedom.
    assert row["seed_p"] == pytest.approx(1 - 2 * math.atan(3) / math.pi)


def test_a_lucky_run_is_significant_over_patients_and_not_over_runs():
    study = Study()
    for seed, luck in enumerate([0.06, -0.01, 0.01]):
        study.add("none", NONE, seed=seed).add("block", [value + luck for value in NONE], seed=seed)
    row = study.row()
    assert row["p"] == 1 / 32
    assert row["seed_p"] > 0.4


def test_a_run_missing_in_one_arm_is_left_out_of_both_and_counted():
    study = Study().add("none", NONE).add("block", BLOCK)
    study.add("none", [0.0] * 6, seed=1).add("block", [], seed=1, state="failed")
    study.add("none", [], fold=1, state="running").add("block", [0.0] * 6, fold=1)
    study.add("block", [0.0] * 6, fold=2).add("none", [0.0] * 6, fold=3)
    row = study.row()
    assert (row["num_runs"], row["left_out"]) == (1, 4)
    assert (row["reference_mean"], row["mean"]) == (pytest.approx(4.07 / 6), pytest.approx(4.14 / 6))


def test_an_arm_without_a_pair_keeps_its_row_and_costs_the_others_nothing():
    study = Study().add("none", NONE).add("block", BLOCK).add("mlp", [], state="planned")
    table = study.compare(metrics=["dice"]).set_index("arm")
    assert (table.loc["mlp", "num_patients"], table.loc["mlp", "num_runs"]) == (0, 0)
    assert table.loc["mlp", "left_out"] == 1
    assert math.isnan(table.loc["mlp", "p"])
    assert math.isnan(table.loc["mlp", "p_holm"])
    assert table.loc["block", "p_holm"] == table.loc["block", "p"]
    assert table.loc["block", "family_size"] == 1


def test_seeds_may_bring_splits_of_their_own():
    study = Study()
    for seed, sha256, patients in [(0, SPLITS, "pq"), (1, OTHER_SPLITS, "qr")]:
        for arm, gain in [("none", 0.0), ("block", 0.1 + 0.2 * seed)]:
            study.add(arm, {(p, p + "1", "left"): 0.5 + gain for p in patients}, seed=seed, sha256=sha256)
    row = study.row()
    # p was tested once (0.1), q in both (0.1 and 0.3), r once (0.3).
    assert (row["num_patients"], row["num_runs"]) == (3, 2)
    assert row["difference"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert row["seed_sd"] == pytest.approx(np.std([0.1, 0.3], ddof=1))


def test_runs_on_different_splits_are_refused_by_name_and_hash():
    study = Study().add("none", NONE).add("block", BLOCK, sha256=OTHER_SPLITS)
    with pytest.raises(DataError, match="different splits") as caught:
        study.compare()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("heart-small-block-1.0-0-0", "heart-small-none-1.0-0-0", "aaaaaaaaaaaa)", "bbbbbbbbbbbb)"):
        assert part in message


def test_different_splits_of_runs_that_are_not_done_do_not_matter():
    study = Study().add("none", NONE).add("block", BLOCK)
    study.add("none", NONE, seed=1).add("block", [], seed=1, sha256="", state="planned")
    assert study.row()["num_runs"] == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [(("z", "c", "left"), "patient"), (("p", "d", "left"), "case"), (("p", "c", "right"), "class")],
)
def test_runs_tested_on_other_patients_cases_or_classes_are_refused(name, reason):
    study = Study().add("none", {("p", "c", "left"): 0.1, ("q", "q", "left"): 0.1})
    study.add("block", {name: 0.1, ("q", "q", "left"): 0.1})
    with pytest.raises(DataError, match=rf"not tested on the same patients.*{reason}") as caught:
        study.compare()
    assert "heart-small-block-1.0-0-0 (splits aaaaaaaaaaaa)" in str(caught.value)


def test_runs_tested_on_other_labels_are_refused():
    runs, cases = Study().add("none", NONE).add("block", BLOCK).tables
    cases["volume_ml"] = 3.0
    compare(runs, cases, reference="none")
    cases.loc[(cases["arm"] == "block") & (cases["case_id"] == "c2"), "volume_ml"] = 3.2
    with pytest.raises(DataError, match=r"different labels: class 'left' of the case 'c2' has 3(\.2)? ml"):
        compare(runs, cases, reference="none")


def test_a_run_tested_on_its_training_patients_is_refused():
    study = Study().add("none", NONE).add("block", BLOCK)
    none, block = (run["run_id"] for run in study.runs)
    known = {none: ("t1", "t2"), block: ("t1", "p3", "p5")}
    with pytest.raises(DataError, match=rf"{block} was tested on 2 of its training patients .*'p3'"):
        study.compare(train_patients=known)
    with pytest.raises(DataError, match="'p3'"):
        summarise_arms(*study.tables, train_patients=known)
    known[block] = ("t1", "t2")
    assert study.row(train_patients=known)["num_patients"] == 6


def test_a_run_whose_training_patients_are_not_known_is_refused_where_they_are_asked_for():
    study = Study().add("none", NONE).add("block", BLOCK)
    with pytest.raises(DataError, match=r"training patients of run heart-small-block-1.0-0-0 are not known"):
        study.compare(train_patients={"heart-small-none-1.0-0-0": ("t",)})


def test_a_variant_is_checked_as_the_run_whose_weights_it_has():
    study = Study().add("none", NONE).add("block", BLOCK).add("block removed", NONE, variant_of="block")
    none, block, _ = (run["run_id"] for run in study.runs)
    row = study.row(reference="block removed", train_patients={none: ("t",), block: ("t",)})
    assert row["arm"] == "block"
    with pytest.raises(DataError, match=f"{block} was tested on 1 of its training patients"):
        finished(*study.tables, train_patients={none: ("t",), block: ("t", "p0")})


def test_patients_who_do_not_overlap_pass():
    check_no_leak(("a", "b"), ("c", "d"), "r")
    with pytest.raises(DataError, match="run r was tested on 1 of its training patients"):
        check_no_leak(("a", "b"), ("b", "c", "b"), "r")


@pytest.mark.parametrize("value", [math.nan, math.inf, "", "-inf"])
def test_a_measure_that_is_not_a_finite_number_is_refused(value):
    runs, cases = Study().add("none", NONE).add("block", BLOCK).tables
    cases["hd95_mm"] = cases["hd95_mm"].astype(object)
    cases.loc[8, "hd95_mm"] = value
    with pytest.raises(DataError, match=r"hd95_mm of case 'c2', class 'left' in the arm 'block'"):
        compare(runs, cases, reference="none")
    assert len(compare(runs, cases, reference="none", metrics=["dice"])) == 1


def test_a_run_that_is_done_without_cases_is_refused():
    with pytest.raises(DataError, match=r"run heart-small-block-1.0-0-0 is done, but no case"):
        Study().add("none", NONE).add("block", []).compare()


def test_cases_of_other_splits_than_their_run_are_refused():
    runs, cases = Study().add("none", NONE).add("block", BLOCK).tables
    cases.loc[cases["arm"] == "block", "splits_sha256"] = OTHER_SPLITS
    with pytest.raises(DataError, match=r"trained on the splits aaaaaaaaaaaa, .* measured on bbbbbbbbbbbb"):
        compare(runs, cases, reference="none")


def test_a_run_or_a_case_that_is_there_twice_is_refused():
    with pytest.raises(DataError, match="have the same task, model"):
        Study().add("none", NONE).add("none", NONE).add("block", BLOCK).compare()
    runs, cases = Study().add("none", NONE).add("block", BLOCK).tables
    with pytest.raises(DataError, match="case and class twice"):
        compare(runs, pd.concat([cases, cases.tail(1)]), reference="none")


def test_tables_without_a_column_or_with_patients_that_are_numbers_are_refused():
    runs, cases = Study().add("none", NONE).add("block", BLOCK).tables
    with pytest.raises(DataError, match="the table cases has no column 'nsd'"):
        compare(runs, cases.drop(columns="nsd"), reference="none")
    with pytest.raises(DataError, match="empty cell in the column 'arm'"):
        compare(runs.assign(arm=["none", None]), cases, reference="none")
    with pytest.raises(DataError, match="patient_ids that are not text"):
        compare(runs, cases.assign(patient_id=range(12)), reference="none")


def test_an_arm_that_does_not_exist_is_no_reference():
    with pytest.raises(DataError, match="no run has the reference arm 'nothing'; choose one of block, none"):
        Study().add("none", NONE).add("block", BLOCK).compare(reference="nothing")


def test_nothing_to_compare_is_an_empty_table():
    assert list(Study().add("none", NONE).compare().columns) == COMPARISONS
    assert len(Study().add("none", NONE).compare()) == 0
    assert Study().add("none", [], state="planned").add("block", [], state="planned").row()["left_out"] == 1


def many_arms():
    """Two tasks, three arms, two seeds; the differences are multiples of thirds and sevenths."""
    study = Study()
    generator = np.random.default_rng(3)
    for task in ("heart", "liver"):
        for seed in range(2):
            for arm, gain in [("none", 0.0), ("block", 1 / 30), ("random", -1 / 70)]:
                dice = 0.6 + gain + generator.normal(0, 0.02, 7)
                study.add(arm, dice.tolist(), seed=seed, task=task)
    return study


def test_the_order_of_arms_runs_and_cases_does_not_matter():
    runs, cases = many_arms().tables
    expected = compare(runs, cases, reference="none", metrics=["dice"])
    for seed in range(3):
        shuffled = (table.sample(frac=1, random_state=seed) for table in (runs, cases))
        again = compare(*shuffled, reference="none", metrics=["dice"])
        pd.testing.assert_frame_equal(expected, again, check_exact=True)


def test_arm_and_reference_swapped_give_the_mirrored_row():
    study = Study().add("none", NONE).add("block", BLOCK)
    one, other = study.row(reference="none"), study.row(reference="block")
    assert one["p"] == other["p"]
    for column in ("difference", "effect", "dz"):
        assert one[column] == -other[column]
    assert (one["wins"], one["losses"]) == (other["losses"], other["wins"])
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]), abs=2e-3)


@pytest.mark.parametrize(("family", "columns", "size"), [("report", [], 4), ("task", ["task"], 2)])
def test_holm_adjusts_over_the_family_and_one_metric(family, columns, size):
    from statsmodels.stats.multitest import multipletests

    table = many_arms().compare(family=family)
    assert (table["family_size"] == size).all()
    for _, group in table.groupby(["metric", *columns]):
        assert len(group) == size
        expected = multipletests(group["p"], method="holm")[1]
        assert group["p_holm"].tolist() == pytest.approx(expected.tolist())
    assert (table["p_holm"] > table["p"]).any()


def test_models_and_fractions_are_never_mixed():
    study = Study()
    for model, fraction, gain in [("small", 1.0, 0.1), ("small", 0.1, 0.2), ("vit", 1.0, 0.3)]:
        study.add("none", [0.5, 0.5], model=model, fraction=fraction)
        study.add("block", [0.5 + gain, 0.5 + gain], model=model, fraction=fraction)
    table = study.compare(metrics=["dice"])
    assert table[["model", "fraction"]].to_numpy().tolist() == [["small", 0.1], ["small", 1.0], ["vit", 1.0]]
    assert table["difference"].tolist() == pytest.approx([0.2, 0.1, 0.3])
    assert (table["num_runs"] == 1).all()


def test_equal_gains_are_ties_whatever_the_rounding_of_their_sums():
    # 0.3 - 0.2, 0.8 - 0.7 and 0.4 - 0.3 are three different numbers in binary.
    row = Study().add("none", [0.2, 0.7, 0.3]).add("block", [0.3, 0.8, 0.4]).row()
    assert row["low"] == row["high"] == 0.1
    assert math.isnan(row["dz"])


def test_tables_written_and_read_again_give_the_same(tmp_path):
    runs, cases = many_arms().tables
    runs.to_csv(tmp_path / "runs.csv", index=False)
    cases.to_csv(tmp_path / "cases.csv", index=False)
    again = compare(
        pd.read_csv(tmp_path / "runs.csv"),
        pd.read_csv(tmp_path / "cases.csv", dtype={"patient_id": str, "case_id": str}),
        reference="none",
        metrics=["hd95_mm"],
        train_patients=dict.fromkeys(runs["run_id"], ("t",)),
    )
    pd.testing.assert_frame_equal(compare(runs, cases, reference="none", metrics=["hd95_mm"]), again)


def test_an_arm_is_summarised_over_patients_and_over_runs():
    study = Study().add("block", [0.1, 0.2, 0.3, 0.8], seed=0).add("block", [0.3, 0.4, 0.5, 0.8], seed=1)
    study.add("block", [], seed=2, state="failed").add("none", [], state="planned")
    table = summarise_arms(*study.tables).set_index(["arm", "metric"])
    row = table.loc[("block", "dice")]
    patients = [0.2, 0.3, 0.4, 0.8]
    assert (row["num_patients"], row["num_runs"]) == (4, 2)
    assert (row["mean"], row["median"]) == (pytest.approx(1.7 / 4), pytest.approx(0.35))
    assert (row["q1"], row["q3"]) == (pytest.approx(0.275), pytest.approx(0.5))
    assert row["seed_sd"] == pytest.approx(np.std([0.35, 0.5], ddof=1))
    assert (row["low"], row["high"]) == bootstrap_interval(patients, list("abcd"))
    assert (table.loc[("none", "dice"), "num_patients"], table.loc[("none", "dice"), "num_runs"]) == (0, 0)
    assert math.isnan(table.loc[("none", "dice"), "mean"])


def test_empty_masks_are_counted_over_runs():
    runs, cases = Study().add("none", NONE).add("none", NONE, seed=1).tables
    empty = ["truth", *[""] * 6, "both", *[""] * 4]
    assert set(summarise_arms(runs, cases.assign(empty=empty))["num_empty"]) == {2}
    assert set(summarise_arms(runs, cases)["num_empty"]) == {0}


def test_average_ranks_are_those_counted_by_hand_and_ties_share_theirs():
    study = Study()
    for task, dice in {"heart": (0.9, 0.8, 0.7), "liver": (0.6, 0.6, 0.5), "lung": (0.2, 0.4, 0.1)}.items():
        for arm, value in zip(("block", "none", "random"), dice, strict=True):
            study.add(arm, [value], task=task)
    study.add("block", [0.9], task="spleen").add("none", [0.1], task="spleen")
    study.add("random", [], task="spleen", state="failed")
    table = average_ranks(*study.tables, "dice").set_index("arm")
    # Ranks 1 2 3, 1.5 1.5 3, 2 1 3; the spleen lacks an arm.
    assert table["rank"].to_dict() == pytest.approx({"block": 1.5, "none": 1.5, "random": 3.0})
    assert (table["num_blocks"] == 3).all()
    # Chi2 of ranks with one tie: 12 * 3 / (3 * 4) * (1.5^2 + 1.5^2 + 3^2 - 12) / (1 - 6 / 72) = 4.909.
    assert table["friedman_p"].iloc[0] == pytest.approx(math.exp(-4.5 / (1 - 6 / 72) / 2))
    assert average_ranks(*study.tables, "hd95_mm")["rank"].tolist() == [1.5, 1.5, 3.0]
    two = average_ranks(*study.tables, "dice", arms=["none", "block"])
    assert (two["arm"].tolist(), two["rank"].tolist()) == (["block", "none"], [1.375, 1.625])
    assert critical_difference(3, 3) > 1.5


def test_without_a_common_block_there_are_no_ranks():
    study = Study().add("none", NONE).add("block", BLOCK, task="liver")
    assert average_ranks(*study.tables, "dice").empty


def test_ranks_are_over_the_runs_that_all_ranked_arms_have_done():
    study = Study()
    for task in ("heart", "liver"):
        # The block is ahead in both folds, but has not done the easy one yet.
        study.add("none", [0.5], task=task).add("block", [0.6], task=task)
        study.add("none", [0.9], task=task, fold=1, sha256=OTHER_SPLITS)
        study.add("block", [], task=task, fold=1, state="running")
    # Both are measured here, in no fold that they share.
    study.add("none", [0.9], task="lung", fold=1).add("block", [0.4], task="lung")
    table = average_ranks(*study.tables, "dice")
    assert table[["arm", "rank"]].to_numpy().tolist() == [["block", 1.0], ["none", 2.0]]
    assert (table["num_blocks"].tolist(), table["num_runs"].tolist()) == ([2, 2], [2, 2])


def test_arms_of_other_splits_are_not_ranked():
    study = Study().add("none", NONE).add("block", BLOCK, sha256=OTHER_SPLITS)
    with pytest.raises(DataError, match="different splits"):
        average_ranks(*study.tables, "dice")
