"""Runs that begin with the weights of an earlier run."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from medvisionllama import api
from medvisionllama._files import files_sha256
from medvisionllama.data.index import open_dataset
from medvisionllama.data.splits import make_splits
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.run_dir import RunDir

from .conftest import FAST

STILL = {
    "train__learning_rate": 1e-12,
    "train__weight_decay": 0,
    "train__seed": 5,
}
"""A run that stays where it begins."""


def train(data, out, *, earlier=None, epochs=1, **changes):
    overrides = {**FAST, **{key.replace("__", "."): value for key, value in changes.items()}}
    api.train(
        data, out=out, epochs=epochs, start_from=earlier and earlier.path, overrides=overrides, test=False
    )
    return RunDir(out)


def stay(data, out, earlier, **changes):
    return train(data, out, earlier=earlier, **STILL, **changes)


@pytest.fixture(scope="module")
def earlier(phantoms, tmp_path_factory):
    return train(phantoms, tmp_path_factory.mktemp("earlier") / "run", epochs=4)


@pytest.fixture
def others(phantoms, tmp_path):
    """Write the phantoms as other people's scans, dataset.json changed as asked."""

    def write(**changes):
        root = shutil.copytree(phantoms, tmp_path / "others")
        facts = json.loads((root / "dataset.json").read_text())
        for entry in facts["training"]:
            for kind, path in list(entry.items()):
                entry[kind] = path.replace("phantom_", "other_")
                (root / path).rename(root / entry[kind])
        (root / "dataset.json").write_text(json.dumps(facts | changes))
        return root

    return write


def moved(run, earlier):
    """Names of the weights that are not the earlier run's."""
    mine, theirs = load_file(run.best), load_file(earlier.best)
    return {
        name
        for name, tensor in mine.items()
        if name not in theirs
        or tensor.shape != theirs[name].shape
        or not torch.allclose(tensor, theirs[name], atol=1e-6)
    }


def fresh(run):
    return set(run.read_manifest()["started_from"]["fresh"])


def test_a_run_begins_with_the_weights_of_another(phantoms, earlier, tmp_path):
    run = stay(phantoms, tmp_path / "run", earlier)
    assert not moved(run, earlier)
    assert moved(train(phantoms, tmp_path / "anew", train__seed=5), earlier)
    manifest = run.read_manifest()
    assert manifest["started_from"]["run"] == str(earlier.path)
    assert manifest["started_from"]["weights_sha256"] == files_sha256([earlier.best])
    assert manifest["started_from"]["kept_parameters"] == manifest["network"]["trainable_parameters"]
    assert not fresh(run)
    assert f"{earlier.path.name}, all of its" in run.report.read_text()


def test_outputs_for_other_classes_begin_anew(earlier, others, tmp_path):
    run = stay(others(labels={"0": "background", "1": "heart", "2": "aorta"}), tmp_path / "run", earlier)
    assert fresh(run) == {"head.out", "head.out_coarse", "head.out_half", "head.out_tokens"}
    # A bias that begins at zero may be what it was.
    assert {name.rpartition(".")[0] for name in moved(run, earlier)} == fresh(run)


def test_one_class_more_changes_the_outputs_alone(earlier, others, tmp_path):
    labels = {"0": "background", "1": "head", "2": "tail", "3": "none has it"}
    run = stay(others(labels=labels), tmp_path / "run", earlier)
    assert {name.rpartition(".")[0] for name in moved(run, earlier)} == fresh(run)
    assert all(name.startswith("head.out") for name in fresh(run))


def test_positions_of_another_grid_are_interpolated(earlier, others, tmp_path):
    run = stay(others(), tmp_path / "run", earlier, data__crop_size=(32, 32, 16))
    mine, theirs = (load_file(which.best)["encoder.0.table"] for which in (run, earlier))
    assert mine.shape != theirs.shape
    assert "encoder.0" not in fresh(run)
    # Interpolation is a mean with weights, and keeps what all positions have in common.
    assert torch.allclose(mine.mean(1), theirs.mean(1), atol=0.3 * float(theirs.std()))


def test_what_was_trained_around_another_block_begins_anew(phantoms, tmp_path):
    with_block = {"network__insert": "llm", "network__gate": "zero"}
    first = train(phantoms, tmp_path / "first", **with_block, network__block__weights="random", train__seed=1)
    same = stay(phantoms, tmp_path / "same", first, **with_block, network__block__weights="identity")
    assert fresh(same) == {"insert"}
    gate = load_file(same.best)["insert.gate"]
    assert float(gate.abs().max()) < 1e-6
    assert float(load_file(first.best)["insert.gate"].abs().max()) > 1e-4


