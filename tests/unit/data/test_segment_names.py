"""Names that 3D Slicer writes into labels: taken where they agree, refused where classes are exchanged."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from medvisionllama import check
from medvisionllama.data.formats.itk import segment_names
from medvisionllama.data.index import open_dataset
from medvisionllama.errors import DataError

SHAPE = (6, 7, 8)


def write_label(path, names, *, layers=1, seed=0, fields=("Name", "LabelValue")):
    """A label with a box for each value of `names`, its header as Slicer has it."""
    array = np.zeros(SHAPE[::-1], np.uint8)
    for value in names:
        array[1 : 3 + seed % 4, 1 + seed % 3 : 5, (value % 3) * 2 : (value % 3) * 2 + 2] = value
    image = sitk.GetImageFromArray(
        np.stack([array] * layers, -1) if layers > 1 else array, isVector=layers > 1
    )
    for number, (value, name) in enumerate(names.items()):
        for field, content in zip(fields, (name, str(value)), strict=False):
            image.SetMetaData(f"Segment{number}_{field}", content)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def slicer(tmp_path, write_nifti):
    """`slicer(names, names, ...)`: a case for each, labelled in Slicer; None for a label without names."""

    def make(*cases, classes=None):
        root = tmp_path / "task"
        for number, names in enumerate(cases):
            image = np.random.default_rng(number).normal(100, 10, SHAPE).astype(np.float32)
            write_nifti(root / "images" / f"p{number}.nii.gz", image, np.diag([-1.0, -1, 1, 1]))
            if names is None:
                label = np.zeros(SHAPE, np.uint8)
                label[1:4, 1:4, 1:4] = 1
                write_nifti(root / "labels" / f"p{number}.nii.gz", label, np.diag([-1.0, -1, 1, 1]))
            else:
                write_label(root / "labels" / f"p{number}.seg.nrrd", names, seed=number)
        if classes is not None:
            (root / "names.json").write_text(json.dumps({"classes": classes}))
        return root

    return make


def refusal(root, **arguments):
    with pytest.raises(DataError) as caught:
        open_dataset(root, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_and_values_are_read_from_the_header(tmp_path):
    path = write_label(tmp_path / "a.seg.nrrd", {2: " Left  lung ", 1: "heart\x1b[31m"})
    assert segment_names(path) == {1: "heart[31m", 2: "Left lung"}
    assert segment_names(write_label(tmp_path / "b.seg.nrrd", {1: "a"}, fields=("Name",))) == {}
    assert segment_names(write_label(tmp_path / "c.seg.nrrd", {1: "a", 2: "b"}, layers=2)) == {}
    plain = sitk.GetImageFromArray(np.zeros(SHAPE, np.uint8))
    plain.SetMetaData("Segment0_Name", "a")
    plain.SetMetaData("Segment0_LabelValue", "one")
    sitk.WriteImage(plain, str(tmp_path / "d.nrrd"))
    assert segment_names(tmp_path / "d.nrrd") == {}


def test_names_that_agree_are_the_classes(slicer):
    root = slicer({1: "Liver", 2: "Spleen"}, {1: "liver "}, {2: "spleen", 5: "Kidney"}, None)
    dataset = open_dataset(root)
    assert dataset.classes == {1: "Liver", 2: "Spleen", 5: "Kidney"}
    assert check(root).ok


def test_exchanged_classes_are_an_error_and_train_refuses(slicer):
    usual = {1: "liver", 2: "spleen"}
    root = slicer(usual, usual, {1: "spleen", 2: "liver"}, usual, {2: "liver", 1: "spleen"})
    (found,) = check(root).of("error")
    assert (found.code, found.cases) == ("segment-names", ("p2", "p4"))
    assert "labels/p2.seg.nrrd: the value 1 is 'spleen', in p0.seg.nrrd it is 'liver'" in found.message
    assert "(1 more label like it)" in found.message
    assert "names.json" in found.message
    assert found.message in refusal(root)


def test_a_label_that_lacks_the_first_class_numbers_the_others_anew(slicer):
    usual = {1: "liver", 2: "spleen", 3: "kidney"}
    root = slicer(usual, usual, usual, {1: "spleen", 2: "kidney"})
    assert "p3.seg.nrrd: the value 1 is 'spleen', in p0.seg.nrrd it is 'liver'" in refusal(root)


def test_one_name_at_two_values_is_an_error(slicer):
    root = slicer({1: "liver"}, {1: "liver"}, {2: "Liver"})
    assert "p2.seg.nrrd: 'Liver' has the value 2, in p0.seg.nrrd it has 1" in refusal(root)


def test_leaving_the_case_out_helps(slicer):
    root = slicer({1: "liver"}, {1: "liver"}, {1: "spleen"})
    assert open_dataset(root, exclude=["p2"]).classes == {1: "liver"}


def test_declared_classes_come_first_and_may_not_be_contradicted(slicer):
    root = slicer(
        {1: "LIVER", 2: "Milz"},
        {1: "liver", 2: "spleen"},
        {1: "liver"},
        classes={"1": "Liver", "2": "Spleen"},
    )
    assert open_dataset(root).classes == {1: "Liver", 2: "Spleen"}
    assert check(root).ok
    root = slicer(
        {1: "liver"}, {1: "spleen", 2: "liver"}, {2: "spleen"}, classes={"1": "Liver", "2": "Spleen"}
    )
    (found,) = check(root).of("error")
    assert found.code == "segment-names"
    assert "p1.seg.nrrd: 'spleen' has the value 1, names.json gives it 2" in found.message
    assert found.message in refusal(root)


def test_segments_are_compared_where_classes_are_declared_in_other_words(slicer):
    usual, exchanged = {1: "Leber", 2: "Milz"}, {1: "Milz", 2: "leber"}
    root = slicer(usual, exchanged, usual, {1: "foie"}, classes={"1": "liver", "2": "spleen"})
    (found,) = [finding for finding in check(root).findings if finding.code.startswith("segment")]
    assert (found.code, found.severity, found.cases) == ("segment-values", "warning", ("p1",))
    assert "p1.seg.nrrd: 'Milz' has the value 1, in p0.seg.nrrd it has 2" in found.message
    assert "names.json" in found.message
    assert open_dataset(root).classes == {1: "liver", 2: "spleen"}


def test_overlapping_segments_are_explained_once(slicer):
    root = slicer({1: "a"}, {1: "a"}, {1: "a"})
    write_label(root / "labels" / "p1.seg.nrrd", {1: "a", 2: "b"}, layers=2)
    (found,) = check(root).of("error")
    assert (found.code, found.cases) == ("label-channels", ("p1",))
    assert "2 layers" in found.message
    assert "overlapping segments" in found.message
    assert "export to labelmap" in found.message
    assert "overlapping segments" in refusal(root)


def test_a_damaged_label_is_reported_as_such(slicer):
    root = slicer({1: "a"}, {1: "a"}, {1: "a"})
    (root / "labels" / "p1.seg.nrrd").write_bytes(b"NRRD0004\n")
    (found,) = check(root).of("error")
    assert found.code == "unreadable"
