"""Three layouts of the same cases: the same voxels, affines, names and splits, and a whole folder or none."""

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dicom_files import classic, save
from medvisionllama.data.convert import convert
from medvisionllama.data.index import Dataset, open_dataset
from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.splits import make_splits
from medvisionllama.errors import DataError
from medvisionllama.inference.writers import write_mask
from medvisionllama.progress import Silent

AFFINE = np.array([[0.1, -1.2, 0.0, 7.3], [0.9, 0.1, 0.2, -31.7], [0.0, 0.1, 5.0, 12.1], [0, 0, 0, 1]])


def refusal(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: Dataset, other: Dataset) -> None:
    """Assert that two folders hold the same dataset, voxel by voxel."""
    assert one.patients == other.patients
    assert (one.channels, one.classes) == (other.channels, other.classes)
    assert make_splits(one.patients).sha256 == make_splits(other.patients).sha256
    cases = {case.case_id: case for case in other.cases}
    for case in one.cases:
        for read, before, after in (
            (read_image, case.images, cases[case.case_id].images),
            (read_label, case.label, cases[case.case_id].label),
        ):
            a, b = read(before), read(after)
            np.testing.assert_array_equal(a.array, b.array)
            np.testing.assert_array_equal(a.affine, b.affine)
            assert a.array.dtype == b.array.dtype


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rewrite(root: Path, **changes: object) -> None:
    content = json.loads((root / "dataset.json").read_text()) | changes
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def hippocampus(dataset_folder, write_nifti):
    """An MSD folder of one channel, with frames, an odd affine, and two unlabelled scans, one of them listed."""
    root = dataset_folder("Task04_Hippocampus", num_cases=4, frames=2)
    for path in root.rglob("*.nii.gz"):
        image = nib.load(path)
        write_nifti(path, np.asarray(image.dataobj), AFFINE)
    for name in ("test_1", "test_2"):
        write_nifti(root / f"imagesTs/{name}.nii.gz", np.ones((4, 5, 6), np.int16))
    rewrite(root, licence="CC-BY-SA 4.0", test=["./imagesTs/test_1.nii.gz", "./imagesTs/absent.nii.gz"])
    return root


@pytest.fixture
def brats(dataset_folder):
    return dataset_folder("Brats", num_cases=3, channels=("FLAIR", "T1c"))


def test_a_round_trip_through_all_layouts_changes_nothing(hippocampus, tmp_path):
    nnunet = convert(hippocampus, tmp_path / "Dataset004_H", to="nnunet")
    plain = convert(nnunet, tmp_path / "plain", to="plain")
    back = convert(plain, tmp_path / "back", to="msd")
    for folder in (nnunet, plain, back):
        same(open_dataset(hippocampus), open_dataset(folder))
    # Files that need no change are the same bytes, and take no room.
    first = "case_000_frame01"
    for path in (nnunet / f"imagesTr/{first}_0000.nii.gz", plain / f"images/{first}.nii.gz"):
        assert path.samefile(hippocampus / f"imagesTr/{first}.nii.gz")
    assert files(back) == files(hippocampus)
    assert json.loads((back / "dataset.json").read_text())["licence"] == "CC-BY-SA 4.0"


def test_a_round_trip_of_two_channels_changes_nothing(brats, tmp_path):
    nnunet = convert(brats, tmp_path / "Dataset001_B", to="nnunet")
    assert len(open_dataset(nnunet).cases[0].images) == 2
    plain = convert(nnunet, tmp_path / "plain", to="plain")
    back = convert(plain, tmp_path / "back", to="msd")
    direct = convert(brats, tmp_path / "direct", to="plain")
    for folder in (nnunet, plain, back, direct):
        same(open_dataset(brats), open_dataset(folder))
    assert files(back) == files(brats)
    assert nib.load(back / "imagesTr/case_000.nii.gz").ndim == 4


def test_the_json_of_msd_is_the_decathlons(hippocampus, tmp_path):
    out = convert(convert(hippocampus, tmp_path / "plain", to="plain"), tmp_path / "out", to="msd")
    content = json.loads((out / "dataset.json").read_text())
    assert content["modality"] == {"0": "MRI"}
    assert content["labels"] == {"0": "background", "1": "Anterior", "2": "Posterior"}
    assert (content["numTraining"], content["numTest"], content["tensorImageSize"]) == (8, 2, "3D")
    assert content["training"][0] == {
        "image": "./imagesTr/case_000_frame01.nii.gz",
        "label": "./labelsTr/case_000_frame01.nii.gz",
    }
    assert content["test"] == ["./imagesTs/test_1.nii.gz", "./imagesTs/test_2.nii.gz"]


