"""Tables of measures: over whom they average, and whose classes they name."""

import json
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from medvisionllama import api
from medvisionllama.data.volume import Volume
from medvisionllama.errors import ConfigError, DataError
from medvisionllama.evaluation import evaluate
from medvisionllama.evaluation.evaluate import evaluate_files, mean_dice, measure_classes, summarise
from medvisionllama.evaluation.masks import Pair, by_name
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.writers import write_mask


@pytest.fixture
def uneven():
    """One patient with twenty scans, five with one."""
    dice = [0.5] * 20 + [0.9] * 5
    names = {"case_id": [f"c{n}" for n in range(25)], "patient_id": ["p"] * 20 + [f"q{n}" for n in range(5)]}
    return pd.DataFrame({**names, "class": "liver", "dice": dice, "nsd": dice, "hd95_mm": 1.0, "empty": ""})


def test_a_patient_with_many_scans_counts_once_in_the_mean_and_in_its_interval(uneven):
    [row] = summarise(uneven).to_dict(orient="records")
    assert row["dice_mean"] == pytest.approx((0.5 + 5 * 0.9) / 6) == pytest.approx(mean_dice(uneven))
    assert row["dice_low"] <= row["dice_mean"] <= row["dice_high"]
    assert row["cases"] == 25


def test_classes_are_averaged_within_a_case_first():
    rows = [
        ("a", "p", "liver", 0.2),
        ("a", "p", "tumour", 0.4),
        ("b", "q", "liver", 0.9),
        ("b", "q", "tumour", 0.7),
    ]
    table = pd.DataFrame(rows, columns=["case_id", "patient_id", "class", "dice"])
    assert mean_dice(table) == pytest.approx((0.3 + 0.8) / 2)


@pytest.fixture
def masks(tmp_path, write_nifti):
    """`masks(array)`: the folders `masks` and `task/labels` with one case of these voxels."""

    def write(array):
        for folder in ("masks", "task/labels"):
            write_nifti(tmp_path / folder / "a.nii.gz", array, dtype=np.uint8)
        return tmp_path / "masks", tmp_path / "task" / "labels"

    return write


def test_hidden_files_are_no_masks(masks):
    predictions, _ = masks(np.ones((4, 4, 4)))
    for name in ("._a.dcm", ".partial-0123456789abcdef-a.dcm", "._a.nii.gz"):
        (predictions / name).write_bytes(b"left behind")
    assert by_name(predictions) == {"a": predictions / "a.nii.gz"}


@pytest.mark.parametrize("spoilt", ["masks", "labels"])
@pytest.mark.parametrize("value", [2, 255])
def test_a_value_that_is_no_class_is_refused_and_not_measured_as_background(
    masks, write_nifti, spoilt, value
):
    predictions, labels = masks(np.ones((4, 4, 4)))
    (labels.parent / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    assert set(api.evaluate(predictions, labels)["dice"]) == {1.0}
    folder = predictions if spoilt == "masks" else labels
    write_nifti(folder / "a.nii.gz", np.full((4, 4, 4), value), dtype=np.uint8)
    with pytest.raises(DataError, match=rf"{spoilt}/a.nii.gz holds the value {value}, .*1 liver"):
        api.evaluate(predictions, labels)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"1": "foreground", "2": "lesion"}, "called 'foreground'"),
        ({"1": "kidney", "2": "kidney"}, "values 1 and 2 are both called 'kidney'"),
        ({"a": 1, "ignore": 2}, "'ignore' is not supported"),
    ],
)
def test_classes_that_tables_could_not_tell_apart_are_refused(masks, names, message):
    predictions, labels = masks(np.ones((4, 4, 4)))
    (labels.parent / "dataset.json").write_text(json.dumps({"labels": names}))
    with pytest.raises(DataError, match=message):
        api.evaluate(predictions, labels)


def test_a_lone_class_may_be_called_foreground(masks):
    predictions, labels = masks(np.ones((4, 4, 4)))
    (labels.parent / "dataset.json").write_text(json.dumps({"labels": {"1": "foreground"}}))
    assert mean_dice(api.evaluate(predictions, labels)) == 1.0


def test_names_in_brackets_are_printed_as_they_are(uneven, capsys):
    from medvisionllama.cli._tables import print_summary

    print_summary(uneven.assign(**{"class": "tumour [/core]"}))
    assert "tumour [/core]" in capsys.readouterr().out


def test_regions_of_nnunet_are_refused(masks):
    predictions, labels = masks(np.ones((4, 4, 4)))
    regions = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3]}}
    (labels.parent / "dataset.json").write_text(json.dumps(regions))
    with pytest.raises(DataError, match="'whole' is a region of several values"):
        api.evaluate(predictions, labels)


def test_masks_of_nothing_that_nobody_named_are_refused(masks):
    with pytest.raises(DataError, match=r"all masks and labels are empty.*labels\.txt"):
        api.evaluate(*masks(np.zeros((4, 4, 4))))


@pytest.mark.parametrize("tolerance", [0.0, 5.0])
def test_the_table_says_the_tolerance(masks, tolerance):
    table = api.evaluate(*masks(np.pad(np.ones((2, 2, 2)), 1)), tolerance_mm=tolerance)
    assert set(table["tolerance_mm"]) == {tolerance}


@pytest.mark.parametrize("tolerance", [float("inf"), float("nan"), -1.0])
def test_a_tolerance_that_is_no_length_is_refused(masks, tolerance):
    with pytest.raises(ConfigError, match="must be 0 or more millimetres"):
        api.evaluate(*masks(np.ones((4, 4, 4))), tolerance_mm=tolerance)


