"""The layout of the Medical Segmentation Decathlon: a dataset.json that lists image and label pairs."""

import json
from pathlib import Path
from typing import Any

from medvisionllama.data.index import Case, Dataset, patient_of
from medvisionllama.data.readers import stem_of
from medvisionllama.errors import DataError


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Read a dataset.json.

    Raises:
        DataError: not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not readable JSON ({error}); repair it or remove it to use images/ and labels/"
        ) from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} must hold a JSON object with the key 'training' (MSD) or 'channel_names' (nnU-Net)"
        )
    return content


def index(root: Path, content: dict[str, Any], patient_pattern: str | None) -> Dataset:
    """Index the `training` list; paths must stay inside the folder."""
    entries = content["training"]
    if not isinstance(entries, list):
        raise DataError(f"{root / 'dataset.json'}: 'training' must be a list of image and label pairs")
    channels = _channels(root, content.get("modality", {"0": "image"}))
    cases = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("image", "label")
        ):
            raise DataError(f"{root / 'dataset.json'}: training[{number}] needs the keys 'image' and 'label'")
        image, label = (inside(root, entry[key]) for key in ("image", "label"))
        case_id = stem_of(image)
        images = _files_of(image, len(channels))
        cases.append(Case(case_id, patient_of(case_id, patient_pattern), images, label))
    return Dataset(
        name=str(content.get("name") or root.name),
        root=root,
        cases=tuple(cases),
        channels=channels,
        classes=_classes(root, content.get("labels", {})),
    )


def _files_of(image: Path, num_channels: int) -> tuple[Path, ...]:
    """The file of a case; or one for each channel, as nnU-Net's first version lists CASE where CASE_0000 lies."""
    if image.exists():
        return (image,)
    case_id = stem_of(image)
    by_channel = tuple(
        image.with_name(f"{case_id}_{number:04d}{image.name.removeprefix(case_id)}")
        for number in range(num_channels)
    )
    return by_channel if all(path.exists() for path in by_channel) else (image,)


def inside(root: Path, relative: str) -> Path:
    """Join a path from a dataset.json to its folder; a file outside is refused, as the list may be a stranger's."""
    path = root / relative
    if "\\" in relative and not path.exists():
        # As Windows writes paths.
        path = root / relative.replace("\\", "/")
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{root / 'dataset.json'} names {relative!r}, which lies outside the folder; copy the file into it"
        )
    return path


def _channels(root: Path, modality: Any) -> tuple[str, ...]:
    try:
        channels = tuple(str(modality[key]) for key in sorted(modality, key=int))
    except (TypeError, ValueError, KeyError):
        channels = ()
    if not channels:
        raise DataError(
            f"{root / 'dataset.json'}: 'modality' must map channel numbers to names, as {{'0': 'MRI'}}"
        )
    return channels


def _classes(root: Path, labels: Any) -> dict[int, str]:
    try:
        classes = {int(value): str(name) for value, name in labels.items()}
    except (AttributeError, TypeError, ValueError):
        raise DataError(
            f"{root / 'dataset.json'}: 'labels' must map label values to names, as {{'1': 'liver'}}"
        ) from None
    for value, name in classes.items():
        check_value(value, name, root / "dataset.json")
    return {value: classes[value] for value in sorted(classes) if value != 0}


def check_value(value: int, name: str, where: Path) -> None:
    """Raise DataError if the value of a class is negative, which no label may hold."""
    if value < 0:
        raise DataError(
            f"{where}: the class {name!r} has the value {value}; allowed: 0 for the background, and 1, 2, 3, ..."
        )
