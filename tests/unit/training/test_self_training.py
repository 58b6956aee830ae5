from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from medvisionllama.config import DataConfig, load_config
from medvisionllama.data.cache import CachedCase, build_cache
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import open_dataset
from medvisionllama.data.normalisation import fit_normalisation
from medvisionllama.data.places import Place, Places
from medvisionllama.data.planning import make_plan
from medvisionllama.run_dir import RunDir
from medvisionllama.training.self_training import Pieces, SelfTraining, find_pieces, keep_pieces


def labelled(array):
    return SimpleNamespace(label=array)


def bar(*lengths, value=1):
    """Pieces of these lengths along the first axis, a voxel apart."""
    mask = np.zeros((40, 2, 2), np.uint8)
    start = 0
    for length in lengths:
        mask[start : start + length] = value
        start += length + 1
    return mask


def test_a_class_is_one_piece_if_it_is_in_every_case():
    whole, parted = bar(10), bar(5, 5)
    assert find_pieces([labelled(whole), labelled(whole)]).classes == {1}
    assert find_pieces([labelled(whole), labelled(parted)]).classes == set()
    assert find_pieces([labelled(parted), labelled(whole)]).classes == set()


def test_specks_do_not_part_a_class_and_absence_says_nothing():
    assert find_pieces([labelled(bar(30, 1)), labelled(np.zeros((40, 2, 2), np.uint8))]).classes == {1}
    assert find_pieces([labelled(bar(30, 2))]).classes == set()


def test_classes_that_touch_are_one_piece_together():
    touching = np.concatenate([bar(9), bar(9, value=2)], axis=1)
    assert find_pieces([labelled(touching)]) == Pieces(foreground=True, classes=frozenset({1, 2}))
    crossed = np.concatenate([bar(9, 9), bar(9, 9, value=2)[::-1]], axis=1)
    assert find_pieces([labelled(touching), labelled(crossed)]).foreground is False
    assert find_pieces([]) == Pieces(foreground=False, classes=frozenset())


def test_merged_masks_are_not_cut_to_the_piece_that_one_class_makes():
    # Two organs, each in one piece: as one foreground they are two.
    organs = np.concatenate([bar(12), bar(20, value=2)])
    pieces = find_pieces([labelled(organs)], merged=True)
    assert pieces == Pieces(foreground=False, classes=frozenset())
    merged = (organs > 0).astype(np.uint8)
    assert np.array_equal(keep_pieces(merged, pieces), merged)


def test_pieces_are_kept_of_those_classes_alone():
    mask = np.concatenate([bar(9, 3), bar(9, 3, value=2)], axis=1)
    kept = keep_pieces(mask, Pieces(foreground=False, classes=frozenset({1})))
    assert np.array_equal(kept[:, :2], bar(9))
    assert np.array_equal(kept[:, 2:], bar(9, 3, value=2))
    assert np.array_equal(keep_pieces(mask, Pieces(foreground=False, classes=frozenset())), mask)


def test_what_lies_apart_from_all_else_goes_first():
    # The second class's largest piece lies far from the first class.
    mask = np.concatenate([bar(20), bar(3, value=2)], axis=1)
    mask[24:34, 2:] = 2
    kept = keep_pieces(mask, Pieces(foreground=True, classes=frozenset({1, 2})))
    assert np.array_equal(kept, np.concatenate([bar(20), bar(3, value=2)], axis=1))


def test_of_two_pieces_the_one_where_labels_lie_is_kept():
    mask = bar(9, 12)
    place = Place(mean_mm=(-15.5, 0.0, 0.0), std_mm=(2.0, 1.0, 1.0))
    one = Pieces(foreground=True, classes=frozenset({1}))
    kept = keep_pieces(mask, one, (1.0, 1.0, 1.0), Places(foreground=place, classes={1: place}))
    assert kept.sum() == bar(9).sum()
    assert keep_pieces(mask, one).sum() == bar(12).sum()


@pytest.fixture
def parts(dataset_folder, tmp_path):
    """Six phantoms: the last three without their labels."""
    dataset = open_dataset(dataset_folder(values=(2, 5)))
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=True, patch_size=None)
    cases = build_cache(dataset.cases, plan, folder=tmp_path / "cache")
    plan = plan.with_normalisation(fit_normalisation(cases, plan.channel_rules), len(cases))
    # One window shows a whole scan.
    plan = plan.model_copy(update={"crop_size": (32, 32, 32)})
    bare = [CachedCase(case.case_id, case.patient_id, case.folder, case.facts) for case in cases[3:]]
    return plan, cases[:3], bare