@pytest.mark.parametrize("option", [{"split": "test"}, {"block_removed": True}])
def test_what_only_a_run_has_is_refused_for_masks(masks, option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))} needs a run folder"):
        api.evaluate(*masks(np.ones((4, 4, 4))), **option)


@pytest.mark.parametrize("option", [{"merged": True}, {"patient_pattern": "^(.)"}])
def test_what_a_run_has_of_its_own_is_refused(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is for masks and labels"):
        api.evaluate(tmp_path / "run", **option)


def test_patients_of_masks_are_found_by_a_pattern(tmp_path, write_nifti):
    for folder in ("masks", "labels"):
        for name in ("anna_x", "anna_y", "bert_x"):
            write_nifti(tmp_path / folder / f"{name}.nii.gz", np.ones((4, 4, 4)), dtype=np.uint8)
    table = api.evaluate(tmp_path / "masks", tmp_path / "labels", patient_pattern="^(.{4})")
    assert set(table["patient_id"]) == {"anna", "bert"}
    with pytest.raises(DataError, match="does not match"):
        api.evaluate(tmp_path / "masks", tmp_path / "labels", patient_pattern="^(c.*)")


def test_labels_that_trained_by_their_values_are_measured_by_them(tmp_path):
    # Slicer's own name for a segment that nobody named, beside one that is a class's.
    array, label = np.indices((4, 4, 4))[0].astype(np.uint8) // 2 + 1, tmp_path / "l" / "a.seg.nrrd"
    write_mask(label, array, np.eye(4), classes={1: "liver", 2: "Segment_2"})
    write_mask(tmp_path / "a.nii.gz", array, np.eye(4))
    pair, classes = Pair("a", "a", tmp_path / "a.nii.gz", label), {1: "liver", 2: "tumour"}
    with pytest.raises(DataError, match="Segment_2 is none of liver, tumour"):
        evaluate_files([pair], classes, tolerance_mm=1.0)
    trained = Pair("a", "a", tmp_path / "a.nii.gz", label, by_value=True)
    assert evaluate_files([trained], classes, tolerance_mm=1.0)["dice"].tolist() == [1.0, 1.0, 1.0]


def test_a_value_that_no_class_has_is_refused_unless_the_dataset_declares_none(tmp_path):
    for folder in ("p", "l"):
        (tmp_path / folder).mkdir()
    write_mask(tmp_path / "p" / "a.nii.gz", np.ones((4, 4, 4), np.uint8), np.eye(4))
    label = np.ones((4, 4, 4), np.uint8)
    label[0] = 255
    write_mask(tmp_path / "l" / "a.nii.gz", label, np.eye(4))
    pair = Pair("a", "a", tmp_path / "p" / "a.nii.gz", tmp_path / "l" / "a.nii.gz", by_value=True)
    with pytest.raises(DataError, match="holds the value 255, which is no class's"):
        evaluate_files([pair], {1: "liver"}, tolerance_mm=1.0)
    [score] = evaluate_files([replace(pair, declared=False)], {1: "liver"}, tolerance_mm=1.0)["dice"]
    assert score == pytest.approx(2 * 48 / (64 + 48))


def test_volumes_of_a_sheared_grid_are_true():
    affine = np.eye(4)
    affine[1, 2] = np.tan(np.radians(20))
    mask = Volume(np.ones((2, 3, 4), np.uint8), affine)
    [row] = measure_classes(mask, mask, {1: "organ"}, tolerance_mm=1.0)
    # Planes that are shifted along each other hold no more than before.
    assert row["volume_ml"] == row["predicted_ml"] == pytest.approx(24 / 1000)
    # So a component of 0.024 ml is smaller than 0.025 ml, though the product of the edges is larger.
    assert clean(mask, Cleaning(min_component_ml=0.0235)).array.all()
    assert not clean(mask, Cleaning(min_component_ml=0.025)).array.any()


def test_surfaces_of_a_sheared_grid_lie_where_they_do_in_the_patient():
    tilt = np.tan(np.radians(20))
    affine = np.eye(4)
    affine[1, 2] = tilt
    masks = np.zeros((3, 4, 5, 6), np.uint8)
    masks[0, 1, 1, 1] = masks[1, 1, 3, 4] = 1
    predicted, truth, empty = (Volume(mask, affine) for mask in masks)
    # Three slices further, the grid has itself moved along y.
    apart = np.hypot(2 + 3 * tilt, 3)
    for tolerance, share in ((apart + 0.01, 1), (apart - 0.01, 0)):
        [row] = measure_classes(predicted, truth, {1: "organ"}, tolerance_mm=tolerance)
        assert row["hd95_mm"] == pytest.approx(apart)
        assert row["nsd"] == share
    [row] = measure_classes(predicted, empty, {1: "organ"}, tolerance_mm=1.0)
    assert row["hd95_mm"] == pytest.approx(np.linalg.norm([4, 5 + 6 * tilt, 6])), "the longest diagonal"


def test_two_masks_are_held_at_a_time(monkeypatch):
    made, alive, measured = [], [], evaluate.measure

    def measure(predicted, truth, *arguments, **options):
        alive.append(sum(one() is not None for one in made))
        made.extend(weakref.ref(mask) for mask in (predicted, truth))
        return measured(predicted, truth, *arguments, **options)

    monkeypatch.setattr(evaluate, "measure", measure)
    mask = Volume(np.arange(27, dtype=np.uint8).reshape(3, 3, 3) % 4, np.eye(4))
    rows = list(measure_classes(mask, mask, {1: "a", 2: "b", 3: "c"}, tolerance_mm=1.0))
    assert [row["class"] for row in rows] == ["a", "b", "c", "foreground"]
    assert alive == [0, 0, 0, 0]
