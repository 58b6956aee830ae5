"""Tables of measures: over whom they average, and whose classes they name."""

import json

import numpy as np
import pandas as pd
import pytest

from medvisionllama import api
from medvisionllama.errors import DataError
from medvisionllama.evaluation.evaluate import mean_dice, summarise


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
