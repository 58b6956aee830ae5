"""Which scans a list of files and folders names."""

import numpy as np
import pytest

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
