"""Packages of extras: absent until needed, and an error that says how to get them."""

import subprocess
import sys

import pytest

from medvisionllama._optional import require
from medvisionllama.errors import MedVisionLlamaError


def test_a_module_that_is_there_is_returned():
    assert require("json", extra="dicom") is sys.modules["json"]


def test_a_missing_package_names_its_extra():
    with pytest.raises(
        MedVisionLlamaError, match=r"nowhere is not installed; run: pip install 'medvisionllama\[dicom\]'"
    ):
        require("nowhere.module", extra="dicom")


def test_readers_and_writers_of_dicom_import_without_its_packages(tmp_path):
    code = (
        "import sys\n"
        "sys.modules.update(pydicom=None, highdicom=None)\n"
        "import medvisionllama.data.readers, medvisionllama.inference.dicom_seg\n"
        "from medvisionllama.data.formats.dicom_series import find_series\n"
        "from pathlib import Path\n"
        "path = Path(sys.argv[1])\n"
        "path.write_bytes(bytes(128) + b'DICM')\n"
        "try:\n"
        "    find_series(path)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    assert "pip install 'medvisionllama[dicom]'" in done.stdout, done.stderr
