"""Which scans a list of files and folders names."""

import numpy as np
import pytest

from dicom_files import affine_of, classic, save
from medvisionllama import api
from medvisionllama.errors import DataError
from medvisionllama.inference.inputs import collect_scans


@pytest.fixture
def write(tmp_path, write_nifti):
    """Write scans of these names into one folder."""

    def files(*names):
        for name in names:
            write_nifti(tmp_path / name, np.zeros((4, 4, 4), np.float32))
        return tmp_path

    return files


@pytest.mark.parametrize("channels", [["MRI"], ["T1", "T2"]])
@pytest.mark.parametrize("stem", ["a", "a_0000"])
def test_one_scan_in_two_formats_is_refused_as_such(write, channels, stem):
    folder = write(f"{stem}.nii", f"{stem}.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    with pytest.raises(DataError, match=rf"{stem}\.nii and {stem}\.nii\.gz are the same case; remove one"):
        collect_scans([folder], channels=channels)


def test_a_channel_in_two_formats_is_refused_and_channels_of_two_formats_are_not(write):
    folder = write("a_0000.nii", "a_0001.nii.gz")
    [scan] = collect_scans([folder], channels=["T1", "T2"])
    assert [path.name for path in scan.images] == ["a_0000.nii", "a_0001.nii.gz"]
    write("a_0001.nii")
    with pytest.raises(DataError, match=r"a_0001\.nii and a_0001\.nii\.gz are the same case"):
        collect_scans([folder], channels=["T1", "T2"])


def test_channels_that_are_dicom_series_are_told_what_to_do_and_it_works(tmp_path, write_nifti):
    stored = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    data = tmp_path / "data"
    for place in ("images/a_0000", "images/a_0001", "imagesTs/b_0000", "imagesTs/b_0001"):
        save(classic(stored), data / place)
    write_nifti(data / "labels" / "a.nii.gz", (stored.T > 60).astype(np.uint8), affine=affine_of())
    asked = r"is one channel, .* 2 \(T1, T2\); convert .* CASE_0000\.nii\.gz, CASE_0001\.nii\.gz, by dcm2niix"
    with pytest.raises(DataError, match=asked):
        collect_scans([data / "imagesTs"], channels=["T1", "T2"])
    api.convert(data, tmp_path / "out", to="plain")
    [scan] = collect_scans([tmp_path / "out" / "imagesTs"], channels=["T1", "T2"])
    assert (scan.case_id, len(scan.images)) == ("b", 2)