def test_the_json_of_nnunet_obeys_its_rules(brats, tmp_path):
    out = convert(brats, tmp_path / "Dataset001_B", to="nnunet")
    content = json.loads((out / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "FLAIR", "1": "T1c"}
    assert content["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert (content["numTraining"], content["file_ending"]) == (3, ".nii.gz")
    assert files(out / "imagesTr") == [f"case_00{n}_000{c}.nii.gz" for n in range(3) for c in range(2)]
    assert files(out / "labelsTr") == [f"case_00{n}.nii.gz" for n in range(3)]
    assert {nib.load(path).ndim for path in (out / "imagesTr").iterdir()} == {3}


@pytest.mark.parametrize(
    ("dtype", "slope", "inter"), [("<i2", 0.5, -3), (">i2", 1, 0), ("<u1", 2, 0), ("<f4", 1, 0)]
)
def test_dtype_scaling_and_header_survive_splitting_and_merging(brats, tmp_path, dtype, slope, inter):
    path = brats / "imagesTr/case_000.nii.gz"
    shape = nib.load(path).shape
    raw = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = b"scanner"
    image = nib.Nifti1Image(raw, AFFINE, header)
    image.set_qform(np.diag([2.0, 3, 4, 1]), 1)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    label = nib.load(brats / "labelsTr/case_000.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), AFFINE), brats / "labelsTr/case_000.nii.gz")
    out = convert(brats, tmp_path / "Dataset001_B", to="nnunet")
    back = convert(out, tmp_path / "back", to="msd")
    for result, expected in (
        (nib.load(out / "imagesTr/case_000_0001.nii.gz"), raw[..., 1]),
        (nib.load(back / "imagesTr/case_000.nii.gz"), raw),
    ):
        np.testing.assert_array_equal(result.dataobj.get_unscaled(), expected)
        assert (result.dataobj.slope, result.dataobj.inter) == (slope, inter)
        assert result.get_data_dtype() == np.dtype(dtype)
        before = nib.load(path).header
        for field in (
            "srow_x",
            "srow_y",
            "srow_z",
            "qform_code",
            "sform_code",
            "quatern_b",
            "xyzt_units",
            "descrip",
        ):
            assert result.header[field].tobytes() == before[field].tobytes(), field


def test_channels_of_different_dtypes_keep_their_values(tmp_path, write_nifti):
    root = tmp_path / "plain"
    integers = np.array([[[-32768, 32767]]], np.int16)
    reals = np.array([[[1e-3, 1e30]]], np.float32)
    for case in "abc":
        write_nifti(root / f"images/{case}_0000.nii.gz", integers)
        write_nifti(root / f"images/{case}_0001.nii.gz", reals)
        write_nifti(root / f"labels/{case}.nii.gz", np.ones((1, 1, 2), np.uint8))
    out = convert(root, tmp_path / "out", to="msd")
    merged = np.asarray(nib.load(out / "imagesTr/a.nii.gz").dataobj)
    np.testing.assert_array_equal(merged[..., 0], integers)
    np.testing.assert_array_equal(merged[..., 1], reals)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_formats_become_nifti_with_the_same_voxels_and_place(tmp_path, suffix, write_nifti):
    root = tmp_path / "plain"
    direction = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])
    rng = np.random.default_rng(0)
    for case in "abc":
        for folder, array in (
            ("images", rng.normal(size=(4, 5, 6)).astype(np.float64)),
            ("labels", rng.integers(0, 3, (4, 5, 6)).astype(np.int64)),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            image = sitk.GetImageFromArray(array)
            image.SetDirection(direction.ravel())
            image.SetOrigin((3.25, -7.5, 11))
            image.SetSpacing((0.5, 0.75, 3))
            sitk.WriteImage(image, str(root / folder / f"{case}{suffix}"))
    out = convert(root, tmp_path / "Dataset001_X", to="nnunet")
    for case in open_dataset(root).cases:
        after = next(c for c in open_dataset(out).cases if c.case_id == case.case_id)
        np.testing.assert_array_equal(read_image(case.images).array, read_image(after.images).array)
        np.testing.assert_array_equal(read_label(case.label).array, read_label(after.label).array)
        # NIfTI keeps an affine in single precision.
        np.testing.assert_array_equal(
            read_image(case.images).affine.astype(np.float32), read_image(after.images).affine
        )
    assert nib.load(out / "imagesTr/a_0000.nii.gz").get_data_dtype() == np.float64
    direct = sitk.ReadImage(str(out / "imagesTr/a_0000.nii.gz"))
    np.testing.assert_allclose(direct.GetOrigin(), (3.25, -7.5, 11), atol=1e-6)
    np.testing.assert_allclose(direct.GetDirection(), direction.ravel(), atol=1e-6)


@pytest.mark.parametrize("layout", ["msd", "nnunet", "plain"])
def test_a_label_that_slicer_cropped_lies_on_its_image_s_grid_again(tmp_path, write_nifti, layout):
    root, label = tmp_path / "plain", np.zeros((7, 8, 9), np.uint8)
    label[1:4, 2:6, 3:5] = 1
    label[2:4, 3:5, 3:5] = 2
    # The image's axes run left, posterior, superior; Slicer's file has its own.
    affine = np.array([[-1.5, 0, 0, 40], [0, -2, 0, 30], [0, 0, 3, -20], [0, 0, 0, 1.0]])
    write_nifti(root / "images" / "a.nii.gz", np.random.default_rng(0).normal(size=label.shape), affine)
    inner = affine.copy()
    inner[:3, 3] = (affine @ [1, 2, 3, 1])[:3]
    (root / "labels").mkdir()
    write_mask(root / "labels" / "a.seg.nrrd", label[1:5, 2:6, 3:7], inner)
    out = convert(root, tmp_path / "Dataset001_X", to=layout)
    [case] = open_dataset(out).cases
    found = read_label(case.label)
    np.testing.assert_array_equal(found.array, label)
    np.testing.assert_allclose(found.affine, affine)


@pytest.mark.parametrize("layout", ["msd", "nnunet", "plain"])
@pytest.mark.parametrize("axes", ["PRS", "SRA"])
def test_a_label_on_other_axes_is_written_on_its_image_s(hippocampus, tmp_path, layout, axes):
    path = hippocampus / "labelsTr/case_001_frame01.nii.gz"
    image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    nib.save(image.as_reoriented(turn), path)
    assert (nib.load(path).shape == image.shape) == (axes == "PRS")
    out = convert(hippocampus, tmp_path / "Dataset004_H", to=layout)
    found = {case.case_id: case for case in open_dataset(out).cases}
    label = nib.load(found["case_001_frame01"].label)
    np.testing.assert_array_equal(np.asarray(label.dataobj), np.asarray(image.dataobj))
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-6)
    # The others are the same files.
    assert found["case_002_frame01"].label.samefile(hippocampus / "labelsTr/case_002_frame01.nii.gz")


def test_a_label_on_other_axes_elsewhere_is_refused(hippocampus, tmp_path):
    path = hippocampus / "labelsTr/case_001_frame01.nii.gz"
    image = nib.load(path)
    affine = image.affine @ np.diag([-1.0, -1, 1, 1])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    assert "case_001_frame01.nii.gz is not on the grid of its image" in refusal(
        hippocampus, tmp_path / "p", to="plain"
    )


def test_plain_nifti_is_compressed_without_a_change(hippocampus, tmp_path):
    for path in list(hippocampus.rglob("*Tr/*.nii.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    entries = json.loads((hippocampus / "dataset.json").read_text())["training"]
    rewrite(hippocampus, training=[{k: v.removesuffix(".gz") for k, v in entry.items()} for entry in entries])
    out = convert(hippocampus, tmp_path / "Dataset004_H", to="nnunet")
    name = "case_000_frame01"
    packed = (out / f"imagesTr/{name}_0000.nii.gz").read_bytes()
    assert gzip.decompress(packed) == (hippocampus / f"imagesTr/{name}.nii").read_bytes()
    same(open_dataset(hippocampus), open_dataset(out))


def test_a_fourth_axis_of_one_is_dropped_for_nnunet(hippocampus, tmp_path):
    for part in ("imagesTr", "labelsTr"):
        path = hippocampus / part / "case_000_frame01.nii.gz"
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), path)
    out = convert(hippocampus, tmp_path / "Dataset004_H", to="nnunet")
    assert {nib.load(path).ndim for path in out.rglob("case*.nii.gz")} == {3}
    same(open_dataset(hippocampus), open_dataset(out))


@pytest.mark.parametrize("transfer", ["link", "symlink", "copy"])
def test_unchanged_files_are_linked_or_copied(hippocampus, tmp_path, transfer):
    out = convert(hippocampus, tmp_path / "Dataset004_H", to="nnunet", transfer=transfer)
    source = hippocampus / "labelsTr/case_000_frame01.nii.gz"
    target = out / "labelsTr/case_000_frame01.nii.gz"
    assert target.read_bytes() == source.read_bytes()
    assert target.is_symlink() == (transfer == "symlink")
    assert target.samefile(source) == (transfer != "copy")
    same(open_dataset(hippocampus), open_dataset(out))


def test_a_disk_without_hard_links_gets_copies(hippocampus, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = convert(hippocampus, tmp_path / "plain", to="plain")
    same(open_dataset(hippocampus), open_dataset(out))


def test_values_with_gaps_need_renumbering_for_nnunet(dataset_folder, tmp_path):
    root = dataset_folder("Gaps", values=(2, 7))
    out = tmp_path / "Dataset001_G"
    assert "has the label values 2, 7, and nnU-Net takes only 1, 2, 3" in refusal(root, out, to="nnunet")
    convert(root, out, to="nnunet", renumber=True)
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert content["values_before_renumbering"] == {"Anterior": 2, "Posterior": 7}
    for before, after in zip(open_dataset(root).cases, open_dataset(out).cases, strict=True):
        old, new = read_label(before.label), read_label(after.label)
        np.testing.assert_array_equal(np.array([0, 2, 7])[new.array], old.array)
        np.testing.assert_array_equal(new.affine, old.affine)
    same(open_dataset(root), open_dataset(convert(root, tmp_path / "plain", to="plain")))


def test_a_value_that_is_no_class_is_refused_for_nnunet(hippocampus, tmp_path, write_nifti):
    path = hippocampus / "labelsTr/case_002_frame01.nii.gz"
    array = np.asarray(nib.load(path).dataobj).copy()
    array[0, 0, 0] = 9
    write_nifti(path, array, AFFINE)
    message = refusal(hippocampus, tmp_path / "Dataset004_H", to="nnunet")
    assert f"{path} holds the value 9" in message


def test_class_names_that_nnunet_cannot_keep_apart_get_their_value(hippocampus, tmp_path):
    rewrite(hippocampus, labels={"0": "background", "1": "ignore", "2": "ignore"})
    out = convert(hippocampus, tmp_path / "Dataset004_H", to="nnunet")
    assert open_dataset(out).classes == {1: "ignore (1)", 2: "ignore (2)"}


def test_a_plain_folder_without_names_gets_the_values_it_has(hippocampus, tmp_path):
    plain = convert(hippocampus, tmp_path / "plain", to="plain")
    (plain / "names.json").unlink()
    out = convert(plain, tmp_path / "Dataset004_H", to="nnunet")
    assert open_dataset(out).classes == {1: "class 1", 2: "class 2"}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"channels": ["a", "b"]}',
        '{"channels": "a"}',
        '{"classes": {"x": "y"}}',
        '{"classes": 1}',
        # Passed over, it would leave sides without names, and mirror them.
        '{"labels": {"1": "left kidney", "2": "right kidney"}}',
        '{"channel_names": ["CT"]}',
    ],
)
def test_names_that_do_not_fit_are_refused(hippocampus, tmp_path, content):
    plain = convert(hippocampus, tmp_path / "plain", to="plain")
    (plain / "names.json").write_text(content)
    with pytest.raises(DataError, match=r"names\.json|must hold a JSON object"):
        open_dataset(plain)


