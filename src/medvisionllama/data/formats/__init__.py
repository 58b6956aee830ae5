"""One module for each kind of file a scan comes in: `read_header(path)` and `read_voxels(path)`.

Modules here only translate; whether values make sense is asked in `data/readers.py`.
"""

from pathlib import Path
from types import ModuleType

from medvisionllama.data.formats import itk, nifti
from medvisionllama.errors import DataError

SUFFIXES = (*nifti.SUFFIXES, *itk.SUFFIXES)


def format_of(path: Path) -> ModuleType:
    """Choose the module that reads a file.

    Raises:
        DataError: no such file, or not one of ours.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; put the file there or remove the case from the dataset")
    for module in (nifti, itk):
        if path.is_file() and path.name.lower().endswith(module.SUFFIXES):
            return module
    raise DataError(f"{path} is not a scan we read; allowed: {', '.join(SUFFIXES)}")
