"""Masks and labels as files to be compared: which there are, what their classes are called, and their values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medvisionllama.data.formats.dicom_labels import read_classes
from medvisionllama.data.formats.itk import segment_names
from medvisionllama.data.labels import FOREGROUND, check_class_names, check_no_ignore
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
    by_value: bool = False
    """Whether the label's values are the classes' own whatever names it has, as in the dataset of a run."""
    declared: bool = True
    """Whether its values must be classes. A dataset that declares none has those of the cases that trained, and its
    others may have more."""


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
        # Hidden are macOS's `._` twins, and what a killed process left half written.
        if path.name.startswith(".") or not (is_scan(path) or _is_dicom_mask(path)):
            continue
        if _stem(path) in found:
            raise DataError(
                f"{path} and {found[_stem(path)].name} are both masks of {_stem(path)}; remove one"
            )
        found[_stem(path)] = path
    return found


def classes_of(labels: Path, pairs: Sequence[Pair]) -> dict[int, str]:
    """Names of the classes: from the dataset of the labels, the table beside the masks, the files, or the values.

    Raises:
        DataError: DICOM-SEG without such a dataset or table, names in the files, or in dataset and table, that
            contradict each other, or classes that cannot be measured: regions, voxels to ignore, two of one name.
    """
    first = pairs[0].prediction
    table = first.parent / "labels.txt"
    written = read_label_table(table.read_text(encoding="utf-8", errors="replace")) if table.is_file() else {}
    description = labels.parent / "dataset.json"
    if description.is_file():
        declared = read_dataset_json(description).get("labels", {})
        by_value = {}
        if not isinstance(declared, dict):
            declared = {}
        check_no_ignore(declared, description)
        for key, value in declared.items():
            if isinstance(value, list):
                raise DataError(
                    f"{description}: the class {key!r} is a region of several values, which cannot be measured; name the values one by one"
                )
            # MSD maps values to names, nnU-Net names to values.
            number, name = (value, key) if isinstance(value, int) else (key, value)
            if str(number).isdigit():
                by_value[int(number)] = str(name)
        if named := {value: by_value[value] for value in sorted(by_value) if value}:
            check_class_names(named, description)
            # Masks that hold names are read by them.
            if not _is_dicom_mask(first) and not _segments(first):
                _check_table(table, written, named, description)
            return named
    if written:
        check_class_names(written, table)
        return written
    dicom = next(
        (path for pair in pairs for path in (pair.prediction, pair.label) if _is_dicom_mask(path)), None
    )
    if dicom is not None:
        raise DataError(
            f"{dicom} names its classes and nothing says which values they have; put the labels.txt that `medvisionllama predict` wrote beside the masks"
        )
    segments = {path: _segments(path) for pair in pairs for path in (pair.label, pair.prediction)}
    named = _named_classes(segments)
    check_class_names(named, first)
    if named and all(segments.values()):
        return named
    values = {int(value) for path in segments for value in np.unique(read_label(path).array)} - {0}
    if not values:
        raise DataError(
            f"all masks and labels are empty and nothing names their classes; put a labels.txt beside {pairs[0].prediction.parent}, or give other folders"
        )
    return {value: named.get(value, f"class {value}") for value in sorted(values)}


def _check_table(
    table: Path, written: Mapping[int, str], named: Mapping[int, str], description: Path
) -> None:
    """Raise DataError if the table beside masks gives classes other values than the dataset of the labels does."""
    if [_plain(name) for name in written.values()] == ["foreground"] and len(named) > 1:
        raise DataError(
            f"{table} says that the masks know one foreground only, {description} has {len(named)} classes; give --merged"
        )
    values = {_plain(name): value for value, name in named.items()}
    for value, name in written.items():
        if values.get(_plain(name), value) != value:
            raise DataError(
                f"{table} gives {name} the value {value}, {description} the value {values[_plain(name)]}; renumber the masks or the labels"
            )


def read_mask(path: Path, classes: dict[int, str]) -> Volume:
    """Read a mask or label with the values of `classes`.

    DICOM-SEG numbers its segments and is read by their names, and so is 3D Slicer's file if a name is a class's.

    Raises:
        DataError: unreadable, or a segment is none of the classes.
    """
    if _is_dicom_mask(path):
        return read_classes(path, classes)
    label = read_label(path)
    # 3D Slicer numbers segments in the order they were made; what they are is in their names.
    values = {_plain(name): value for value, name in classes.items()}
    segments = _segments(path)
    if not any(_plain(name) in values for name in segments.values()):
        return label
    table = np.arange(int(label.array.max()) + 1)
    for value in np.unique(label.array).tolist():
        name = segments.get(value)
        if name is None:
            continue
        if _plain(name) not in values:
            # Its number may be that of a class, so it can neither keep it nor be passed over in silence.
            raise DataError(
                f"{path}: segment {name} is none of {', '.join(classes.values())}; rename it, remove it or add the class"
            )
        table[value] = values[_plain(name)]
    return Volume(table[label.array].astype(np.uint8 if table.max() < 256 else np.uint16), label.affine)


def check_values(path: Path, mask: Volume, classes: Mapping[int, str]) -> None:
    """Raise DataError for a value that is no class's: it would be measured as background, without a word."""
    known = np.zeros(max(int(mask.array.max(initial=0)), *classes) + 1, dtype=bool)
    known[[0, *classes]] = True
    if not known[mask.array].all():
        value = int(mask.array[~known[mask.array]].min())
        names = ", ".join(f"{number} {name}" for number, name in classes.items())
        step = "correct the file, or name the class in dataset.json or labels.txt"
        if list(classes.values()) == [FOREGROUND]:
            step = "give --merged if the masks know one foreground only, else correct the file"
        raise DataError(
            f"{path} holds the value {value}, which is no class's (0 background, {names}); {step}"
        )


def _named_classes(segments: Mapping[Path, dict[int, str]]) -> dict[int, str]:
    """Classes by the names that 3D Slicer wrote into files, with the values of the first that has each.

    Args:
        segments: names by value in each file.

    Raises:
        DataError: names are exchanged and a file has none, so that its values may mean either.
    """
    nameless = next((path for path, names in segments.items() if not names), None)
    classes: dict[int, str] = {}
    values: dict[str, int] = {}
    for path, names in segments.items():
        for value, name in names.items():
            known = values.get(_plain(name))
            if known == value:
                continue
            if nameless is not None and (known is not None or value in classes):
                raise DataError(
                    f"{path} calls the value {value} {name}, another file has it otherwise, and {nameless} names nothing; put a labels.txt beside the masks"
                )
            if known is None:
                free = value if value not in classes else max(classes) + 1
                classes[free] = name
                values[_plain(name)] = free
    return {value: classes[value] for value in sorted(classes)}


def _segments(path: Path) -> dict[int, str]:
    """Names of the values, in a format that can have them."""
    return segment_names(path) if path.name.lower().endswith(".nrrd") else {}


def _plain(name: str) -> str:
    return name.strip().casefold()


def _stem(path: Path) -> str:
    return path.stem if _is_dicom_mask(path) else stem_of(path)


def _is_dicom_mask(path: Path) -> bool:
    return path.suffix.lower() == ".dcm"
