"""Masks and labels as files to be compared: which there are, what their classes are called, and their values."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvisionllama.data.formats.dicom_labels import read_classes
from medvisionllama.data.formats.itk import segment_names
from medvisionllama.data.msd import read_dataset_json
from medvisionllama.data.readers import is_scan, read_label, stem_of
from medvisionllama.data.volume import Volume
from medvisionllama.errors import DataError
from medvisionllama.inference.writers import read_label_table


@dataclass(frozen=True)
class Pair:
    """A predicted mask and the true one."""

    case_id: str
    patient_id: str
    prediction: Path
    label: Path


def by_name(folder: Path) -> dict[str, Path]:
    """Masks of a folder, or the one file, by their cases' names.

    Raises:
        DataError: no such folder, or two masks of one name.
    """
    if folder.is_file() and (is_scan(folder) or _is_dicom_mask(folder)):
        return {_stem(folder): folder}
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder of masks")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not (is_scan(path) or _is_dicom_mask(path)):
            continue
        if _stem(path) in found:
            raise DataError(
                f"{path} and {found[_stem(path)].name} are both masks of {_stem(path)}; remove one"
            )
        found[_stem(path)] = path
    return found


def classes_of(labels: Path, pairs: Sequence[Pair]) -> dict[int, str]:
    """Names of the classes: from the dataset of the labels, from the table beside the masks, or from the values."""
    description = labels.parent / "dataset.json"
    if description.is_file():
        declared = read_dataset_json(description).get("labels", {})
        by_value = {}
        for key, value in declared.items() if isinstance(declared, dict) else ():
            # MSD maps values to names, nnU-Net names to values.
            number, name = (value, key) if isinstance(value, int) else (key, value)
            if str(number).isdigit():
                by_value[int(number)] = str(name)
        if by_value:
            return {value: by_value[value] for value in sorted(by_value) if value}
    table = pairs[0].prediction.parent / "labels.txt"
    if table.is_file() and (named := read_label_table(table.read_text(errors="replace"))):
        return named
    dicom = next(
        (path for pair in pairs for path in (pair.prediction, pair.label) if _is_dicom_mask(path)), None
    )
    if dicom is not None:
        raise DataError(
            f"{dicom} names its classes and nothing says which values they have; put the labels.txt that `medvisionllama predict` wrote beside the masks"
        )
    values = sorted(
        {
            int(value)
            for pair in pairs
            for path in (pair.label, pair.prediction)
            for value in np.unique(read_label(path).array)
        }
        - {0}
    )
    return {value: f"class {value}" for value in values}


def read_mask(path: Path, classes: dict[int, str]) -> Volume:
    """Read a mask or label with the values of `classes`; DICOM-SEG numbers its segments and is read by names."""
    if _is_dicom_mask(path):
        return read_classes(path, classes)
    label = read_label(path)
    if not path.name.lower().endswith(".nrrd"):
        return label
    # 3D Slicer numbers segments in the order they were made; what they are is in their names.
    values = {name.strip().casefold(): value for value, name in classes.items()}
    table = np.arange(int(label.array.max()) + 1)
    for value, name in segment_names(path).items():
        if value < len(table):
            table[value] = values.get(name.strip().casefold(), value)
    return Volume(table[label.array].astype(np.uint8 if table.max() < 256 else np.uint16), label.affine)


def _stem(path: Path) -> str:
    return path.stem if _is_dicom_mask(path) else stem_of(path)


def _is_dicom_mask(path: Path) -> bool:
    return path.suffix.lower() == ".dcm"
