import json
from itertools import pairwise

import pytest

from medvisionllama.data.splits import (
    Fold,
    Splits,
    extend_splits,
    make_splits,
    patients_of,
    read_splits,
    select,
    write_splits,
)
from medvisionllama.errors import DataError


def frames(num_patients: int, num_frames: int = 2) -> dict[str, str]:
    return {f"p{n:03d}_frame{f}": f"p{n:03d}" for n in range(num_patients) for f in range(num_frames)}


@pytest.mark.parametrize("num_patients", [3, 4, 5, 7, 40, 101])
def test_each_fold_divides_the_patients_without_overlap(num_patients):
    patients = frames(num_patients)
    splits = make_splits(patients)
    for fold in splits.folds:
        everyone = [*fold.train, *fold.validation, *splits.test]
        assert sorted(everyone) == sorted(set(patients.values()))
        assert fold.train
        assert fold.validation
    assert splits.test


def test_a_hundred_patients_give_the_stated_shares():
    splits = make_splits(frames(100))
    assert len(splits.test) == 10
    assert [(len(fold.train), len(fold.validation)) for fold in splits.folds] == [(72, 18)] * 5


def test_every_patient_outside_the_test_set_validates_exactly_once():
    splits = make_splits(frames(43))
    validated = [patient for fold in splits.folds for patient in fold.validation]
    assert sorted([*validated, *splits.test]) == sorted(set(frames(43).values()))


def test_the_seed_alone_decides():
    patients = frames(40)
    backwards = dict(reversed(patients.items()))
    assert make_splits(patients, seed=3) == make_splits(backwards, seed=3)
    assert make_splits(patients, seed=3).test != make_splits(patients, seed=4).test


def test_a_draw_is_the_same_on_every_machine():
    splits = make_splits(frames(10))
    assert splits.test == ("p004",)
    assert splits.folds[0] == Fold(("p003", "p000", "p005", "p001", "p008", "p002", "p007"), ("p006", "p009"))
    assert splits.sha256 == "8ddaaef0f6a1e04386c31761b1da16a36f86c6ad2c378074e584e3590e10f590"


@pytest.mark.parametrize(("before", "after"), [(3, 4), (3, 40), (10, 11), (12, 30), (40, 41), (40, 400)])
def test_patients_who_join_move_nobody(before, after):
    drawn = make_splits(frames(before), seed=3)
    splits = extend_splits(drawn, frames(after))
    assert patients_of(splits) == set(frames(after).values())
    assert set(splits.test) >= set(drawn.test)
    assert len(splits.test) == max(len(drawn.test), round(0.1 * after))
    for fold, old in zip(splits.folds, drawn.folds, strict=True):
        assert fold.train[: len(old.train)] == old.train
        assert set(fold.validation) >= set(old.validation)
        assert sorted([*fold.train, *fold.validation, *splits.test]) == sorted(patients_of(splits))
    sizes = [len(fold.validation) for fold in splits.folds]
    assert sum(sizes) + len(splits.test) == after
    assert max(sizes) - min(sizes) <= 1


def test_nobody_who_joins_leaves_the_division_as_it_is():
    drawn = make_splits(frames(20))
    assert extend_splits(drawn, frames(20)) == extend_splits(drawn, frames(7)) == drawn


