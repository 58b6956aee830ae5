import nibabel as nib
import numpy as np
import pytest

from medvisionllama.data.check.storage import read_storage

FAR = np.array([[0, -2.0, 0, 9], [2, 0, 0, -4], [0, 0, 3, 1], [0, 0, 0, 1]])


def written(path, kind=nib.Nifti1Image, *, endianness="<"):
    header = kind.header_class(endianness=endianness)
    image = kind(np.zeros((3, 4, 5), np.int16), None, header)
    image.header.set_xyzt_units("mm")
    image.set_sform(FAR, code=1)
    image.set_qform(None, code=0)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_both_versions_and_byte_orders_are_read(tmp_path, suffix, kind, endianness):
    storage = read_storage(written(tmp_path / f"a{suffix}", kind, endianness=endianness))
    assert np.allclose(storage.sform, FAR)
    assert storage.qform is None
    assert storage.unit == "mm"
    assert storage.placed


def test_an_unknown_unit_and_an_impossible_quaternion_are_no_crash(tmp_path):
    path = written(tmp_path / "a.nii")
    raw = bytearray(path.read_bytes())
    raw[123] = 7
    raw[252:254] = (1).to_bytes(2, "little")
    raw[256:268] = np.array([3, 3, 3], "<f4").tobytes()
    path.write_bytes(raw)
    storage = read_storage(path)
    assert (storage.unit, storage.qform) == ("unknown", None)


def test_other_formats_store_no_such_thing(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004")
    assert read_storage(tmp_path / "a.nrrd") is None
    assert read_storage(tmp_path) is None


@pytest.mark.parametrize("pixdim", [[0.0, 2.0, 2.0, 3.0], [1.0, -2.0, 2.0, 3.0]])
def test_signs_that_the_reader_repairs_are_no_crash(tmp_path, pixdim):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), None)
    image.set_sform(None, code=0)
    image.set_qform(np.diag([2.0, 2.0, 3.0, 1.0]), code=1)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[76:92] = np.array(pixdim, "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    storage = read_storage(tmp_path / "a.nii")
    np.testing.assert_allclose(storage.qform, nib.load(tmp_path / "a.nii").affine)