def made(parts, tmp_path, **changes):
    plan, known, bare = parts
    config = load_config("small", {"unlabelled.scans": "unused", **changes})
    return SelfTraining(known, bare, plan, config, RunDir(tmp_path / "run"), Accelerator(cpu=True))


class Constant(torch.nn.Module):
    """Finds the first class in a block of 64 voxels, and in one voxel apart from it."""

    def forward(self, image):
        logits = torch.zeros(len(image), 3, *image.shape[2:])
        logits[:, 0] = 1
        logits[:, 1, 12:16, 12:16, 12:16] = 9
        logits[:, 1, 20, 20, 20] = 9
        return logits


@pytest.mark.parametrize(("progress", "due"), [(0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.99, 3), (1, 3)])
def test_rounds_are_spread_evenly(parts, tmp_path, progress, due):
    assert made(parts, tmp_path).due(progress) == due


def test_without_scans_no_round_is_ever_due(parts, tmp_path):
    plan, known, _ = parts
    assert made((plan, known, []), tmp_path).due(1) == 0


def test_scans_get_the_network_s_masks_and_keep_their_images(parts, tmp_path):
    training = made(parts, tmp_path, **{"inference.flip": False})
    training.pieces = Pieces(foreground=False, classes=frozenset({2}))
    given = training.give_masks(Constant(), 1)
    assert [case.case_id for case in given] == [case.case_id for case in parts[2]]
    for case, bare in zip(given, parts[2], strict=True):
        assert np.array_equal(case.image, bare.image)
        assert case.label.shape == bare.image.shape[1:]
        # The class of label value 2, without the voxel that lies apart.
        assert set(np.unique(case.label)) == {0, 2}
        assert (case.label == 2).sum() == 64
        assert (case.centres[:, 0] == 2).all()
        assert (case.label[tuple(case.centres[:, 1:].T)] == 2).all()


def test_two_looks_are_averaged_in_full_precision(parts, tmp_path, monkeypatch):
    plan, known, bare = parts
    training = made((plan.model_copy(update={"flip_axes": (0,)}), known, bare), tmp_path)
    monkeypatch.setattr(training.accelerator, "autocast", partial(torch.autocast, "cpu", torch.bfloat16))

    class Barely(torch.nn.Module):
        """Finds the first class everywhere, by less than bf16 can tell."""

        def forward(self, image):
            logits = torch.full((len(image), 3, *image.shape[2:]), -20.0)
            logits[:, 0], logits[:, 1] = 0.0, 0.002
            return logits

    (first, *_) = training.give_masks(Barely(), 1)
    assert set(np.unique(first.label)) == {2}


def test_a_merged_mask_holds_label_values_that_need_two_bytes(parts, tmp_path):
    plan, known, bare = parts
    merged = plan.model_copy(update={"merged": True, "classes": {700: "left", 701: "right"}})
    training = made((merged, known, bare), tmp_path)

    class Everywhere(torch.nn.Module):
        def forward(self, image):
            return torch.ones(len(image), 1, *image.shape[2:])

    (first, *_) = training.give_masks(Everywhere(), 1)
    assert set(np.unique(first.label)) == {700}


@pytest.mark.parametrize("limit", [{"patience_seconds": 0.0}, {"interrupted": lambda: True}])
def test_a_round_ends_when_its_time_is_over(parts, tmp_path, limit):
    training = made(parts, tmp_path)
    found = [training.give_masks(Constant(), number, **limit) for number in range(1, 9)]
    assert [len(cases) for cases in found] == [1] * 8
    # The rest gets its turn in other rounds.
    assert {cases[0].case_id for cases in found} == {case.case_id for case in parts[2]}
    assert len(made(parts, tmp_path).masks_of(1)) == 1


def test_many_scans_take_turns(parts, tmp_path):
    training = made(parts, tmp_path, **{"unlabelled.per_round": 1})
    rounds = [training.chosen(number) for number in range(20)]
    assert all(len(cases) == 1 for cases in rounds)
    assert {cases[0].case_id for cases in rounds} == {case.case_id for case in parts[2]}
    assert rounds == [
        made(parts, tmp_path, **{"unlabelled.per_round": 1}).chosen(number) for number in range(20)
    ]
    assert [case.case_id for case in training.give_masks(Constant(), 5)] == [rounds[5][0].case_id]


def test_masks_of_a_round_are_found_again_and_forgotten(parts, tmp_path):
    training = made(parts, tmp_path)
    assert training.masks_of(0) == []
    training.give_masks(Constant(), 2)
    again = made(parts, tmp_path).masks_of(2)
    assert (np.asarray(again[0].label) > 0).any()
    training.forget(2)
    with pytest.raises(FileNotFoundError):
        _ = again[0].label
