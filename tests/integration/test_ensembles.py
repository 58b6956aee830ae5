"""Two folds of one task: cleaning chosen on validation, ensembles measured, calibration."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from medvisionllama import Predictor, api
from medvisionllama._files import file_sha256
from medvisionllama.errors import CheckpointError, ConfigError, DataError
from medvisionllama.evaluation.evaluate import evaluate_folders, mean_class_dice, read_table
from medvisionllama.inference.cleaning import Cleaning, read_choice
from medvisionllama.run_dir import RunDir

from .conftest import FAST, train_fast


@pytest.fixture(scope="module")
def trained_again(phantoms, tmp_path_factory):
    """Fold 0 once more, with another seed."""
    return train_fast(phantoms, tmp_path_factory.mktemp("again") / "again", fold=0, seed=2)


@pytest.fixture
def runs(trained_folds, trained_again, tmp_path):
    root = shutil.copytree(trained_folds, tmp_path / "runs")
    shutil.copytree(trained_again, root / "again")
    return root


def choose_by_hand(run, **cleaning):
    """A choice that tells its effect from afar."""
    content = {
        "largest_component": False,
        "min_component_ml": 0.0,
        **cleaning,
        "num_cases": 1,
        "weights_sha256": file_sha256(RunDir(run).best),
        "candidates": [],
    }
    RunDir(run).postprocessing.write_text(json.dumps(content))


def volumes(outcome):
    [record] = json.loads(outcome.out)
    return sum(record["volumes_ml"].values())


def test_the_choice_is_written_and_shown_and_its_masks_are_measured(runs, cli):
    run = RunDir(runs / "fold0")
    outcome = cli("evaluate", run.path, "--split", "validation", "--choose-cleaning", "--json")
    assert outcome.code == 0, outcome.err
    printed, written = json.loads(outcome.out), json.loads(run.postprocessing.read_text())
    assert printed["cleaning"] == written
    validation = json.loads(run.manifest.read_text())["cases"]["validation"]
    assert written["num_cases"] == len(validation)
    choice = read_choice(run)
    [taken] = [
        one.dice
        for one in choice.candidates
        if all(getattr(one, name) == getattr(choice, name) for name in Cleaning.model_fields)
    ]
    assert printed["mean_class_dice"] == pytest.approx(taken)
    assert {row["case_id"] for row in printed["cases"]} == set(validation)
    shown = cli("evaluate", run.path, "--split", "validation", "--choose-cleaning")
    assert f"chosen: {choice.words} ({run.postprocessing})" in shown.out


def test_the_masks_that_are_kept_and_measured_are_cleaned(runs, monkeypatch):
    everything = Cleaning(min_component_ml=1e6)
    monkeypatch.setattr(
        "medvisionllama.evaluation.cleaning.make_candidates", lambda volumes: [Cleaning(), everything]
    )
    monkeypatch.setattr("medvisionllama.inference.cleaning.pick", lambda dice: 1)
    before = api.evaluate(runs / "fold0", split="validation")
    assert before["predicted_ml"].max() > 0
    after = api.evaluate(runs / "fold0", split="validation", choose_cleaning=True)
    assert after["predicted_ml"].max() == 0
    dice = [one.dice for one in read_choice(RunDir(runs / "fold0")).candidates]
    assert dice == pytest.approx([mean_class_dice(before).mean(), mean_class_dice(after).mean()])


@pytest.mark.parametrize("also", [False, True])
def test_predict_uses_the_choice_and_says_so(runs, phantoms, tmp_path, cli, also):
    choose_by_hand(runs / "fold0", min_component_ml=1e6)
    more = ["--also", runs / "fold1"] if also else []
    scan = phantoms / "imagesTr" / "phantom_000.nii.gz"
    chosen = cli("predict", runs / "fold0", scan, "--out", tmp_path / "m", "--json", *more)
    assert chosen.code == 0, chosen.err
    assert volumes(chosen) == 0
    [line] = [line for line in chosen.err.splitlines() if "as chosen on 1 validation cases" in line]
    assert str(runs / "fold0" / "postprocessing.json") in line
    assert ("the first run's choice holds for all" in line) is also
    for number, flags in enumerate((["--all-components"], ["--largest"], ["--min-ml", 0])):
        asked = cli(
            "predict", runs / "fold0", scan, "--out", tmp_path / f"m{number}", "--json", *more, *flags
        )
        assert volumes(asked) > 0
        assert "as chosen" not in asked.err


def test_the_choice_of_another_member_does_not_count(runs, phantoms, tmp_path, cli):
    choose_by_hand(runs / "fold1", min_component_ml=1e6)
    scan = phantoms / "imagesTr" / "phantom_000.nii.gz"
    outcome = cli(
        "predict", runs / "fold0", scan, "--also", runs / "fold1", "--out", tmp_path / "m", "--json"
    )
    assert volumes(outcome) > 0


def test_test_cases_are_cleaned_by_the_choice_and_do_not_make_it(runs, cli):
    choose_by_hand(runs / "fold0", min_component_ml=1e6)
    before = RunDir(runs / "fold0").postprocessing.read_bytes()
    outcome = cli("evaluate", runs / "fold0", "--json")
    assert {row["predicted_ml"] for row in json.loads(outcome.out)["cases"]} == {0.0}
    assert "as chosen on 1 validation cases" in outcome.err
    refused = cli("evaluate", runs / "fold0", "--choose-cleaning")
    assert refused.code == 2
    assert (
        refused.err.strip()
        .splitlines()[-1]
        .startswith("medvisionllama: --choose-cleaning chooses on validation")
    )
    assert RunDir(runs / "fold0").postprocessing.read_bytes() == before


def test_masks_against_labels_choose_nothing(runs, phantoms):
    with pytest.raises(ConfigError, match="leave out the labels"):
        api.evaluate(runs / "fold0", phantoms / "labelsTr", split="validation", choose_cleaning=True)
    with pytest.raises(ConfigError, match="allowed: test, validation"):
        api.evaluate(runs / "fold0", split="train")


def edit_manifest(run, **changes):
    path = RunDir(run).manifest
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_ensemble_is_measured_as_predict_segments_it(runs, phantoms, tmp_path, cli):
    run = RunDir(runs / "fold0")
    alone = api.evaluate(run.path)
    before = run.evaluation.read_bytes()
    outcome = cli("evaluate", run.path, "--also", runs / "fold1")
    assert outcome.code == 0, outcome.err
    table = run.path / "evaluation-test-with-fold1.csv"
    assert outcome.out.splitlines()[-1] == str(table)
    assert run.evaluation.read_bytes() == before
    test = json.loads(run.manifest.read_text())["cases"]["test"]
    scans = [phantoms / "imagesTr" / f"{case}.nii.gz" for case in test]
    api.predict(run.path, scans, also=[runs / "fold1"], out=tmp_path / "masks")
    expected = evaluate_folders(tmp_path / "masks", phantoms / "labelsTr")
    found = read_table(table)
    assert set(found["case_id"]) == set(test)
    np.testing.assert_allclose(found["dice"], expected["dice"], atol=1e-6)
    assert not np.allclose(found["dice"], alone["dice"], atol=1e-6)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_member_that_has_seen_a_test_patient_is_refused(runs, cli, part):
    cases = json.loads(RunDir(runs / "fold1").manifest.read_text())["cases"]
    leak = cases["test"][0]
    edit_manifest(runs / "fold1", cases={**cases, part: [*cases[part], leak]})
    outcome = cli("evaluate", runs / "fold0", "--also", runs / "fold1")
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert f"{runs / 'fold1'} has 1 of the 1 test patients among its {part} patients" in line
    assert repr(leak) in line
    assert not list((runs / "fold0").glob("evaluation*"))


def test_validation_patients_are_scored_by_runs_of_the_same_fold_only(runs):
    with pytest.raises(DataError, match="same splits and fold"):
        api.evaluate(runs / "fold0", split="validation", also=[runs / "fold1"])
    listed = api.evaluate(runs / "fold0", split="validation", also=[runs / "again"])
    # One run needs no list, and is not one of letters.
    alone = api.evaluate(runs / "fold0", split="validation", also=str(runs / "again"))
    assert alone.equals(listed)
    assert (runs / "fold0" / "evaluation-validation-with-again.csv").is_file()


def test_a_member_that_does_not_say_whom_it_has_seen_is_refused(runs):
    edit_manifest(runs / "fold1", cases=None)
    with pytest.raises(CheckpointError, match="a leak cannot be excluded"):
        api.evaluate(runs / "fold0", also=[runs / "fold1"])


def test_a_run_counts_once(runs):
    with pytest.raises(ConfigError, match="given twice"):
        api.evaluate(runs / "fold0", also=[runs / "fold1", runs / "fold0"])


def test_an_ensemble_chooses_no_cleaning(runs):
    with pytest.raises(ConfigError, match="leave out --also"):
        api.evaluate(runs / "fold0", split="validation", also=[runs / "again"], choose_cleaning=True)


def by_hand(members, phantoms, cases):
    """Probabilities in 255 steps, as predict writes them, and true classes, of all counted voxels of all cases.

    And how many are counted at least and at most: the steps leave undecided voxels open.
    """
    shares, truths, bounds = [], [], np.zeros(2, int)
    for case in cases:
        scan = phantoms / "imagesTr" / f"{case}.nii.gz"
        found = Predictor.from_run(*members).predict(scan, probabilities=True).probabilities / 255
        truth = np.asarray(nib.load(phantoms / "labelsTr" / f"{case}.nii.gz").dataobj)
        counted = (truth > 0) | (found.argmax(axis=0) > 0)
        lead = found[1:].max(axis=0) - found[0]
        bounds += [((truth > 0) | (lead > sign * 1.5 / 255)).sum() for sign in (1, -1)]
        shares.append(found[:, counted])
        truths.append(truth[counted])
    return np.concatenate(shares, axis=1), np.concatenate(truths).astype(int), bounds


@pytest.mark.parametrize(
    ("also", "split", "file"),
    [
        ([], "validation", "calibration.json"),
        ([], "test", "calibration-test.json"),
        (["again"], "validation", "calibration-validation-with-again.json"),
        (["fold1"], "test", "calibration-test-with-fold1.json"),
    ],
)
def test_calibration_is_that_of_the_probabilities_on_the_scan_s_grid(runs, phantoms, cli, also, split, file):
    members = [runs / name for name in ("fold0", *also)]
    more = [part for member in members[1:] for part in ("--also", member)]
    outcome = cli("evaluate", members[0], "--split", split, "--calibration", *more)
    assert outcome.code == 0, outcome.err
    facts = json.loads((members[0] / file).read_text())
    assert facts["runs"] == ["fold0", *also]
    assert facts["weights_sha256"] == [RunDir(member).weights_sha256() for member in members]
    cases = json.loads(RunDir(members[0]).manifest.read_text())["cases"][split]
    assert [scan["case_id"] for scan in facts["scans"]] == cases
    probabilities, truth, (least, most) = by_hand(members, phantoms, cases)
    assert facts["num_voxels"] == sum(one["count"] for one in facts["bins"])
    assert least <= facts["num_voxels"] <= most < 1.5 * least
    brier = ((probabilities - np.eye(len(probabilities))[truth].T) ** 2).sum(axis=0).mean()
    assert facts["brier"] == pytest.approx(brier, abs=0.01)
    gap = abs(probabilities.max(axis=0).mean() - (probabilities.argmax(axis=0) == truth).mean())
    # Bins can only add to the gap of all voxels together; here bytes decide which nearly tied voxels count, and
    # which of two nearly tied classes is likeliest.
    second, first = np.sort(probabilities, axis=0)[-2:]
    tied = (first - second < 1.5 / 255).mean()
    assert facts["ece"] >= gap - 2 / 255 - tied - (most - least) / least
    lines = outcome.out.splitlines()[-2:]
    assert lines[0].startswith(f"ECE {facts['ece']:.4f} (15 bins, {facts['num_voxels']} voxels")
    assert lines[1].startswith(f"Brier score {facts['brier']:.4f} (0 to 2; {members[0] / file})")


def test_components_that_are_removed_do_not_change_the_calibration(runs, cli):
    arguments = ("evaluate", runs / "fold0", "--split", "validation", "--calibration", "--json")
    before = json.loads(cli(*arguments).out)["calibration"]
    choose_by_hand(runs / "fold0", min_component_ml=1e6)
    assert json.loads(cli(*arguments).out)["calibration"] == before


def test_labels_of_other_axes_than_their_scan_s_lie_in_the_right_place(runs, phantoms, tmp_path):
    before = calibrate(runs / "fold0")
    moved = shutil.copytree(phantoms, tmp_path / "data")
    for path in (moved / "labelsTr").iterdir():
        label = nib.load(path)
        nib.save(label.as_reoriented(nib.orientations.axcodes2ornt(("I", "P", "L"))), path)
    config = RunDir(runs / "fold0").config
    config.write_text(config.read_text().replace(str(phantoms), str(moved)))
    assert calibrate(runs / "fold0") == before


def test_scans_in_many_slabs_are_calibrated_as_in_one(runs, monkeypatch):
    before = calibrate(runs / "fold0")
    monkeypatch.setattr("medvisionllama.inference.slabs._SLAB_BYTES", 30_000)
    after = calibrate(runs / "fold0")
    assert after["num_voxels"] == before["num_voxels"]
    assert after["brier"] == pytest.approx(before["brier"], rel=1e-5)
    assert after["ece"] == pytest.approx(before["ece"], rel=1e-5)


def test_merged_classes_are_calibrated_as_one(phantoms, tmp_path):
    overrides = {**FAST, "data.labels": "foreground"}
    api.train(phantoms, out=tmp_path / "merged", epochs=1, overrides=overrides, test=False)
    facts = calibrate(tmp_path / "merged")
    cases = [scan["case_id"] for scan in facts["scans"]]
    probabilities, truth, _ = by_hand([tmp_path / "merged"], phantoms, cases)
    assert len(probabilities) == 2
    brier = ((probabilities - np.eye(2)[np.minimum(truth, 1)].T) ** 2).sum(axis=0).mean()
    assert facts["brier"] == pytest.approx(brier, abs=0.01)


def calibrate(run):
    api.evaluate(run, split="validation", calibration=True)
    return json.loads(RunDir(run).calibration.read_text())
