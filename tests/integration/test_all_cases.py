"""A run on every labelled case: what trains, which weights stay, and that nothing scores it."""

import json

import pytest

from medvisionllama import api
from medvisionllama.checkpoint import load_tensors
from medvisionllama.data.index import open_dataset
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.run_dir import RunDir

from .conftest import FAST, settings

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """Saved at two marks, of which the last one counts."""
    out = tmp_path_factory.mktemp("all") / "run"
    changes = {**FAST, "train.num_validations": 2, "train.max_steps": STEPS}
    result = api.train(phantoms, out=out, fold="all", overrides=changes)
    assert result.finished
    assert result.validation_dice is None
    return RunDir(out)


def test_every_case_trains_and_none_is_kept(trained, phantoms):
    cases = trained.read_manifest()["cases"]
    assert cases["train"] == sorted(case.case_id for case in open_dataset(phantoms).cases)
    assert cases["validation"] == cases["test"] == []
    assert not trained.evaluation.is_file()


def test_the_last_weights_are_kept(trained):
    facts = load_tensors(trained.best)[1]
    assert facts["step"] == STEPS
    assert facts["validation_dice"] is None
    assert [record["step"] for record in trained.read_history()] == [STEPS // 2, STEPS]


def test_its_report_has_no_scores(trained):
    page = trained.report.read_text()
    assert "cases train, so none scores this run" in page
    assert "validation Dice" not in page


@pytest.mark.parametrize("split", ["test", "validation"])
def test_none_of_its_own_cases_scores_it(trained, split):
    with pytest.raises(ConfigError, match=f"has no {split} cases; score a run of a fold"):
        api.evaluate(trained.path, split=split)
    with pytest.raises(ConfigError, match=f"has no {split} cases; give images"):
        api.explain(trained.path, split=split)


def test_it_scores_no_ensemble_either(trained, phantoms, tmp_path):
    fold = tmp_path / "fold"
    api.train(phantoms, out=fold, overrides={**FAST, "train.max_steps": 1}, test=False)
    with pytest.raises(DataError, match="would leak"):
        api.evaluate(fold, also=[trained.path])


def test_the_command_says_what_it_does(cli, phantoms, tmp_path):
    arguments = ["train", phantoms, "--out", tmp_path / "run", "--fold", "all", "--epochs", 1, "--json"]
    made = cli(*arguments, *settings(**FAST))
    assert made.code == 0
    facts = json.loads(made.out)
    assert facts["validation_dice"] is None
    assert "test" not in facts
    assert "train; none is left to choose weights by or to score the run" in made.err
    masks = cli("predict", tmp_path / "run", phantoms / "imagesTr", "--out", tmp_path / "masks")
    assert masks.code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fold", "al"], "data.fold: must be the number of a fold, from 0, or all (given: 'al')"),
        (["--fold", "-1"], "data.fold: must be the number of a fold"),
        (["--fold", "all", "--cases", "3"], "data.fold=all trains on every labelled case; drop --cases"),
        (["--fold", "all", "--fraction", "0.5"], "data.fold=all trains on every labelled case"),
        (["--fold", "all", "--set", "train.schedule=plateau"], "train.schedule=plateau goes by validation"),
        (["--fold", "all", "--unlabelled", "unused"], "unlabelled.scans=unused, but all training cases"),
        (["--fold", "9"], "fold 9 does not exist; this split has folds 0 to"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(cli, phantoms, tmp_path, arguments, words):
    refused = cli("train", phantoms, "--out", tmp_path / "run", *arguments)
    assert refused.code == 2
    assert words in " ".join(refused.err.split())
    assert not (tmp_path / "run").exists()
