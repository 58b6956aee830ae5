import json

import numpy as np
import pytest

from medvisionllama._files import file_sha256
from medvisionllama.config import InferenceConfig, load_config, write_config
from medvisionllama.errors import CheckpointError
from medvisionllama.inference.cleaning import (
    MARGIN,
    Cleaning,
    cleaning_of,
    make_candidates,
    make_choice,
    pick,
    read_choice,
    write_choice,
)
from medvisionllama.inference.postprocess import component_volumes_ml
from medvisionllama.run_dir import RunDir


def one_case(*rows):
    """Scores of candidates that were tried on one case: a row of classes each."""
    return np.array(rows)[:, None, :]


def test_the_best_candidate_is_taken():
    assert pick(one_case([0.80, 0.80], [0.81, 0.80], [0.85, 0.81])) == 2


def test_a_gain_within_the_margin_removes_nothing():
    assert pick(one_case([0.80, 0.80], [0.803, 0.80])) == 0  # gains 0.0015
    assert pick(one_case([0.80, 0.80], [0.805, 0.80])) == 1  # gains 0.0025
    assert MARGIN == 0.002


def test_a_candidate_that_harms_a_class_is_out_however_much_it_gains():
    assert pick(one_case([0.80, 0.80], [0.95, 0.79], [0.82, 0.80])) == 2
    assert pick(one_case([0.80, 0.80], [0.95, 0.79])) == 0
    assert pick(one_case([0.80, 0.80], [0.95, 0.797])) == 0
    assert pick(one_case([0.80, 0.80], [0.95, 0.799])) == 1


def test_harm_in_one_case_is_outweighed_by_gain_in_another():
    dice = np.array([[[0.8], [0.6]], [[0.7], [0.9]]])  # means 0.7 and 0.8
    assert pick(dice) == 1


def test_of_equals_the_mildest_is_taken():
    assert pick(one_case([0.5], [0.7], [0.7])) == 1


def test_candidates_come_from_the_labelled_components_the_mildest_first():
    # The smallest component is 0.02 ml, the smallest main one 1.5 ml (class 2 of the second case).
    volumes = [{1: [3.0, 0.02]}, {1: [2.0], 2: [1.5, 0.4]}, {}]
    limits = [0.01, 0.02, 0.15, 0.75]
    assert make_candidates(volumes) == [
        Cleaning(),
        *(Cleaning(min_component_ml=limit) for limit in limits),
        Cleaning(largest_foreground=True),
        Cleaning(largest_component=True),
        Cleaning(largest_foreground=True, largest_component=True),
    ]


def test_limits_are_rounded_down_so_that_the_smallest_component_stays():
    limits = [one.min_component_ml for one in make_candidates([{1: [1.23999, 0.0123999]}])]
    assert limits == [0.0, 0.00619, 0.0123, 0.123, 0.619, 0.0, 0.0, 0.0]


def test_no_limit_is_near_an_organ():
    limits = [one.min_component_ml for one in make_candidates([{1: [30.0], 2: [50.0, 20.0]}])]
    assert limits == [0.0, 3.0, 10.0, 15.0, 0.0, 0.0, 0.0]


def test_without_any_label_only_the_largest_component_is_tried():
    assert [candidate.min_component_ml for candidate in make_candidates([{}, {}])] == [0.0] * 4


def test_components_of_a_label_are_measured_in_millilitres():
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[0:2, 0:2, 0:2] = 1
    mask[5, 5, 5:7] = 1
    mask[6, 6, 7] = 1  # joined to the two before by a corner
    mask[0, 7, 7] = 3
    assert component_volumes_ml(mask, voxel_ml=0.01) == {
        1: pytest.approx([0.08, 0.03]),
        3: pytest.approx([0.01]),
    }


@pytest.fixture
def run_dir(tmp_path):
    run = RunDir(tmp_path)
    run.best.write_bytes(b"weights")
    write_config(load_config("small", {"train.members": 1}), run.config)
    return run


@pytest.fixture
def choice(run_dir):
    dice = np.array([[[0.5, 0.7], [0.7, 0.9]], [[0.6, 0.7], [0.8, 0.9]]])
    candidates = [Cleaning(), Cleaning(min_component_ml=0.25)]
    made = make_choice(candidates, dice, ["a", "b"], weights_sha256=file_sha256(run_dir.best))
    write_choice(run_dir, made)
    return made


def test_the_file_says_what_was_chosen_and_what_every_candidate_scored(run_dir, choice):
    written = json.loads(run_dir.postprocessing.read_text())
    assert written["min_component_ml"] == 0.25
    assert written["largest_component"] is False
    assert written["chosen_on"] == "validation"
    assert written["num_cases"] == 2
    assert [one["dice"] for one in written["candidates"]] == pytest.approx([0.7, 0.75])
    assert written["candidates"][1]["dice_per_class"] == pytest.approx({"a": 0.7, "b": 0.8})
    assert read_choice(run_dir) == choice


def test_a_choice_is_used_and_said(run_dir, choice):
    cleaning, line = cleaning_of(run_dir, InferenceConfig())
    assert cleaning == Cleaning(min_component_ml=0.25)
    assert "components smaller than 0.25 ml are removed" in line
    assert "2 validation cases" in line
    assert str(run_dir.postprocessing) in line
    assert "first run's choice" in cleaning_of(run_dir, InferenceConfig(), num_runs=2)[1]


@pytest.mark.parametrize(
    ("settings", "asked", "expected"),
    [
        ({}, {"largest": False}, {}),
        ({"min_component_ml": 2.0, "largest_foreground": True}, {"largest": False}, {}),
        ({"min_component_ml": 2.0}, {"largest": False, "min_ml": 3.0}, {"min_component_ml": 3.0}),
        ({}, {"largest": True}, {"largest_component": True}),
        ({}, {"min_ml": 0.0}, {}),
        ({"min_component_ml": 2.0}, {"largest": True}, {"min_component_ml": 2.0, "largest_component": True}),
        ({"largest_component": True}, {}, {"largest_component": True}),
        ({"min_component_ml": 2.0}, {}, {"min_component_ml": 2.0}),
    ],
)
def test_the_user_and_the_run_s_settings_come_before_the_choice(run_dir, choice, settings, asked, expected):
    found, line = cleaning_of(run_dir, InferenceConfig(**settings), **asked)
    assert found == Cleaning(**expected)
    # What the user asks for needs no line; what a setting of long ago does, does.
    assert ("the run's own settings" in line) == (not asked)


def test_the_run_s_own_settings_are_said_whole(run_dir):
    own = InferenceConfig(largest_component=True, min_component_ml=2.0)
    _, line = cleaning_of(run_dir, own)
    assert "the largest component of each class alone is kept" in line
    assert "smaller than 2 ml are removed" in line


def test_without_a_choice_nothing_changes(run_dir):
    assert cleaning_of(run_dir, InferenceConfig()) == (Cleaning(), "")


def test_a_choice_made_with_other_weights_is_not_used(run_dir, choice):
    run_dir.best.write_bytes(b"trained further")
    cleaning, line = cleaning_of(run_dir, InferenceConfig())
    assert cleaning == Cleaning()
    assert "other weights" in line


@pytest.mark.parametrize("content", ["", "[]", "{", '{"largest_component": true}'])
def test_a_damaged_choice_is_named(run_dir, content):
    run_dir.postprocessing.write_text(content)
    with pytest.raises(CheckpointError, match=r"postprocessing\.json is damaged") as error:
        cleaning_of(run_dir, InferenceConfig())
    assert "\n" not in str(error.value)
