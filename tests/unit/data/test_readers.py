import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medvisionllama.data.readers import is_scan, read_header, read_image, read_label, read_voxels, stem_of
from medvisionllama.errors import DataError
from medvisionllama.inference.writers import write_mask

SHAPE = (4, 5, 6)
NOISE = np.random.default_rng(0).normal(size=SHAPE)


def refusal(path: Path, read=lambda path: read_image((path,))) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_scan_is_read_as_float32_with_channels_first(tmp_path, write_nifti):
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    volume = read_image((write_nifti(tmp_path / "a.nii.gz", NOISE, affine, np.float32),))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, NOISE[None].astype(np.float32))
    np.testing.assert_array_equal(volume.affine, affine)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_usual_voxel_type_and_suffix_is_read(tmp_path, write_nifti, dtype, suffix):
    array = np.arange(120).reshape(SHAPE)
    path = write_nifti(tmp_path / f"a{suffix}", array, dtype=dtype)
    np.testing.assert_array_equal(read_image((path,)).array[0], array)
    np.testing.assert_array_equal(read_label(path).array, array)


def test_slope_and_intercept_of_the_header_are_applied(tmp_path):
    image = nib.Nifti1Image(np.full(SHAPE, 7, np.int16), np.eye(4))
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([2.0, -1024.0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    assert np.unique(read_image((tmp_path / "a.nii",)).array).tolist() == [-1010.0]


def test_nifti_2_is_read(tmp_path):
    nib.save(nib.Nifti2Image(NOISE.astype(np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image((tmp_path / "a.nii.gz",)).array[0], NOISE.astype(np.float32))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("packed", [True, False])
def test_itk_s_fifth_axis_becomes_the_channels(tmp_path, suffix, packed):
    array = np.random.default_rng(0).normal(size=(6, 5, 4, 3)).astype(np.float32)
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(path))
    assert nib.load(path).shape == (4, 5, 6, 1, 3)
    header = read_header(path)
    assert (header.num_channels, header.shape) == (3, SHAPE)
    found = read_voxels(path, path.read_bytes() if packed else None)
    np.testing.assert_array_equal(found.array, array.transpose(3, 2, 1, 0))


def test_the_last_axis_of_a_4d_file_becomes_the_channels(tmp_path, write_nifti):
    array = np.stack([NOISE, NOISE + 10], axis=-1)
    path = write_nifti(tmp_path / "a.nii.gz", array, dtype=np.float32)
    volume = read_image((path,))
    np.testing.assert_array_equal(volume.array[1], array[..., 1].astype(np.float32))
    header = read_header(path)
    assert (header.num_channels, header.shape) == (2, SHAPE)


def test_one_file_per_channel_gives_the_same_as_one_4d_file(tmp_path, write_nifti):
    array = np.stack([NOISE, NOISE + 10], axis=-1).astype(np.float32)
    paths = tuple(write_nifti(tmp_path / f"a_{i:04d}.nii.gz", array[..., i]) for i in range(2))
    both = write_nifti(tmp_path / "both.nii.gz", array)
    np.testing.assert_array_equal(read_image(paths).array, read_image((both,)).array)


def test_trailing_axes_of_length_one_are_dropped(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz", np.arange(120).reshape(*SHAPE, 1, 1), dtype=np.uint8)
    assert read_image((path,)).array.shape == (1, *SHAPE)
    assert read_label(path).array.shape == SHAPE


def test_the_header_tells_shape_and_spacing(tmp_path, write_nifti):
    header = read_header(write_nifti(tmp_path / "a.nii.gz", NOISE, np.diag([-1.5, 2, 7, 1]), np.float32))
    assert (header.shape, header.num_channels, header.spacing_mm) == (SHAPE, 1, (1.5, 2.0, 7.0))


def test_labels_take_the_smallest_type_that_holds_them(tmp_path, write_nifti):
    small = write_nifti(tmp_path / "a.nii.gz", np.full(SHAPE, 255), dtype=np.float32)
    large = write_nifti(tmp_path / "b.nii.gz", np.full(SHAPE, 65_535), dtype=np.int32)
    assert read_label(small).array.dtype == np.uint8
    assert read_label(large).array.dtype == np.uint16
    assert read_label(large).array.max() == 65_535


def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent.nii.gz")
    assert "does not exist" in refusal(tmp_path / "absent.nii.gz", read_label)
    assert "does not exist" in refusal(tmp_path / "absent.nii.gz", read_header)


def test_another_suffix_is_refused_with_the_allowed_ones(tmp_path):
    (tmp_path / "a.png").write_bytes(b"PNG")
    assert "allowed: .nii.gz, .nii" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_compressed_file_is_refused(tmp_path, write_nifti, share):
    path = write_nifti(tmp_path / "a.nii.gz", NOISE, dtype=np.float32)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged or truncated" in refusal(path)


def test_a_truncated_plain_file_is_refused(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii", NOISE, dtype=np.float32)
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged or truncated" in refusal(path)


@pytest.mark.parametrize("read", [lambda path: read_image((path,)), read_label])
def test_a_flipped_bit_in_a_compressed_file_is_refused(tmp_path, read):
    scan = nib.Nifti1Image(np.zeros((32, 32, 32), np.uint8), np.eye(4))
    content = bytearray(gzip.compress(scan.to_bytes(), compresslevel=0))
    content[10_000] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert "damaged" in refusal(tmp_path / "a.nii.gz", read)


@pytest.mark.parametrize(
    # named: a gzip stream holds the time of its making, which must not reach the tests' names
    "content",
    [b"", b"not a scan" * 100, gzip.compress(b"not a scan" * 100)],
    ids=["empty", "text", "compressed text"],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_file_that_is_not_nifti_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert "damaged or truncated" in refusal(tmp_path / name)
    refusal(tmp_path / name, read_header)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_refused_with_its_place(tmp_path, write_nifti, value):
    array = NOISE.copy()
    array[1, 2, 3] = value
    path = write_nifti(tmp_path / "a.nii.gz", array, dtype=np.float32)
    assert "1 voxel is NaN or infinite, the first at (1, 2, 3)" in refusal(path)
    assert "(1, 2, 3)" in refusal(path, read_label)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2, 3), (4, 5, 6, 2, 1, 3), (2, 2, 2, 2, 2, 2)])
def test_a_file_of_another_dimension_is_refused(tmp_path, write_nifti, shape):
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros(shape), dtype=np.float32)
    assert "allowed: 3-D, or 4-D with channels last" in refusal(path)
    refusal(path, read_header)


@pytest.mark.parametrize("size", [0, -5])
def test_a_header_with_an_impossible_size_is_refused(tmp_path, write_nifti, size):
    path = write_nifti(tmp_path / "a.nii", NOISE, dtype=np.float32)
    content = bytearray(path.read_bytes())
    content[42:44] = size.to_bytes(2, "little", signed=True)
    path.write_bytes(content)
    refusal(path, read_header)
    refusal(path)


def test_complex_voxels_are_refused(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz", NOISE + 1j, dtype=np.complex64)
    assert "complex64" in refusal(path)


def test_colour_voxels_are_refused(tmp_path):
    colours = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "a.nii.gz")
    assert "allowed: integers and real numbers" in refusal(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_an_affine_that_places_nothing_is_refused(tmp_path, write_nifti, value):
    path = write_nifti(tmp_path / "a.nii", NOISE, dtype=np.float32)
    content = bytearray(path.read_bytes())
    content[280:284] = np.array(value, "<f4").tobytes()
    path.write_bytes(content)
    assert "affine" in refusal(path, read_header)


@pytest.mark.parametrize("edge", [1e-5, 9e-4, 1.0, 5e3])
def test_voxels_of_any_size_are_read(tmp_path, write_nifti, edge):
    header = read_header(write_nifti(tmp_path / "a.nii.gz", NOISE, np.diag([edge] * 3 + [1.0]), np.float32))
    assert header.spacing_mm == pytest.approx((edge, edge, edge))


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_bytes_behind_the_voxels_of_a_small_scan_are_no_damage(tmp_path, dtype):
    scan = nib.Nifti1Image(np.ones((2, 2, 2), dtype), np.eye(4), dtype=dtype)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(scan.to_bytes() + bytes(61)))
    assert read_image((tmp_path / "a.nii.gz",)).array.tolist() == np.ones((1, 2, 2, 2)).tolist()


def test_channels_of_different_shape_are_refused(tmp_path, write_nifti):
    first = write_nifti(tmp_path / "a_0000.nii.gz", NOISE, dtype=np.float32)
    second = write_nifti(tmp_path / "a_0001.nii.gz", NOISE[1:], dtype=np.float32)
    assert "a_0000" in refusal(second, lambda path: read_image((first, path)))


@pytest.mark.parametrize("spacing", [1e-3, 1.0, 500.0])
@pytest.mark.parametrize(("voxels", "agree"), [(0.09, True), (0.11, False)])
def test_channels_agree_to_a_tenth_of_a_voxel_as_labels_do(tmp_path, write_nifti, spacing, voxels, agree):
    affine = np.diag([spacing, spacing, 2 * spacing, 1])
    moved = affine.copy()
    moved[0, 3] = voxels * spacing
    paths = tuple(
        write_nifti(tmp_path / f"{name}.nii", NOISE, matrix, np.float32)
        for name, matrix in (("a", affine), ("b", moved))
    )
    if agree:
        np.testing.assert_allclose(read_image(paths).affine, affine, rtol=1e-6)
    else:
        assert "shape or affine differs from a.nii" in refusal(paths[1], lambda _: read_image(paths))


def test_channels_of_different_affine_are_refused(tmp_path, write_nifti):
    first = write_nifti(tmp_path / "a_0000.nii.gz", NOISE, dtype=np.float32)
    second = write_nifti(tmp_path / "a_0001.nii.gz", NOISE, np.diag([1.0, 1.0, 2.0, 1.0]), np.float32)
    assert "a_0000" in refusal(second, lambda path: read_image((first, path)))


def test_a_fractional_label_is_refused_with_its_value(tmp_path, write_nifti):
    label = np.zeros(SHAPE)
    label[2, 2, 2] = 1.5
    path = write_nifti(tmp_path / "a.nii.gz", label, dtype=np.float32)
    assert "whole numbers, found 1.5" in refusal(path, read_label)


@pytest.mark.parametrize(
    ("unit", "factor"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0), ("unknown", 1.0)]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_lengths_have_the_unit_of_the_header_as_itk_has_them(tmp_path, unit, factor, suffix):
    affine = np.diag([-0.8, -0.8, 2.0, 1.0])
    affine[:3, 3] = 5, 7, -11
    image = nib.Nifti1Image(NOISE.astype(np.float32), np.diag([1 / factor] * 3 + [1]) @ affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / f"a{suffix}")
    found = read_image((tmp_path / f"a{suffix}",))
    np.testing.assert_allclose(found.affine, affine, rtol=1e-6)
    np.testing.assert_allclose(read_header(tmp_path / f"a{suffix}").affine, affine, rtol=1e-6)
    theirs = sitk.ReadImage(str(tmp_path / f"a{suffix}"))
    np.testing.assert_allclose(theirs.GetSpacing(), found.spacing_mm, rtol=1e-5)
    # A mask keeps the scan's header, and so its unit.
    write_mask(
        tmp_path / f"mask{suffix}", np.ones(NOISE.shape, np.uint8), affine, like=tmp_path / f"a{suffix}"
    )
    np.testing.assert_allclose(read_label(tmp_path / f"mask{suffix}").affine, affine, rtol=1e-6)


def test_a_label_whose_file_scales_its_values_is_read(tmp_path):
    """nibabel stores real numbers in a header of int16 by a slope, which gives 2 back as 2.00003."""
    label = np.zeros(SHAPE)
    label[0], label[1] = 1, 2
    header = nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)).header
    nib.save(nib.Nifti1Image(label, np.eye(4), header), tmp_path / "a.nii.gz")
    assert not np.array_equal(nib.load(tmp_path / "a.nii.gz").get_fdata(), label), "nothing to be rounded"
    np.testing.assert_array_equal(read_label(tmp_path / "a.nii.gz").array, label)


@pytest.mark.parametrize("value", [-1, 65_536])
def test_a_label_outside_its_range_is_refused(tmp_path, write_nifti, value):
    path = write_nifti(tmp_path / "a.nii.gz", np.full(SHAPE, value), dtype=np.int32)
    assert "0..65535" in refusal(path, read_label)


def test_a_label_with_channels_is_refused(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros((*SHAPE, 2)), dtype=np.uint8)
    assert "has 2 channels" in refusal(path, read_label)


@pytest.mark.parametrize(
    ("name", "stem"), [("a.b.nii.gz", "a.b"), ("case_01.nii", "case_01"), ("x.nii.nii.gz", "x.nii")]
)
def test_the_stem_drops_the_suffix_and_no_more(name, stem):
    assert stem_of(Path("folder") / name) == stem


def test_hidden_files_and_other_suffixes_are_no_scans():
    assert is_scan(Path("a.nii.gz"))
    assert is_scan(Path("a.nii"))
    assert not is_scan(Path("._a.nii.gz"))
    assert not is_scan(Path("a.json"))
