"""What can be tested of the driver of nnU-Net without nnU-Net."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from medvisionllama.data.phantom import write_phantoms
from medvisionllama.data.splits import make_splits, select


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
        for case in "abcd":
            (folder / part / f"{case}.nii.gz").write_bytes(b"")
    listed = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in "abcd"]
    content = {
        "name": "Two Parts",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front"},
        "training": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def request(module, data, **changed):
    settings = {
        "train": ["b", "a"],
        "validation": ["c"],
        "test": ["d"],
        "minutes": 1.0,
        "threads": 2,
        "seed": 0,
    }
    return module("nnunet_train").make_request(data, **{**settings, **changed})


def test_the_learning_rate_falls_with_the_time_as_nnunets_with_the_epochs(module):
    clock_module = module("nnunet_clock")
    seconds = iter([100.0, 100.0, 150.0, 199.0, 230.0])
    clock = clock_module.Clock(100.0, now=lambda: next(seconds))
    rates = [clock_module.polynomial_rate(0.01, clock.progress) for _ in range(4)]
    # 0.01 * (1 - epoch / 1000) ** 0.9 at the epochs 0, 500, 990 and 1000
    assert rates == pytest.approx([0.01, 0.0053588673, 0.0001584893, 0.0], rel=1e-6)


def test_the_clock_is_over_at_its_limit_and_not_before(module):
    seconds = iter([5.0, 64.9, 65.0])
    clock = module("nnunet_clock").Clock(60.0, now=lambda: next(seconds))
    assert [clock.is_over, clock.is_over] == [False, True]


def test_parts_of_the_time_are_counted_from_zero_and_the_last_one_stays(module):
    seconds = iter([0.0, 0.0, 9.9, 10.0, 99.0, 250.0])
    clock = module("nnunet_clock").Clock(100.0, now=lambda: next(seconds))
    assert [clock.part(10) for _ in range(5)] == [0, 0, 1, 9, 9]


def test_nnunet_is_shown_the_named_cases_only_and_one_fold_of_them(module, data, tmp_path):
    nnunet, root = module("nnunet"), tmp_path / "work"
    name = nnunet.write_raw(data, 1, root, ["b", "a", "c"])
    splits = nnunet.write_splits(name, root, ["b", "a"], ["c"])
    raw = root / "raw" / "Dataset001_TwoParts"
    images = sorted(path.name for path in (raw / "imagesTr").iterdir())
    assert images == ["a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz"]
    assert sorted(path.name for path in (raw / "labelsTr").iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert (raw / "labelsTr" / "a.nii.gz").resolve() == data / "labelsTr" / "a.nii.gz"
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 3
    assert json.loads(splits.read_text()) == [{"train": ["a", "b"], "val": ["c"]}]
    assert splits == root / "preprocessed" / "Dataset001_TwoParts" / "splits_final.json"


def test_a_case_that_the_folder_does_not_list_is_not_laid_out(module, data, tmp_path):
    with pytest.raises(ValueError, match="no case 'e'"):
        module("nnunet").write_raw(data, 1, tmp_path / "work", ["a", "e"])


def test_without_names_nnunet_is_shown_every_case(module, data, tmp_path):
    name = module("nnunet").write_raw(data, 4, tmp_path / "work")
    assert len(list((tmp_path / "work" / "raw" / name / "imagesTr").iterdir())) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test": ["a"]}, "named twice"),
        ({"validation": []}, "no validation case"),
        ({"test": ["e"]}, "no case 'e'"),
        ({"minutes": 0.0}, "0 minutes"),
    ],
)
def test_a_request_that_is_no_fair_run_is_refused(module, data, changed, message):
    with pytest.raises(ValueError, match=message):
        request(module, data, **changed)


def test_a_folder_of_another_request_is_not_overwritten(module, data, tmp_path):
    driver, work = module("nnunet_train"), tmp_path / "work"
    driver.settle(work, request(module, data))
    driver.settle(work, request(module, data))
    with pytest.raises(driver.NnunetError, match="other settings"):
        driver.settle(work, request(module, data, seed=1))
    assert json.loads((work / "request.json").read_text())["seed"] == 0


def test_a_folder_of_something_else_is_not_taken(module, data, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("")
    with pytest.raises(module("nnunet_train").NnunetError, match="holds no run"):
        module("nnunet_train").settle(tmp_path / "work", request(module, data))


def test_a_relative_environment_is_found_from_the_runs_folder(module, data, tmp_path, monkeypatch):
    driver, seen = module("nnunet_train"), []

    def install(environment):
        seen.append(environment)
        raise TimeoutError

    monkeypatch.setattr(driver.nnunet, "install", install)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TimeoutError):
        driver.train_and_predict(
            data, train=["a"], validation=["b"], test=["c"], minutes=1.0, work=Path("work"),
            environment=Path("runs/env"),
        )  # fmt: skip
    assert seen == [tmp_path.resolve() / "runs" / "env"]


def test_a_failed_part_gives_the_end_of_its_error_in_one_line(module, data, tmp_path, monkeypatch):
    driver, work = module("nnunet_train"), tmp_path / "work"
    script = tmp_path / "fails.py"
    script.write_text("raise MemoryError('no room')\n")
    monkeypatch.setattr(driver, "TRAINER", script)
    monkeypatch.setattr(driver.nnunet, "install", lambda _: Path(sys.executable))
    with pytest.raises(driver.NnunetError) as caught:
        driver.train_and_predict(
            data, train=["a"], validation=["b"], test=["c"], minutes=1.0, work=work, environment=tmp_path
        )
    assert (
        str(caught.value) == f"nnU-Net's part 'train' failed: MemoryError: no room; see {work / 'train.log'}"
    )


def test_nnunet_gets_the_cases_of_our_split_and_its_masks_are_measured(module, tmp_path, monkeypatch):
    driver, masks, seen = module("nnunet_train"), tmp_path / "masks", {}
    data = write_phantoms(tmp_path / "phantoms", num_cases=14, shape=(16, 20, 16))
    masks.mkdir()

    def perfect(data, *, test, **settings):
        seen.update(settings, test=test)
        for case in test:
            shutil.copy(data / "labelsTr" / f"{case}.nii.gz", masks)
        return SimpleNamespace(masks=masks)

    monkeypatch.setattr(driver, "train_and_predict", perfect)
    table, result, selection = driver.train_and_score(
        data, cases=4, minutes=1.5, work=tmp_path / "work", environment=tmp_path, threads=2, seed=3,
        exclude=["phantom_006"],
    )  # fmt: skip
    patients = {f"phantom_{number:03d}": f"phantom_{number:03d}" for number in range(14) if number != 6}
    assert selection == select(make_splits(patients, seed=3), patients, fold=0, num_cases=4)
    assert [seen[part] for part in ("train", "validation", "test")] == [
        selection.train, selection.validation, selection.test,
    ]  # fmt: skip
    assert (len(selection.train), seen["minutes"], seen["seed"]) == (4, 1.5, 3)
    assert set(table["case_id"]) == set(selection.test)
    assert set(table["dice"]) == {1.0}
    assert result.masks == masks