@pytest.mark.parametrize("fold", range(5))
def test_frames_of_a_patient_stay_together(fold):
    patients = frames(20, num_frames=3)
    chosen = select(make_splits(patients), patients, fold=fold, fraction=0.3)
    parts = [{patients[case] for case in part} for part in (chosen.train, chosen.validation, chosen.test)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    for part, owners in zip((chosen.train, chosen.validation, chosen.test), parts, strict=True):
        assert len(part) == 3 * len(owners)


@pytest.mark.parametrize("fold", range(5))
def test_smaller_fractions_are_subsets_of_larger_ones(fold):
    patients = frames(40)
    splits = make_splits(patients)
    chosen = [
        set(select(splits, patients, fold=fold, fraction=share).train) for share in (0.05, 0.1, 0.3, 0.7, 1.0)
    ]
    assert all(small < large for small, large in pairwise(chosen))


def test_fractions_are_rounded_up_to_whole_patients():
    patients = frames(100)
    sizes = {
        share: len(select(make_splits(patients), patients, fold=0, fraction=share).train) // 2
        for share in (0.001, 0.1, 0.25, 0.3, 1.0)
    }
    assert sizes == {0.001: 1, 0.1: 8, 0.25: 18, 0.3: 22, 1.0: 72}


def test_the_test_set_is_the_same_for_every_fold_and_fraction():
    patients = frames(40)
    splits = make_splits(patients)
    tests = {
        select(splits, patients, fold=fold, fraction=share).test for fold in range(5) for share in (0.1, 1.0)
    }
    assert len(tests) == 1


def test_validation_is_the_same_for_every_fraction():
    patients = frames(40)
    splits = make_splits(patients)
    assert (
        len({select(splits, patients, fold=2, fraction=share).validation for share in (0.1, 0.5, 1.0)}) == 1
    )


@pytest.mark.parametrize(("wanted", "taken"), [(1, 2), (2, 2), (3, 4), (4, 4), (10_000, 56)])
def test_a_number_of_cases_takes_whole_patients_until_it_is_reached(wanted, taken):
    patients = frames(40)
    assert len(select(make_splits(patients), patients, fold=0, num_cases=wanted).train) == taken


def test_numbers_of_cases_are_nested_in_fractions():
    patients = frames(40)
    splits = make_splits(patients)
    few = set(select(splits, patients, fold=1, num_cases=4).train)
    assert few < set(select(splits, patients, fold=1, fraction=0.1).train)


@pytest.mark.parametrize("num_patients", [0, 1, 2])
def test_fewer_than_three_patients_are_refused(num_patients):
    with pytest.raises(DataError, match=f"at least 3 patients .* found {num_patients}"):
        make_splits(frames(num_patients, num_frames=9))


@pytest.mark.parametrize("fold", [-1, 5])
def test_a_fold_that_does_not_exist_is_refused(fold):
    with pytest.raises(DataError, match=rf"fold {fold} does not exist; this split has folds 0 to 4"):
        select(make_splits(frames(20)), frames(20), fold=fold)


def test_a_patient_that_the_splits_do_not_know_is_refused():
    with pytest.raises(DataError, match="'new' is in no part"):
        select(make_splits(frames(20)), {**frames(20), "new_1": "new"}, fold=0)


def test_patients_of_the_splits_that_the_folder_lacks_are_left_out():
    splits = make_splits(frames(20))
    fewer = {case: patient for case, patient in frames(20).items() if patient not in splits.test[:1]}
    assert len(select(splits, fewer, fold=0).test) == len(select(splits, frames(20), fold=0).test) - 2


def test_splits_survive_their_file(tmp_path):
    splits = make_splits(frames(20), seed=7)
    write_splits(splits, tmp_path / "splits.json")
    assert read_splits(tmp_path / "splits.json") == splits
    assert json.loads((tmp_path / "splits.json").read_text())["sha256"] == splits.sha256


def swap(content: dict) -> None:
    fold = content["folds"][0]
    fold["train"][0], fold["validation"][0] = fold["validation"][0], fold["train"][0]


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(swap, id="patients swapped"),
        pytest.param(lambda content: content["folds"][1]["train"].pop(), id="patient removed"),
        pytest.param(lambda content: content["folds"][1]["train"].reverse(), id="order changed"),
        pytest.param(lambda content: content["folds"].pop(), id="fold removed"),
        pytest.param(lambda content: content.update(seed=1), id="seed changed"),
        pytest.param(lambda content: content.update(sha256="0" * 64), id="hash changed"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, tamper):
    path = tmp_path / "splits.json"
    write_splits(make_splits(frames(20)), path)
    content = json.loads(path.read_text())
    tamper(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="was changed since it was drawn"):
        read_splits(path)


@pytest.mark.parametrize(
    "splits",
    [
        Splits(0, ("t",), (Fold(("a", "b"), ("b",)),)),
        Splits(0, ("a",), (Fold(("b",), ("c",)), Fold(("a",), ("b",)))),
        Splits(0, ("t",), (Fold(("a",), ("t",)),)),
    ],
)
def test_a_patient_in_two_parts_is_refused_even_with_a_valid_hash(tmp_path, splits):
    write_splits(splits, tmp_path / "splits.json")
    with pytest.raises(DataError, match="a patient in two parts"):
        read_splits(tmp_path / "splits.json")


def test_a_missing_file_is_refused_with_the_command_that_draws_one(tmp_path):
    with pytest.raises(DataError, match="medvisionllama data split"):
        read_splits(tmp_path / "absent.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"3", b"\xff", b'{"sha256": 1, "folds": [1]}'])
def test_a_file_that_holds_no_splits_is_refused(tmp_path, content):
    (tmp_path / "splits.json").write_bytes(content)
    with pytest.raises(DataError, match="is not a splits file"):
        read_splits(tmp_path / "splits.json")
