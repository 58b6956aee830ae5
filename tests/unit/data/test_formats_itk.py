"""NRRD and MetaImage: what SimpleITK wrote is what we read, in the same place."""

import numpy as np
import pytest
import SimpleITK as sitk

from medvisionllama.data.readers import read_header, read_image, read_label
from medvisionllama.data.volume import to_ras
from medvisionllama.errors import DataError

RNG = np.random.default_rng(0)
SHAPE = (4, 5, 6)
# Directions whose columns are no axes: a scan tilted about x, stored with x and y exchanged.
TILTED = np.array([[0, 1, 0], [np.cos(0.3), 0, -np.sin(0.3)], [np.sin(0.3), 0, np.cos(0.3)]])


def write(path, array, *, direction=None, components=False):
    image = sitk.GetImageFromArray(array, isVector=components)
    dimension = image.GetDimension()
    spacing, origin = [1.5, 2.0, 7.0], [10.0, -20.0, 30.0]
    image.SetSpacing(spacing + [1.0] * (dimension - 3))
    image.SetOrigin(origin + [0.0] * (dimension - 3))
    if direction is not None:
        image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_voxels_are_read_as_x_y_z(tmp_path, suffix, dtype):
    array = RNG.integers(0, 100, SHAPE).astype(dtype)
    write(tmp_path / f"a{suffix}", array.T)
    volume = read_image((tmp_path / f"a{suffix}",))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array[None].astype(np.float32))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_every_voxel_lies_where_itk_says(tmp_path, suffix):
    image = write(tmp_path / f"a{suffix}", RNG.normal(size=SHAPE).T, direction=TILTED)
    affine = read_header(tmp_path / f"a{suffix}").affine
    for index in [(0, 0, 0), (3, 0, 0), (0, 4, 0), (1, 2, 5)]:
        left, back, up = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((affine @ [*index, 1])[:3], [-left, -back, up], atol=1e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_the_same_scan_as_nifti_gives_the_same_volume_in_ras(tmp_path, suffix):
    array = RNG.normal(size=SHAPE).astype(np.float32)
    for name in (f"a{suffix}", "a.nii.gz"):
        write(tmp_path / name, array.T, direction=TILTED)
    ours, nifti = (to_ras(read_image((tmp_path / name,))) for name in (f"a{suffix}", "a.nii.gz"))
    np.testing.assert_array_equal(ours.array, nifti.array)
    np.testing.assert_allclose(ours.affine, nifti.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("components", [True, False])
def test_components_and_a_fourth_axis_are_channels(tmp_path, suffix, components):
    array = RNG.normal(size=(2, *SHAPE)).astype(np.float32)
    stored = array.transpose(3, 2, 1, 0) if components else array.transpose(0, 3, 2, 1)
    write(tmp_path / f"a{suffix}", np.ascontiguousarray(stored), components=components)
    assert read_header(tmp_path / f"a{suffix}").num_channels == 2
    np.testing.assert_array_equal(read_image((tmp_path / f"a{suffix}",)).array, array)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.98])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"a{suffix}"
    write(path, RNG.normal(size=(20, 20, 20)))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match="damaged or truncated") as caught:
        read_image((path,))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "ITK" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("content", [b"", b"not a scan" * 100])
def test_what_is_no_scan_is_refused(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(DataError, match="damaged or truncated"):
        read_header(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.nrrd", b"data file: /etc/passwd"),
        ("a.nrrd", b"DATAFILE: other.raw"),
        ("a.mha", b"ElementDataFile = /etc/passwd"),
        ("a.mha", b"ElementDataFile = LIST"),
    ],
)
def test_a_header_that_names_another_file_is_refused(tmp_path, name, line):
    heads = {
        "a.nrrd": b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n%s\n\n",
        "a.mha": b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n%s\n",
    }
    (tmp_path / name).write_bytes(heads[name] % line)
    with pytest.raises(DataError, match="another file"):
        read_header(tmp_path / name)


HIDDEN = {
    "a comment that looks like the key": (
        "a.mha",
        b"Comment = ElementDataFile = LOCAL\nElementDataFile = secret\n",
    ),
    "another key that ends like it": ("a.mha", b"XElementDataFile = LOCAL\nElementDataFile = secret\n"),
    "the key behind a carriage return": (
        "a.mha",
        b"Comment = x\rElementDataFile = LOCAL\nElementDataFile = secret\n",
    ),
    "a header longer than we look": (
        "a.mha",
        b"Name = %s\n" % (b"x" * 70_000) + b"ElementDataFile = secret\n",
    ),
    "carriage returns alone": ("a.nrrd", b"data file: secret\r\r"),
    "a long list of comments": ("a.nrrd", b"# %s\n" % (b"x" * 1000) * 70 + b"data file: secret\n\n"),
    "a blank line of another kind first": ("a.nrrd", b"\r\r\ndata file: secret\n\n"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_no_header_leads_to_another_file(tmp_path, name):
    file, end = HIDDEN[name]
    (tmp_path / "secret").write_bytes(b"s" * 64)
    start = {
        "a.nrrd": b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n",
        "a.mha": b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n",
    }[file]
    start = start.replace(b"\n", b"\r") if name == "carriage returns alone" else start
    (tmp_path / file).write_bytes(start + end + b"v" * 64)
    with pytest.raises(DataError, match=r"another file|damaged or truncated"):
        read_image((tmp_path / file,))


def test_labels_are_read_from_nrrd(tmp_path):
    label = RNG.integers(0, 4, SHAPE)
    write(tmp_path / "a.nrrd", label.T.astype(np.float32))
    np.testing.assert_array_equal(read_label(tmp_path / "a.nrrd").array, label)


def test_two_dimensions_are_refused(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((4, 5), np.uint8))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    with pytest.raises(DataError, match="allowed: 3-D"):
        read_header(tmp_path / "a.nrrd")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_header_of_many_segments_is_read(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.ones((3, 4, 5), np.uint8))
    for number in range(150):
        image.SetMetaData(f"Segment{number}_Tags", "x" * 1000)
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"), useCompression=True)
    assert read_image((tmp_path / f"a{suffix}",)).array.shape == (1, 5, 4, 3)
