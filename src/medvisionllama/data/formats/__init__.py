"""Kinds of files a scan comes in: `nifti`, `itk` and `dicom`, each with `read_header(source)` and `read(source)`.

The other modules are parts of these. All only translate; whether values make sense is asked in `data/readers.py`.
"""

from pathlib import Path
from types import ModuleType

from medvisionllama.data.formats import dicom, itk, nifti
from medvisionllama.data.formats.dicom_header import is_dicom
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.errors import DataError

ScanSource = Path | Series
"""A file, a folder with one DICOM series, or a series that `find_series` found."""

# Files of which each is a scan of its own. A .dcm file mostly is one slice, so folders are not searched for it.
SUFFIXES = (*nifti.SUFFIXES, *itk.SUFFIXES)


def format_of(source: ScanSource) -> ModuleType:
    """Choose the module that reads a scan.

    Raises:
        DataError: no such file, or not one of ours.
    """
    if isinstance(source, Series):
        return dicom
    if not source.exists():
        raise DataError(f"{source} does not exist; put the file there or remove the case from the dataset")
    if source.is_dir():
        return dicom
    for module in (nifti, itk, dicom):
        if source.name.lower().endswith(module.SUFFIXES):
            return module
    if is_dicom(source):  # hospitals export files without suffix
        return dicom
    raise DataError(
        f"{source} is not a scan we read; allowed: {', '.join(SUFFIXES)}, or a folder with one DICOM series"
    )
