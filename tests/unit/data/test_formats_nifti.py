"""Our own unpacking against nibabel's: what nibabel reads from a file, we read from its bytes."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension

from medvisionllama.data.formats import nifti
from medvisionllama.errors import DataError

RNG = np.random.default_rng(0)
AFFINE = np.array([[0, 0, 2.5, -3], [-1.0, 0, 0, 7], [0, 0.7, 0, 1], [0, 0, 0, 1]])


def same_as_nibabel(path) -> None:
    image = nib.load(path)
    wanted = np.asarray(image.dataobj)
    for content in (None, path.read_bytes()):
        array, header = nifti.read(path, content)
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(np.moveaxis(array, 0, -1).reshape(wanted.shape), wanted)
        np.testing.assert_array_equal(header.affine, image.affine)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f4", ">f4", "f8"])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3), (5, 6, 1), (1, 1, 9)])
def test_voxels_and_header_are_those_of_nibabel(tmp_path, suffix, kind, dtype, shape):
    image = kind(RNG.integers(0, 200, shape).astype(dtype), AFFINE)
    nib.save(image, tmp_path / f"a{suffix}")
    same_as_nibabel(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_scaled_values_are_those_of_nibabel(tmp_path, suffix):
    image = nib.Nifti1Image(RNG.normal(50, 900, (5, 6, 7)), AFFINE)
    image.header.set_data_dtype(np.int16)
    nib.save(image, tmp_path / f"a{suffix}")
    assert nib.load(tmp_path / f"a{suffix}").dataobj.slope != 1
    same_as_nibabel(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_extensions_of_the_header_are_stepped_over(tmp_path, suffix):
    image = nib.Nifti1Image(RNG.integers(0, 9, (5, 6, 7)).astype(np.int16), AFFINE)
    image.header.extensions.append(Nifti1Extension("comment", b"a long comment " * 200))
    nib.save(image, tmp_path / f"a{suffix}")
    same_as_nibabel(tmp_path / f"a{suffix}")


def test_members_in_a_row_and_the_padding_between_them_are_one_file(tmp_path):
    content = nib.Nifti1Image(RNG.integers(0, 200, (50, 60, 70)).astype(np.int16), AFFINE).to_bytes()
    parts = (content[:100], content[100:9_000], b"", content[9_000:])
    path = tmp_path / "a.nii.gz"
    path.write_bytes(bytes(3_000).join(map(gzip.compress, parts)) + bytes(12))
    same_as_nibabel(path)


def test_no_more_is_unpacked_at_once_than_the_header_declares(tmp_path):
    content = nib.Nifti1Image(np.ones((5, 6, 7), np.int16), AFFINE).to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content + bytes(100_000_000)))
    tracemalloc.start()
    try:
        array, _ = nifti.read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert array.all()
    assert peak < 3_000_000


@pytest.mark.parametrize(("cut", "more"), [(-1, b""), (-7, b""), (200, b""), (None, b"more")])
def test_a_compressed_file_that_ends_early_or_late_is_damaged(tmp_path, cut, more):
    content = nib.Nifti1Image(RNG.integers(0, 200, (5, 6, 7)).astype(np.int16), AFFINE).to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content)[:cut] + more)
    with pytest.raises(DataError, match="damaged or truncated"):
        nifti.read(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".Nii.gz", ".NII.GZ", ".nii.GZ", ".Nii"])
def test_suffixes_may_have_capital_letters(tmp_path, kind, suffix):
    image = kind(RNG.integers(0, 200, (5, 6, 7)).astype(np.int16), AFFINE)
    plain = tmp_path / f"a{suffix.lower()}"
    nib.save(image, plain)
    path = plain.rename(tmp_path / f"b{suffix}")
    assert nifti.read_header(path).shape == (5, 6, 7)
    for content in (None, path.read_bytes()):
        array, header = nifti.read(path, content)
        np.testing.assert_array_equal(array[0], np.asarray(image.dataobj))
        np.testing.assert_allclose(header.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "wanted"), [("a.nii", "a.nii.gz"), ("a.nii.gz", "a.nii"), ("A.Nii.Gz", "A.Nii")]
)
def test_a_name_that_tells_the_compression_wrongly_is_the_fault(tmp_path, name, wanted):
    content = nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), AFFINE).to_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if wanted.endswith("gz") else content)
    for read in (nifti.read_header, nifti.read, lambda path: nifti.read(path, path.read_bytes())):
        with pytest.raises(DataError, match=f"compressed.*rename it to {wanted}$") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_header_that_declares_terabytes_costs_nothing(tmp_path):
    image = nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), np.eye(4))
    content = bytearray(image.to_bytes())
    for axis in range(3):
        content[42 + 2 * axis : 44 + 2 * axis] = (32_000).to_bytes(2, "little")
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"\(32000, 32000, 32000\) does not fit into memory"):
        nifti.read(path)
