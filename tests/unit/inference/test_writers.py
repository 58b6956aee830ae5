"""Masks and maps come back as they were written, in the place they were written for."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medvisionllama.data.readers import read_image, read_label
from medvisionllama.errors import DataError
from medvisionllama.inference.writers import label_table, read_label_table, write_mask, write_shares

MASK = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
OBLIQUE = np.array(
    [
        [1.5 * np.cos(0.3), 0, 7 * np.sin(0.3), 10],
        [0, -2, 0, 20],
        [-1.5 * np.sin(0.3), 0, 7 * np.cos(0.3), -30],
        [0, 0, 0, 1],
    ]
)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha"])
def test_every_format_keeps_values_and_place(tmp_path, ending):
    path = tmp_path / f"mask{ending}"
    write_mask(path, MASK, OBLIQUE, classes={1: "left", 2: "right"})
    volume = read_label(path)
    np.testing.assert_array_equal(volume.array, MASK)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-5)
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("degrees", [0.0, 0.005, 0.09])
def test_itk_reads_what_lies_on_a_slightly_sheared_grid(tmp_path, degrees):
    """Rounded positions in DICOM leave such a shear, and ITK refuses it in an sform."""
    affine = OBLIQUE.copy()
    affine[:3, 2] += np.tan(np.radians(degrees)) * affine[:3, 0]
    write_mask(tmp_path / "mask.nii.gz", MASK, affine)
    image = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    lps = np.diag([-1, -1, 1])
    for corner in ((0, 0, 0), (3, 4, 5)):
        place = lps @ image.TransformIndexToPhysicalPoint(corner)
        np.testing.assert_allclose(place, (affine @ [*corner, 1])[:3], atol=0.05)
    np.testing.assert_allclose(read_label(tmp_path / "mask.nii.gz").affine, affine, atol=1e-5)


def test_large_values_take_two_bytes(tmp_path):
    write_mask(tmp_path / "a.seg.nrrd", MASK.astype(np.uint16) * 300, OBLIQUE)
    assert read_label(tmp_path / "a.seg.nrrd").array.max() == 600


def test_slicer_finds_names_and_colours(tmp_path):
    write_mask(tmp_path / "a.seg.nrrd", MASK, OBLIQUE, classes={1: "left ventricle", 7: "x"})
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    assert image.GetMetaData("Segment0_Name") == "left ventricle"
    assert image.GetMetaData("Segment1_LabelValue") == "7"
    assert [round(255 * float(part)) for part in image.GetMetaData("Segment0_Color").split()] == [230, 159, 0]


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(DataError, match="masks are written as"):
        write_mask(tmp_path / "a.png", MASK, OBLIQUE)
    assert not list(tmp_path.iterdir())


def test_a_nifti_mask_has_its_scan_s_header(tmp_path):
    scan = nib.Nifti1Image(np.zeros(MASK.shape, np.int16), OBLIQUE)
    scan.set_sform(OBLIQUE, code=2)
    scan.set_qform(OBLIQUE, code=1)
    nib.save(scan, tmp_path / "scan.nii.gz")
    write_mask(tmp_path / "mask.nii.gz", MASK, OBLIQUE, like=tmp_path / "scan.nii.gz")
    header = nib.load(tmp_path / "mask.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 1)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (3, 4, 5, 6)])
def test_shares_are_read_as_numbers_from_0_to_1(tmp_path, ending, shape):
    shares = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    shares.flat[:2] = 0, 255
    write_shares(tmp_path / f"a{ending}", shares, OBLIQUE)
    volume = read_image((tmp_path / f"a{ending}",))
    np.testing.assert_allclose(volume.array.reshape(shape), shares / 255, atol=1e-6)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-5)
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"a{ending}")))
    assert itk.max() == pytest.approx(1.0)


@pytest.mark.parametrize("write", [write_mask, write_shares])
def test_an_axis_longer_than_nifti_1_can_count_is_written_as_nifti_2(tmp_path, write):
    array = np.zeros((40_000, 2, 3), np.uint8)
    array[39_999, 1, 2] = 1
    write(tmp_path / "a.nii.gz", array, OBLIQUE)
    image = nib.load(tmp_path / "a.nii.gz")
    assert isinstance(image, nib.Nifti2Image)
    assert np.asarray(image.dataobj)[39_999, 1, 2] == pytest.approx(1 if write is write_mask else 1 / 255)
    np.testing.assert_allclose(image.affine, OBLIQUE)


def test_the_label_table_has_a_row_for_each_class():
    rows = label_table({1: 'a "b"\nc', 9: "tumour"}).splitlines()
    assert [row.split()[0] for row in rows] == ["0", "1", "9"]
    assert rows[1].endswith("\"a 'b' c\"")
    assert rows[1].split()[1:4] == ["230", "159", "0"]


def test_the_label_table_is_read_back():
    classes = {1: "left ventricle", 12: "Ödem, 2"}
    assert read_label_table(label_table(classes)) == classes
    assert read_label_table("mine\n1 2 3") == {}


@pytest.mark.parametrize(("free", "error"), [(0, OSError), (1 << 40, DataError)])
def test_a_disk_that_takes_no_more_is_said_and_nothing_is_left(tmp_path, monkeypatch, free, error):
    def refuse(*_, **__):
        raise RuntimeError("Exception thrown in SimpleITK ImageFileWriter_Execute:\nReason: no room")

    monkeypatch.setattr(sitk, "WriteImage", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(error, match=r"No space left|Reason: no room"):
        write_mask(tmp_path / "a.seg.nrrd", np.ones((4, 4, 4), np.uint8), np.eye(4), classes={1: "liver"})
    assert not list(tmp_path.iterdir())
