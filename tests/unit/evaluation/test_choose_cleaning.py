import nibabel as nib
import numpy as np
import pytest

from medvisionllama._files import file_sha256
from medvisionllama.config import InferenceConfig, load_config, write_config
from medvisionllama.data.planning import Plan
from medvisionllama.errors import ConfigError
from medvisionllama.evaluation.cleaning import check_choosable, choose_cleaning, clean_files
from medvisionllama.evaluation.masks import Pair
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.progress import Silent
from medvisionllama.run_dir import RunDir


def make_plan(*, merged=False):
    return Plan(
        channels=("CT",),
        classes={1: "liver", 2: "tumour"},
        merged=merged,
        resize=False,
        spacing_mm=(1.0, 1.0, 1.0),
        crop_size=(16, 16, 16),
        strides=((2, 2, 2), (4, 4, 4), (8, 8, 8)),
        flip_axes=(),
    )


@pytest.fixture
def run_dir(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.best.write_bytes(b"weights")
    write_config(load_config("small", {"train.members": 1}), run.config)
    return run


@pytest.fixture
def pairs(tmp_path, write_nifti):
    """A liver of 64 voxels and two tumours of 8 in both cases; in the first, a stray liver of 3 voxels."""
    made = []
    for name in ("a", "b"):
        truth = np.zeros((16, 16, 16), np.uint8)
        truth[1:5, 1:5, 1:5] = 1
        truth[8:10, 8:10, 8:10] = 2
        truth[12:14, 12:14, 12:14] = 2
        predicted = truth.copy()
        if name == "a":
            predicted[1, 1, 10:13] = 1
        label = write_nifti(tmp_path / "labels" / f"{name}.nii.gz", truth)
        mask = write_nifti(tmp_path / "masks" / f"{name}.nii.gz", predicted)
        made.append(Pair(name, name, mask, label))
    return made


def test_stray_components_go_where_true_ones_are_larger(run_dir, pairs):
    choice = choose_cleaning(run_dir, pairs, make_plan(), Silent())
    # Every labelled tumour has 8 voxels: half of it and a tenth are tried, and not the whole. The stray part, of
    # 0.003 ml, falls to the half.
    assert [one.min_component_ml for one in choice.candidates] == [0.0, 0.0008, 0.004, 0.0, 0.0, 0.0]
    before = (2 * 64 / (64 + 67) + 1) / 2  # liver of the first case, then of the second
    livers = [one.dice_per_class["liver"] for one in choice.candidates]
    assert livers == pytest.approx([before, before, 1, 1, 1, 1])
    # Of two equal tumours the largest component keeps one: 2 * 8 / (8 + 16). Both lie apart from the liver.
    tumours = [one.dice_per_class["tumour"] for one in choice.candidates]
    assert tumours == pytest.approx([1, 1, 1, 0, 2 / 3, 0])
    assert choice.candidates[0].dice == pytest.approx((before + 1) / 2)
    assert (choice.largest_component, choice.min_component_ml) == (False, 0.004)
    assert choice.num_cases == 2
    assert choice.weights_sha256 == file_sha256(run_dir.best)


def test_masks_without_stray_components_stay_as_they_are(run_dir, pairs):
    choice = choose_cleaning(run_dir, pairs[1:], make_plan(), Silent())
    assert (choice.largest_component, choice.min_component_ml) == (False, 0.0)


def test_merged_classes_are_compared_as_one(run_dir, tmp_path, write_nifti):
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[1:3, 1:3, 1:3], truth[3:5, 1:3, 1:3] = 1, 2
    predicted = (truth > 0).astype(np.uint8)
    predicted[7, 7, 7] = 1
    label = write_nifti(tmp_path / "label.nii.gz", truth)
    pair = Pair("a", "a", write_nifti(tmp_path / "mask.nii.gz", predicted), label)
    choice = choose_cleaning(run_dir, [pair], make_plan(merged=True), Silent())
    assert choice.candidates[0].dice_per_class == pytest.approx({"foreground": 2 * 16 / (16 + 17)})
    # The labelled foreground is one component of 16 voxels; a tenth of it is more than the stray voxel.
    assert choice.min_component_ml == 0.0016


def test_masks_are_cleaned_where_they_lie(run_dir, pairs):
    choice = choose_cleaning(run_dir, pairs, make_plan(), Silent())
    clean_files(pairs, choice)
    for pair in pairs:
        mask, truth = nib.load(pair.prediction), nib.load(pair.label)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(truth.dataobj))
        np.testing.assert_array_equal(mask.affine, truth.affine)


def test_masks_that_lose_nothing_are_not_written_again(pairs):
    before = [pair.prediction.stat() for pair in pairs]
    clean_files(pairs, Cleaning())
    after = [pair.prediction.stat() for pair in pairs]
    # A file that is written anew is another file of the same name.
    assert [(stat.st_ino, stat.st_mtime_ns) for stat in after] == [
        (stat.st_ino, stat.st_mtime_ns) for stat in before
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "test"}, "--split validation"),
        ({"num_runs": 2}, "--also"),
        ({"block_removed": True}, "--block-removed"),
        ({"settings": InferenceConfig(largest_component=True)}, "decides before"),
        ({"settings": InferenceConfig(min_component_ml=0.1)}, "decides before"),
    ],
)
def test_a_choice_that_would_be_unfair_or_without_effect_is_refused(run_dir, given, message):
    fair = {"split": "validation", "num_runs": 1, "block_removed": False, "settings": InferenceConfig()}
    check_choosable(run_dir, **fair)
    with pytest.raises(ConfigError, match=message):
        check_choosable(run_dir, **{**fair, **given})
