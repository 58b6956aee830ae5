"""A label mirrored against its image is found by the image's edges, and only where they tell."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from medvisionllama import check
from medvisionllama.data.check.mirrors import label_mirror_findings

SHAPE = (20, 22, 24)


def phantom(number, *, symmetric=False):
    """Noise with a bright box on one side, or in the middle, and its label."""
    rng = np.random.default_rng(number)
    label = np.zeros(SHAPE, np.uint8)
    x, y, z = rng.integers(2, 4, 3)
    box = (slice(6, 14), slice(7, 15), slice(8, 16)) if symmetric else (slice(x, 9), slice(y, 8), slice(z, 9))
    label[box] = 1
    return rng.normal(100, 10, SHAPE) + 60 * label, label


def facts_of(case_facts, *, turned=None, num=12, axes=(0,), **options):
    cases = []
    for number in range(num):
        image, label = phantom(number, **options)
        cases.append(
            case_facts(f"c{number}", image=image, label=np.flip(label, axes) if number == turned else label)
        )
    return cases


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((0,), "mirrored left to right, the label"),
        ((1,), "mirrored back to front, the label"),
        ((2,), "mirrored down to up, the label"),
        ((0, 1), "mirrored left to right and back to front, the label"),
    ],
)
def test_the_one_mirrored_label_is_found_with_its_axes(case_facts, axes, words):
    (found,) = label_mirror_findings(facts_of(case_facts, turned=4, axes=axes))
    assert (found.code, found.severity, found.cases) == ("label-mirrored", "warning", ("c4",))
    assert words in found.message
    assert "labelsTr/c4.nii.gz" in found.message


def test_labels_as_they_should_be_raise_no_alarm(case_facts):
    assert label_mirror_findings(facts_of(case_facts)) == []


def test_symmetric_anatomy_and_few_cases_tell_nothing(case_facts):
    assert label_mirror_findings(facts_of(case_facts, turned=4, symmetric=True)) == []
    assert label_mirror_findings(facts_of(case_facts, turned=4, num=9)) == []


def test_labels_that_cannot_be_scored_are_left_out(case_facts):
    image, label = phantom(0)
    assert case_facts(image=image, label=np.zeros(SHAPE, np.uint8)).mirror_scores == ()
    assert case_facts(image=np.ones(SHAPE), label=label).mirror_scores == ()
    assert case_facts(image=image, label=label[:-1]).mirror_scores == ()
    assert case_facts(image=image, label=label * 0.5).mirror_scores == ()
    assert len(case_facts(image=np.stack([image, np.ones(SHAPE)]), label=label).mirror_scores) == 4


@pytest.mark.data
def test_one_mirrored_label_of_the_hippocampus_set_is_found(data_root, tmp_path):
    source = data_root / "Task04_Hippocampus"
    content = json.loads((source / "dataset.json").read_text())
    content["training"] = content["training"][:30]
    for entry in content["training"]:
        for path in entry.values():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / path, tmp_path / path)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert "label-mirrored" not in check(tmp_path).codes
    path = tmp_path / content["training"][7]["label"]
    label = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj)[::-1], label.affine, label.header), path)
    (found,) = [finding for finding in check(tmp_path).findings if finding.code == "label-mirrored"]
    assert found.file == path