@pytest.mark.parametrize("layout", ["msd", "nnunet", "plain"])
def test_channels_that_itk_wrote_are_read_by_it_again(tmp_path, write_nifti, layout):
    array = np.random.default_rng(0).normal(size=(6, 5, 4, 2)).astype(np.float32)
    root = tmp_path / "in"
    for case in "abc":
        label = write_nifti(root / f"labels/{case}.nii.gz", np.ones((4, 5, 6), np.uint8))
        (root / "images").mkdir(exist_ok=True)
        image = sitk.GetImageFromArray(array, isVector=True)
        image.CopyInformation(sitk.ReadImage(str(label)))
        sitk.WriteImage(image, str(root / f"images/{case}.nii.gz"))
    out = convert(root, tmp_path / "Dataset001_X", to=layout)
    images = open_dataset(out).cases[0].images
    np.testing.assert_array_equal(read_image(images).array, array.transpose(3, 2, 1, 0))
    if layout == "nnunet":
        for channel, path in enumerate(images):
            np.testing.assert_array_equal(
                sitk.GetArrayFromImage(sitk.ReadImage(str(path))), array[..., channel]
            )


def test_unlabelled_channels_come_along(brats, tmp_path):
    shutil.copytree(brats / "imagesTr", brats / "imagesTs")
    nnunet = convert(brats, tmp_path / "Dataset001_B", to="nnunet")
    back = convert(convert(nnunet, tmp_path / "plain", to="plain"), tmp_path / "back", to="msd")
    assert files(back / "imagesTs") == files(brats / "imagesTs")
    for name in files(back / "imagesTs"):
        a, b = (nib.load(root / "imagesTs" / name) for root in (brats, back))
        np.testing.assert_array_equal(a.dataobj, b.dataobj)
    (nnunet / "imagesTs/case_000_0001.nii.gz").unlink()
    assert "has 1 files where 2 are expected" in refusal(nnunet, tmp_path / "again", to="msd")