def test_patients_it_has_seen_may_not_score_the_run(phantoms, earlier, tmp_path):
    with pytest.raises(DataError, match=r"who validates this run, so the result would leak.*splits\.json"):
        train(phantoms, tmp_path / "run", earlier=earlier, data__fold=1)
    with pytest.raises(DataError, match="who tests this run"):
        # Another seed's test patient trained or validated there, whoever validates here.
        train(
            phantoms,
            tmp_path / "run",
            earlier=earlier,
            data__split_seed=seed_that_tests_whom_it_saw(phantoms, earlier),
            data__fold="0",
        )
    assert not (tmp_path / "run").exists()
    seen = earlier.read_manifest()["cases"]["train"][0]
    with pytest.raises(DataError, match="who is excluded from this run"):
        # A double of somebody who scores, perhaps.
        train(phantoms, tmp_path / "run", earlier=earlier, data__splits=earlier.splits, data__exclude=[seen])
    # Nobody scores it.
    assert train(phantoms, tmp_path / "all", earlier=earlier, data__fold="all").best.is_file()


def test_a_chain_remembers_everybody(phantoms, earlier, others, tmp_path):
    between = train(others(), tmp_path / "between", earlier=earlier)
    assert set(between.read_manifest()["started_from"]["seen"]["train"]) == set(
        earlier.read_manifest()["cases"]["train"]
    )
    with pytest.raises(DataError, match="would leak"):
        train(phantoms, tmp_path / "run", earlier=between, data__fold=1)
    # Nor may such a run be a member of an ensemble that they score.
    ours = train(phantoms, tmp_path / "fold1", data__fold=1)
    with pytest.raises(DataError, match="would leak"):
        api.evaluate(ours.path, split="validation", also=[between.path])


def test_each_network_begins_with_its_own(phantoms, tmp_path):
    pair = train(phantoms, tmp_path / "pair", train__members=2)
    again = stay(phantoms, tmp_path / "again", pair, train__members=3)
    for number in (2, 3):
        start = pair.member(2) if number == 2 else pair
        assert not moved(again.member(number), start)
    assert moved(again.member(2), pair)


def test_a_run_goes_on_without_the_one_it_began_with(phantoms, earlier, tmp_path):
    gone = RunDir(shutil.copytree(earlier.path, tmp_path / "gone"))
    run = train(phantoms, tmp_path / "run", earlier=gone)
    before = run.read_manifest()["started_from"]
    with pytest.raises(ConfigError, match="start_from is fixed when a run begins"):
        api.train(phantoms, out=run.path, resume=True, start_from=earlier.path, epochs=2, test=False)
    shutil.rmtree(gone.path)
    assert api.train(phantoms, out=run.path, resume=True, epochs=2, test=False).finished
    assert run.read_manifest()["started_from"] == before


def test_what_cannot_be_begun_with_is_one_line(phantoms, earlier, cli, tmp_path):
    for path, words in ((tmp_path, "is not a run folder"), (tmp_path / "none", "is not a run folder")):
        outcome = cli("train", phantoms, "--out", tmp_path / "run", "--start-from", path)
        assert outcome.code == 2
        assert words in outcome.err
    outcome = cli(
        "train", phantoms, "--out", tmp_path / "run", "--preset", "segresnet", "--start-from", earlier.path
    )
    assert outcome.code == 2
    assert "no layer of" in outcome.err
    assert "give --preset small" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_set_that_has_grown_goes_on_by_the_division_it_had(phantoms, cli, tmp_path):
    facts = json.loads((phantoms / "dataset.json").read_text())
    grown = shutil.copytree(phantoms, tmp_path / "hearts")

    def label(number):
        (grown / "dataset.json").write_text(json.dumps(facts | {"training": facts["training"][:number]}))

    label(5)
    first = train(grown, tmp_path / "first")
    label(8)
    seed = seed_that_tests_whom_it_saw(grown, first)
    with pytest.raises(DataError, match="would leak") as error:
        train(grown, tmp_path / "second", earlier=first, data__split_seed=seed)
    words = re.search(r"medvisionllama (data split .*? NEW)", str(error.value))
    assert words
    new = tmp_path / "new.json"
    given = {"DATA": grown, "NEW": new}
    assert cli(*(given.get(word, word) for word in shlex.split(words[1]))).code == 0
    second = train(grown, tmp_path / "second", earlier=first, data__splits=new)
    for part, names in first.read_manifest()["cases"].items():
        assert set(second.read_manifest()["cases"][part]) >= set(names)
    outcome = cli("data", "split", grown, "--keep", first.splits, "--seed", 3, "--out", tmp_path / "x.json")
    assert outcome.code == 2
    assert "has its own seed" in outcome.err


def seed_that_tests_whom_it_saw(data, earlier):
    """A seed whose test patient trained the earlier run, and none of whose validation patients did."""
    patients = open_dataset(data).patients
    trained = set(earlier.read_manifest()["cases"]["train"])
    for seed in range(1000):
        splits = make_splits(patients, seed=seed)
        if trained & set(splits.test) and not trained & set(splits.folds[0].validation):
            return seed
    raise AssertionError("no such seed")
