"""The page of an experiment whose runs are written and not trained."""

import html
import os

import pandas as pd
import pytest
import yaml

from medvisionllama._files import write_json
from medvisionllama.errors import CheckpointError
from medvisionllama.evaluation.evaluate import write_table
from medvisionllama.experiments import reporting, verbs
from medvisionllama.experiments.matrix import Matrix, expand
from medvisionllama.experiments.store import Experiment

NO_INSERT = {"set": {"network.insert": "none"}}
FOLDS = {
    "tasks": {"a": {"data": "Task_A"}, "b": {"data": "Task_B"}},
    "arms": {"none": NO_INSERT, "block": {}},
    "folds": [0, 1],
}


@pytest.fixture
def folds(tmp_path, write_matrix):
    """Eight runs: two tasks, two arms, two folds."""
    return Experiment.create(tmp_path / "experiment", write_matrix(**FOLDS), data_root=tmp_path)


def measure(experiment, **dice):
    """Make runs look done, each with one test patient; `dice` by task, arm and fold, as a_none_0=0.5."""
    runs = {f"{run.task}_{run.arm}_{run.fold}": run for run in expand(experiment.matrix)}
    for name, value in dice.items():
        finish(experiment, runs[name], value)


def finish(experiment, run, dice, **facts):
    """Make a run look done, with the test patient of its fold and seed."""
    files, place = experiment.files(run.run_id), f"{run.fold}{run.seed}"
    row = {"case_id": f"c{place}", "patient_id": f"p{place}", "class": "left", "empty": ""}
    row |= {"dice": dice, "nsd": dice, "hd95_mm": 1.0, "tolerance_mm": 1.0}
    write_table(pd.DataFrame([row]), files.path / "evaluation.csv")
    told = {
        "splits_sha256": place * 32,
        "patients": {"train": ["x"], "validation": ["y"], "test": [f"p{place}"]},
        "test_dice": {run.arm: dice},
        "made_with": ["medvisionllama 1 (installed) with torch 2"],
    }
    write_json(files.done, told | facts)