@pytest.mark.parametrize(("to", "name"), [("nnunet", "t_0000"), ("msd", "t"), ("plain", "t")])
def test_an_unlabelled_scan_of_one_numbered_channel_keeps_its_case(tmp_path, write_nifti, to, name):
    source = tmp_path / "source"
    for case in ("a", "b", "c"):
        write_nifti(source / f"images/{case}_0000.nii.gz", np.ones((4, 5, 6), np.int16))
        write_nifti(source / f"labels/{case}.nii.gz", np.ones((4, 5, 6), np.uint8))
    write_nifti(source / "imagesTs/t_0000.nii.gz", np.ones((4, 5, 6), np.int16))
    out = convert(source, tmp_path / "Dataset004_H", to=to)
    assert set(open_dataset(out).patients) == {"a", "b", "c"}
    assert files(out / "imagesTs") == [f"{name}.nii.gz"]


def test_an_unlabelled_series_comes_along(tmp_path, write_nifti):
    source = tmp_path / "source"
    for case in ("a", "b", "c"):
        write_nifti(source / f"images/{case}.nii.gz", np.ones((4, 5, 6), np.int16))
        write_nifti(source / f"labels/{case}.nii.gz", np.ones((4, 5, 6), np.uint8))
    save(classic(np.ones((6, 8, 5), np.int16)), source / "imagesTs" / "t")
    out = convert(source, tmp_path / "Dataset004_H", to="nnunet")
    assert files(out / "imagesTs") == ["t_0000.nii.gz"]


