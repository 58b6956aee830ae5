"""What preparing says of the scans that train, before a step is made."""

import json

import nibabel as nib
import numpy as np
import pytest

from medvisionllama.config import load_config
from medvisionllama.data.splits import extend_splits, read_splits, select, undivided, write_splits
from medvisionllama.errors import DataError
from medvisionllama.training.prepare import prepare_data


class Lines(list):
    """Progress that keeps what is said."""

    say = list.append

    def track(self, *_):
        from medvisionllama.progress import Silent

        return Silent().track("", 0)


def said(root, **settings):
    lines = Lines()
    prepared = prepare_data(load_config("small", {"data.path": root, **settings}), drawn=None, progress=lines)
    return prepared, " ".join(line for line in lines if line.startswith("look at this"))


def below_water(root, *, air, number=None):
    """Shift the scans' intensities (of the first `number`), so that they begin at `air`."""
    for path in sorted((root / "imagesTr").iterdir())[:number]:
        scan = nib.load(path)
        voxels = scan.get_fdata(dtype=np.float32) * 10
        nib.save(nib.Nifti1Image(voxels - voxels.min() + np.float32(air), scan.affine), path)


def test_values_of_ct_under_another_name_are_pointed_out(dataset_folder):
    root = dataset_folder(channels=("scan",))
    below_water(root, air=-1024)
    prepared, words = said(root)
    assert prepared.plan.channel_rules == ("image",)
    assert "the channel scan reaches down to -900 and below in most training scans, as CT does" in words
    assert "stop and give --set data.modality=CT" in words
    told, words = said(root, **{"data.modality": ["CT"]})
    assert told.plan.channel_rules == ("dataset",)
    assert "as CT does" not in words
    assert "as CT does" not in said(root, **{"data.normalisation": ["image"]})[1]
    assert "as CT does" in said(root, **{"data.normalisation": ["auto"]})[1]


def test_a_channel_of_ct_among_others_is_named(dataset_folder):
    root = dataset_folder(channels=("one scan", "another"))
    for path in (root / "imagesTr").iterdir():
        scan = nib.load(path)
        voxels = scan.get_fdata(dtype=np.float32)
        voxels[..., 1] -= 1100
        voxels[..., 1] *= 2
        voxels[0, 0, 0, 1] = 300
        nib.save(nib.Nifti1Image(voxels, scan.affine), path)
    words = said(root)[1]
    assert "the channel another reaches down" in words
    assert "--set 'data.modality=one scan,CT'" in words


@pytest.mark.parametrize(("air", "number"), [(0, None), (-200, None), (-1024, 1), (-9000, None)])
def test_others_are_not_taken_for_ct(dataset_folder, air, number):
    root = dataset_folder(channels=("scan",))
    below_water(root, air=air, number=number)
    assert "as CT does" not in said(root)[1]


def test_a_class_that_no_training_case_has_is_named(dataset_folder):
    root = dataset_folder()
    prepared, words = said(root)
    assert "no training case has" not in words
    for case_id in prepared.selection.train:
        path = root / "labelsTr" / f"{case_id}.nii.gz"
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.minimum(label.get_fdata(), 1).astype(np.uint8), label.affine), path)
    words = said(root)[1]
    assert "no training case has 'Posterior', so the network cannot learn it; train on more cases" in words
    assert "no training case has" not in said(root, **{"data.labels": "foreground"})[1]


def test_a_class_that_is_too_thin_for_the_grid_is_named(dataset_folder):
    root = dataset_folder()
    for path in (root / "labelsTr").iterdir():
        label = nib.load(path)
        voxels = label.get_fdata().astype(np.uint8)
        voxels[:] = 0
        voxels[2:18, 6:20, 2:16] = 1
        voxels[::3, 1:4, 3] = 2  # a line of three voxels here and there
        nib.save(nib.Nifti1Image(voxels, label.affine), path)
    words = said(root, **{"data.spacing_mm": [2, 2, 2]})[1]
    assert "at the run's voxels of 2×2×2 mm true masks themselves keep a Dice of 'Posterior' 0." in words
    assert "'Anterior'" not in words
    assert "--set data.spacing_mm=1,1,1 has the finest voxels of these scans" in words
    assert "true masks themselves" not in said(root)[1]
    assert "true masks" not in said(root, **{"data.spacing_mm": [2, 2, 2], "data.labels": "foreground"})[1]


@pytest.mark.parametrize("num_cases", [1, 2])
def test_one_labelled_patient_can_train_where_nobody_is_left_out(dataset_folder, tmp_path, num_cases):
    root = dataset_folder(num_cases=num_cases, frames=2)
    with pytest.raises(DataError, match=rf"at least 3 patients .* found {num_cases}; .* \(--fold all\)"):
        said(root)
    prepared, _ = said(root, **{"data.fold": "all"})
    assert len(prepared.train) == 2 * num_cases
    assert prepared.validation == ()
    # As a run that goes on reads them.
    write_splits(prepared.splits, tmp_path / "splits.json")
    again = prepare_data(
        load_config("small", {"data.path": root, "data.fold": "all"}),
        drawn=tmp_path / "splits.json",
        begun=True,
        progress=Lines(),
    )
    assert again.hashes == prepared.hashes


def test_a_division_of_nobody_has_no_fold_to_score(tmp_path):
    patients = {"a_1": "a", "a_2": "a", "b_1": "b"}
    splits = undivided(patients, seed=3)
    write_splits(splits, tmp_path / "splits.json")
    assert read_splits(tmp_path / "splits.json") == splits
    assert json.loads((tmp_path / "splits.json").read_text())["test"] == []
    with pytest.raises(DataError, match="no patient of the validation part"):
        select(splits, patients, fold=0)


def test_patients_who_come_later_divide_what_could_not_be_divided():
    first = {"a_1": "a", "b_1": "b"}
    patients = first | {f"{name}_1": name for name in "cdefghijkl"}
    splits = extend_splits(undivided(first), patients)
    chosen = [select(splits, patients, fold=number) for number in range(5)]
    assert {len(one.test) for one in chosen} == {1}
    assert sorted(len(one.validation) for one in chosen) == [1, 2, 2, 2, 2]
    # Those of before trained already, so they test nobody's run that begins with theirs.
    assert all({"a_1", "b_1"} <= set(one.train) for one in chosen)
    assert {len(one.train) + len(one.validation) for one in chosen} == {11}
    # No more folds than patients to validate.
    few = extend_splits(undivided(first), first | {f"{name}_1": name for name in "cdef"})
    assert [len(fold.validation) for fold in few.folds] == [1, 1, 1]


def test_values_without_names_that_only_some_labels_hold_are_pointed_out(dataset_folder):
    root = dataset_folder()
    (root / "dataset.json").unlink()
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    assert "not all labels have the values" not in said(root)[1]
    path = min((root / "labels").iterdir())
    label = nib.load(path)
    voxels = label.get_fdata().astype(np.uint8)
    voxels[voxels == 2] = 7
    nib.save(nib.Nifti1Image(voxels, label.affine), path)
    words = said(root, **{"data.fold": "all"})[1]
    assert "not all labels have the values 2 (1 lack it), 7 (5 lack it)" in words
