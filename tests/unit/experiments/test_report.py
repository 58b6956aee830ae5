"""The page of an experiment whose runs are written and not trained."""

import pandas as pd
import pytest

from medvisionllama._files import write_json
from medvisionllama.evaluation.evaluate import write_table
from medvisionllama.experiments import verbs
from medvisionllama.experiments.matrix import expand
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
        files, fold = experiment.files(runs[name].run_id), runs[name].fold
        row = {"case_id": f"c{fold}", "patient_id": f"p{fold}", "class": "left", "empty": ""}
        row |= {"dice": value, "nsd": value, "hd95_mm": 1.0}
        write_table(pd.DataFrame([row]), files.path / "evaluation.csv")
        facts = {
            "splits_sha256": f"{fold}" * 64,
            "patients": {"train": ["p8"], "validation": ["p9"], "test": [f"p{fold}"]},
            "test_dice": {runs[name].arm: value},
        }
        write_json(files.done, facts)


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
