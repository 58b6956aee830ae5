from pathlib import Path

import pytest

from medvisionllama._files import write_json
from medvisionllama.config import load_config, write_config
from medvisionllama.data.index import Case, Dataset
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.evaluation.members import check_distinct, check_unseen, name_ensemble
from medvisionllama.run_dir import RunDir


@pytest.fixture
def write_run(tmp_path):
    def write(name, *, train=(), validation=(), unlabelled=None, pattern=None):
        run = RunDir(tmp_path / name)
        cases = {"train": train, "validation": validation}
        write_json(run.manifest, {"cases": cases, "unlabelled": unlabelled or {}})
        write_config(load_config("small", {"data.path": "d", "data.patient_pattern": pattern}), run.config)
        return run

    return write


@pytest.fixture
def dataset():
    """Patient p1 with two frames, p2 with one; the names of the cases do not tell the patients."""
    cases = [Case(name, patient, (), None) for name, patient in (("a", "p1"), ("b", "p1"), ("c", "p2"))]
    return Dataset("d", Path("d"), tuple(cases), ("MRI",), {1: "one"})


def test_another_frame_of_a_scored_patient_is_a_leak(write_run, dataset):
    scored = dataset.cases[:1]
    check_unseen([write_run("clean", train=["c"])], dataset, scored, split="test")
    with pytest.raises(DataError, match="has 1 of the 1 test patients among its train patients"):
        check_unseen([write_run("leak", train=["b", "c"])], dataset, scored, split="test")


@pytest.mark.parametrize("seen", [{"a": "p1"}, {"b": "p1"}, {"a folder's scan": "p1"}])
def test_a_patient_who_trained_without_labels_has_been_seen(write_run, dataset, seen):
    members = [write_run("member", train=["c"], unlabelled=seen, pattern="^([abc])$")]
    for split in ("test", "validation"):
        with pytest.raises(DataError, match="'p1'"):
            check_unseen(members, dataset, dataset.cases[:1], split=split)
    check_unseen([write_run("clean", unlabelled={})], dataset, dataset.cases[:1], split="test")


def test_every_member_is_looked_at(write_run, dataset):
    members = [
        write_run("first", train=["c"]),
        write_run("second", train=["c"]),
        write_run("third", train=["a"]),
    ]
    with pytest.raises(DataError, match="third"):
        check_unseen(members, dataset, dataset.cases[:1], split="test")


def test_patients_of_a_case_that_the_dataset_lacks_are_known_by_its_name(write_run, dataset):
    member = write_run("member", train=["p2_scan9"], pattern="^(p.)")
    with pytest.raises(DataError, match="'p2'"):
        check_unseen([member], dataset, dataset.cases[2:], split="test")


def test_a_member_s_own_pattern_tells_whom_it_has_seen(write_run):
    """A later visit that the pattern of the first run's dataset takes for a patient of its own."""
    cases = tuple(Case(name, name, (), None) for name in ("1001_10003", "1002_10001"))
    dataset = Dataset("d", Path("d"), cases, ("MRI",), {1: "one"})
    member = write_run("member", train=["1001_10001"], pattern="^(.{4})")
    with pytest.raises(DataError, match="the first is '1001_10003'"):
        check_unseen([member], dataset, cases, split="test")
    check_unseen([member], dataset, cases[1:], split="test")


def test_validation_patients_may_have_validated_but_not_trained(write_run, dataset):
    member = write_run("member", validation=["c"])
    check_unseen([member], dataset, dataset.cases[2:], split="validation")
    with pytest.raises(DataError, match="among its validation patients"):
        check_unseen([member], dataset, dataset.cases[2:], split="test")
    with pytest.raises(DataError, match="same splits and fold"):
        check_unseen([write_run("other", train=["c"])], dataset, dataset.cases[2:], split="validation")


def test_files_of_an_ensemble_are_named_after_its_further_runs(tmp_path):
    first, one, two = (RunDir(tmp_path / name) for name in ("fold0", "fold1", "fold2"))
    assert name_ensemble(first, []) == ""
    assert name_ensemble(first, [two, one]) == name_ensemble(first, [one, two]) == "with-fold1-fold2"


def test_runs_of_one_name_in_several_folders_have_files_of_their_own(tmp_path):
    first = RunDir(tmp_path / "fold0")
    names = {name_ensemble(first, [RunDir(tmp_path / place / "fold1")]) for place in (".", "x", "y")}
    assert len(names) == 3
    assert "with-fold1" in names


def test_names_stay_short_enough_for_a_file(tmp_path):
    first = RunDir(tmp_path / "fold0")
    many = [RunDir(tmp_path / f"run{number:03d}") for number in range(60)]
    name = name_ensemble(first, many)
    assert name.startswith("with-60-runs-")
    assert len(name) < 30
    assert name != name_ensemble(first, [*many[1:], RunDir(tmp_path / "run999")])


def test_a_run_by_two_paths_is_one(tmp_path):
    (tmp_path / "fold0").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fold0")
    check_distinct([RunDir(tmp_path / "fold0"), RunDir(tmp_path / "fold1")])
    with pytest.raises(ConfigError, match="twice"):
        check_distinct([RunDir(tmp_path / "fold0"), RunDir(tmp_path / "link")])