def test_refusals_name_the_way_out(hippocampus, tmp_path):
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(hippocampus, tmp_path / "there", to="plain")
    assert "such as" in refusal(hippocampus, tmp_path / "Hippocampus", to="nnunet")
    assert "--copy" in refusal(hippocampus, tmp_path / "m", to="msd", transfer="symlink")
    assert "is not a folder" in refusal(tmp_path / "nowhere", tmp_path / "m", to="msd")
    rewrite(hippocampus, modality={"0": "a", "1": "b"})
    for out, to in ((tmp_path / "Dataset001_X", "nnunet"), (tmp_path / "p", "plain")):
        assert "channels" in refusal(hippocampus, out, to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Task04_Hippocampus", "there"]


@pytest.mark.parametrize("to", ["nnunet", "msd"])
def test_a_damaged_file_leaves_nothing(brats, tmp_path, to):
    nnunet = convert(brats, tmp_path / "Dataset001_B", to="nnunet")
    source = nnunet if to == "msd" else brats
    path = sorted((source / "imagesTr").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    assert "damaged or truncated" in refusal(source, tmp_path / "Dataset002_B", to=to)
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_leaves_nothing(hippocampus, tmp_path):
    class Impatient(Silent):
        def track(self, title, total):
            from contextlib import nullcontext

            def advance(done, note=""):
                if done == 3:
                    raise KeyboardInterrupt

            return nullcontext(advance)

    with pytest.raises(KeyboardInterrupt):
        convert(hippocampus, tmp_path / "plain", to="plain", progress=Impatient())
    assert [path.name for path in tmp_path.iterdir()] == ["Task04_Hippocampus"]


@pytest.mark.data
@pytest.mark.parametrize(("task", "num_cases"), [("Task103_BRATS2015x6", 4), ("Task101_ACDC", 6)])
def test_real_scans_survive_the_round_trip(data_root, tmp_path, task, num_cases):
    root = tmp_path / "part"
    content = json.loads((data_root / task / "dataset.json").read_text())
    content["training"] = content["training"][:num_cases]
    for entry in content["training"]:
        for name in entry.values():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if task == "Task101_ACDC":
                shutil.copyfile(data_root / task / name, root / name)
            else:  # twenty slices of 155, to be quick
                nib.save(nib.load(data_root / task / name).slicer[:, :, 60:80], root / name)
    (root / "dataset.json").write_text(json.dumps(content))
    nnunet = convert(root, tmp_path / "Dataset100_X", to="nnunet")
    plain = convert(nnunet, tmp_path / "plain", to="plain")
    back = convert(plain, tmp_path / "back", to="msd")
    same(open_dataset(root), open_dataset(nnunet))
    same(open_dataset(root), open_dataset(back))