def test_a_report_of_no_experiment_writes_nothing(tmp_path, write_matrix):
    """As where --out of `run` is forgotten."""
    with pytest.raises(CheckpointError, match="holds no experiment"):
        verbs.report(write_matrix(**FOLDS), out=tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def report(experiment):
    page = verbs.report(experiment.path, pages=False)
    ranks = page.parent / "ranks.csv"
    return page.read_text(), pd.read_csv(ranks).set_index("arm") if ranks.is_file() else None


def test_a_fold_that_one_arm_has_not_done_moves_no_rank_and_is_told(folds):
    # The second fold is the easy one; the block is better in the first, in which alone both are done.
    measure(folds, a_none_0=0.5, a_none_1=0.9, a_block_0=0.6)
    measure(folds, b_none_0=0.5, b_none_1=0.9, b_block_0=0.6)
    page, ranks = report(folds)
    assert ranks["rank"].to_dict() == {"block": 1.0, "none": 2.0}
    assert ranks["num_blocks"].tolist() == ranks["num_runs"].tolist() == [2, 2]
    assert "Runs that another of these arms lacks are left out (2 of none)." in page
    measure(folds, a_block_1=0.95, b_block_1=0.95)
    page, ranks = report(folds)
    assert ranks["num_runs"].tolist() == [4, 4]
    assert "Mean ranks are over" not in page


def test_blocks_without_a_fold_that_all_have_are_not_ranked_and_are_named(folds):
    measure(folds, a_none_0=0.5, a_block_0=0.6, b_none_0=0.5, b_block_1=0.9)
    page, ranks = report(folds)
    assert ranks is None
    assert "(1 of block, 1 of none), and so the blocks without a run that all have: b, small, 100 %." in page


def test_a_curve_joins_only_seeds_that_have_all_of_its_fractions(tmp_path, write_matrix):
    path = write_matrix(fractions=[0.5, 1.0], seeds=[0, 1], split_per_seed=True)
    experiment = Experiment.create(tmp_path / "experiment", path, data_root=tmp_path)
    for run in expand(experiment.matrix):
        # The second seed's patients are the hard ones, and of all of the cases one arm has not been there yet.
        if (run.seed, run.fraction, run.arm) != (1, 1.0, "block"):
            finish(experiment, run, 0.8 if run.seed == 0 else 0.2)
    page, _ = report(experiment)
    folder = experiment.results
    summary, drawn = (
        pd.read_csv(folder / f"{name}.csv").query("metric == 'dice'") for name in ("summary", "few_shot")
    )
    assert summary.set_index(["arm", "fraction"])["mean"].round(3).to_dict() == {
        ("block", 0.5): 0.5,
        ("block", 1.0): 0.8,
        ("none", 0.5): 0.5,
        ("none", 1.0): 0.5,
    }
    assert set(drawn["mean"].round(3)) == {0.8}
    assert len(drawn) == 4
    assert "the numbers are in few_shot.csv" in page


def test_a_table_that_was_written_again_is_refused(folds):
    measure(folds, a_none_0=0.5, a_block_0=0.6)
    run = next(run for run in expand(folds.matrix) if (run.task, run.arm, run.fold) == ("a", "block", 0))
    file = folds.files(run.run_id).path / "evaluation.csv"
    table = pd.read_csv(file, dtype={"empty": str}, keep_default_na=False)
    write_table(table.assign(dice=0.7), file)
    with pytest.raises(CheckpointError, match=r"written again since .* 0.7000, then 0.6000.*done.json"):
        report(folds)
    write_table(table.assign(tolerance_mm=3.0), file)
    with pytest.raises(CheckpointError, match="tolerances of 1 and 3 mm"):
        report(folds)


def test_code_that_changed_under_way_is_told(folds):
    first, second, third, fourth, *_ = expand(folds.matrix)
    finish(folds, first, 0.5)
    finish(folds, second, 0.5)
    assert "versions of the code" not in report(folds)[0]
    finish(folds, third, 0.5, made_with=["medvisionllama 2 (installed) with torch 2"])
    finish(folds, fourth, 0.5, made_with=["medvisionllama 1 (abc) with torch 2"])
    assert "The runs were made by 3 versions of the code: medvisionllama 1 (abc)" in report(folds)[0]


def test_what_a_number_of_cases_makes_of_percents_is_told(tmp_path, write_matrix):
    tasks = {"a": {"data": "Task_A", "set": {"data.num_cases": 4}}, "b": {"data": "Task_B"}}
    few = Experiment.create(
        tmp_path / "experiment", write_matrix(**{**FOLDS, "tasks": tasks}), data_root=tmp_path
    )
    assert "stands for as many as data.num_cases names (a, small: 4)." in report(few)[0]


def test_attempts_of_a_failed_run_are_counted(folds):
    run = expand(folds.matrix)[0]
    for number in range(2):
        folds.files(run.run_id).add_failure(f"RuntimeError: {number}", "", where="here")
    report(folds)
    rows = pd.read_csv(folds.results / "runs.csv").set_index("run_id")
    assert rows.loc[run.run_id, ["state", "attempts", "error"]].tolist() == ["failed", 2, "RuntimeError: 1"]


def test_a_correction_by_task_has_a_page_of_its_own_and_is_named(folds):
    measure(folds, a_none_0=0.5, a_block_0=0.6)
    page, _ = report(folds)
    by_task = verbs.report(folds.path, family="task", pages=False)
    assert by_task == folds.results / "by-task" / "index.html"
    against = verbs.report(folds.path, reference="block", family="task", pages=False)
    assert against == folds.results / "against-block" / "by-task" / "index.html"
    words = "Holm's correction over all comparisons of a measure"
    assert (folds.results / "index.html").read_text() == page
    # In the answer and where the page is explained.
    assert (page.count(words), page.count(f"{words} within a task")) == (2, 0)
    assert by_task.read_text().count(f"{words} within a task") == 2
    assert f"{words}, and by" in (folds.results / "table-small-dice.tex").read_text()
    assert f"{words} within a task, and by" in (by_task.parent / "table-small-dice.tex").read_text()


def test_pages_of_runs_that_were_evaluated_again_are_written_again(folds, monkeypatch):
    written = []

    def write(path):
        written.append(path)
        (path / "report.html").touch()

    monkeypatch.setattr(reporting, "write_report", write)
    measure(folds, a_none_0=0.5, a_block_0=0.6)
    for _ in range(2):
        verbs.report(folds.path)
        assert len(written) == 2
    # As if the run had been evaluated since.
    os.utime(written[1] / "report.html", (0, 0))
    verbs.report(folds.path)
    assert written[2:] == [written[1]]


def test_the_page_begins_with_what_the_study_is_for_and_ends_with_its_matrix(tmp_path, write_matrix):
    path = write_matrix(**FOLDS, about="Does a block help if Dice < 0.5?")
    experiment = Experiment.create(tmp_path / "experiment", path, data_root=tmp_path)
    page, _ = report(experiment)
    assert "<h1>mine</h1>\n<p>Does a block help if Dice &lt; 0.5?</p>" in page
    text = html.unescape(page.partition("<pre>")[2].partition("</pre>")[0])
    assert Matrix.model_validate(yaml.safe_load(text)) == experiment.matrix
    assert "split_per_seed" not in text
