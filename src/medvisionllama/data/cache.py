"""Each case preprocessed once: RAS, target grid, memory-mapped; keyed by file content and settings.

Intensities are stored as read. Normalisation is two numbers a channel, applied to the crop (`normalisation.py`); so
CT statistics may come from the training cases of a fold while all folds share one cache.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray

from medvisionllama._files import atomic_path, canonical_hash, locked_folder, user_cache, write_json
from medvisionllama._machine import scans_at_once
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.dicom_series import Series, files_of
from medvisionllama.data.index import Case
from medvisionllama.data.labels import whole_label
from medvisionllama.data.normalisation import image_moments
from medvisionllama.data.planning import Plan
from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.resample import resample_image, resample_label, shape_at
from medvisionllama.data.volume import Volume, to_ras
from medvisionllama.errors import DataError
from medvisionllama.types import ImageArray, LabelArray, SpacingMm

_FORMAT = 8
_CENTRES_PER_CLASS = 1000
_SAMPLES = 10_000


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case, its arrays memory maps opened when asked for; without a label it has the image alone."""

    case_id: str
    patient_id: str
    folder: Path
    facts: dict[str, Any]

    @property
    def image(self) -> ImageArray:
        return self._load("image")

    @property
    def label(self) -> LabelArray:
        """Label values on the training grid."""
        return self._load("label")

    @property
    def native_label(self) -> LabelArray:
        """Label values on the scan's own grid, in RAS: what predictions are scored against."""
        return self._load("native_label" if self.facts["resampled"] else "label")

    @property
    def centres(self) -> np.ndarray:
        """Rows of label value, x, y, z: up to a thousand voxels of each class."""
        return self._load("centres")

    @property
    def native_spacing_mm(self) -> SpacingMm:
        x, y, z = self.facts["spacing_mm"]
        return (x, y, z)

    @property
    def content_sha256(self) -> str:
        return str(self.facts["content_sha256"])

    def _load(self, name: str) -> np.ndarray:
        return _load(self.folder, name)


@dataclass(frozen=True)
class PseudoLabelledCase(CachedCase):
    """A preprocessed scan without a label, and a mask that stands for one."""

    masks: Path
    """Folder of the arrays that `write_pseudo_label` makes."""

    @property
    def label(self) -> LabelArray:
        return _load(self.masks, "label")

    @property
    def centres(self) -> np.ndarray:
        return _load(self.masks, "centres")


def write_pseudo_label(label: LabelArray, folder: Path) -> None:
    """Keep a mask `[x, y, z]` on the training grid for a `PseudoLabelledCase`."""
    _save_arrays({"label": label, "centres": _centres(label)}, folder)


def has_pseudo_label(folder: Path) -> bool:
    """Whether a mask was kept there, all of it."""
    return (folder / "centres.npy").is_file()  # written last


def _load(folder: Path, name: str) -> np.ndarray:
    array: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return array


def _save_arrays(arrays: Mapping[str, np.ndarray], folder: Path) -> dict[str, int]:
    """Write arrays and return the bytes of each file."""
    sizes = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        with atomic_path(folder / f"{name}.npy") as temporary:
            try:
                with temporary.open("wb") as file:
                    # Not np.save: its writer hides a full disk's error number.
                    write_array_header_1_0(file, header_data_from_array_1_0(array))
                    file.write(array.reshape(-1).view(np.uint8).data)
            except OSError as error:
                error.filename = str(folder)
                raise
            sizes[name] = temporary.stat().st_size
    return sizes


def build_cache(
    cases: Sequence[Case],
    plan: Plan,
    *,
    folder: Path | None = None,
    workers: int | None = None,
    on_case: Callable[[], None] = lambda: None,
) -> tuple[CachedCase, ...]:
    """Preprocess cases in parallel, skipping those already there.

    Args:
        folder: where the cache lives; by default the user's cache folder.
        workers: threads; by default as many as cores, but at most four.
        on_case: called after each case, for a progress bar.

    Raises:
        DataError: a case cannot be read, or has label values that the dataset does not declare.
    """
    root = folder or user_cache() / "preprocessed"

    def prepare(case: Case) -> CachedCase:
        result = _prepare(case, plan, root)
        on_case()
        return result

    # Each worker holds a few copies of a whole scan, so their number must not grow with the cores.
    with ThreadPoolExecutor(max_workers=workers or scans_at_once()) as pool:
        futures = [pool.submit(prepare, case) for case in cases]
        try:
            return tuple(future.result() for future in futures)
        except BaseException:
            # Do not let the remaining cases be read for nothing before the error is shown.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def found_classes(cases: Sequence[CachedCase]) -> dict[int, str]:
    """Classes of a dataset that declares none: every label value met."""
    values = sorted({value for case in cases for value in label_values(case)})
    if not values:
        raise DataError("every label is empty; check that labels/ holds the masks and not the images")
    return {value: f"class {value}" for value in values}


def label_values(case: CachedCase) -> set[int]:
    """Values in a case's label but for background."""
    return {int(value) for value in case.facts["class_voxels"]} - {0}


def describe(cases: Sequence[CachedCase], plan: Plan) -> dict[str, Any]:
    """The fingerprint's second half, from the voxels of `cases`: volumes by class, intensities by channel.

    Quartiles over cases; foreground intensities leave out cases without a labelled voxel.
    """
    volumes = {
        name: [
            case.facts["class_voxels"].get(str(value), 0) * math.prod(case.native_spacing_mm) / 1000
            for case in cases
        ]
        for value, name in plan.classes.items()
    }
    labelled = [case for case in cases if len(case.centres)]
    return {
        "class_volume_ml": {name: _quartiles(values) for name, values in volumes.items()},
        "intensity_mean": {
            channel: {
                "scan": _quartiles([case.facts["moments"][index][0] for case in cases]),
                "foreground": _quartiles([case.facts["foreground_moments"][index][0] for case in labelled]),
            }
            for index, channel in enumerate(plan.channels)
        },
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in np.percentile(values, [25, 50, 75])] if len(values) else []


def _moments(voxels: np.ndarray) -> tuple[float, float]:
    if voxels.size == 0:
        return 0.0, 0.0
    return float(voxels.mean(dtype=np.float64)), float(voxels.std(dtype=np.float64))


def to_grid(volume: Volume, plan: Plan, source: object = "the scan") -> ImageArray:
    """Bring an image in RAS to the grid that the network sees.

    Args:
        source: how an error names the image.

    Raises:
        DataError: that grid is larger than the machine's memory, as where a header is off by a factor of 1,000.
    """
    if plan.resize:
        return resample_image(volume.array, plan.crop_size)
    shape = shape_at(volume.shape, volume.spacing_mm, plan.spacing_mm)
    if 4 * len(volume.array) * math.prod(shape) > psutil.virtual_memory().total:
        voxel, grid = " × ".join(f"{edge:.4g}" for edge in volume.spacing_mm), "×".join(map(str, shape))
        raise DataError(
            f"{source}: with voxels of {voxel} mm it would take {grid} voxels on the run's grid, more than this machine holds; correct the spacing in its header"
        )
    return resample_image(volume.array, shape)


def _prepare(case: Case, plan: Plan, root: Path) -> CachedCase:
    digest = hashlib.sha256()
    files = case.sources if case.label is None else (*case.sources, case.label)
    contents = [_digested(path, digest) for path in files]
    content = digest.hexdigest()
    settings = {
        "format": _FORMAT,
        "spacing": plan.spacing_mm,
        "resize": plan.crop_size if plan.resize else None,
        "ct": [rule == "dataset" for rule in plan.channel_rules],
    }
    folder = root / canonical_hash([content, settings])[:32]
    facts = _facts_of(folder)
    if facts is None:
        with _alone_in(folder):
            # Another process may have filled it meanwhile, as runs that start together do.
            facts = _facts_of(folder)
            if facts is None:
                facts = {"content_sha256": content, **_write_arrays(case, contents, plan, folder)}
                # Written last: a folder without it is an unfinished one, and is filled again.
                write_json(folder / "facts.json", facts)
    _check_values(case, facts, plan)
    return CachedCase(case.case_id, case.patient_id, folder, facts)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold an entry while it is filled: as many copies of a scan as processes would fill the memory."""
    folder.mkdir(parents=True, exist_ok=True)
    # Some disks have no locks. There several may write the same, each file whole.
    with locked_folder(folder) as alone:
        if alone:
            # Of a process that was killed.
            for left in folder.glob(".partial-*"):
                left.unlink(missing_ok=True)
        yield


def _facts_of(folder: Path) -> dict[str, Any] | None:
    """Facts of a folder that is whole; None for one to be filled, or filled again."""
    path = folder / "facts.json"
    if not path.is_file():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, size in facts["array_bytes"].items():
        array = folder / f"{name}.npy"
        if not array.is_file() or array.stat().st_size != size:
            return None
    return facts


def _digested(source: ScanSource, digest: Any) -> bytes | None:
    """Feed a scan's bytes to `digest` and return them; of a DICOM series, only feed them."""
    if isinstance(source, Series) or source.is_dir():
        # What a file manager leaves in a folder is no change of the scan.
        for file in sorted(files_of(source)):
            digest.update(file.read_bytes())
        return None
    content = source.read_bytes()
    digest.update(content)
    return content


def _write_arrays(case: Case, contents: list[bytes | None], plan: Plan, folder: Path) -> dict[str, Any]:
    """Preprocess a case from its files' bytes, the label's last if it has one."""
    image = to_ras(read_image(case.sources, contents[: len(case.sources)]))
    facts = {
        "spacing_mm": image.spacing_mm,
        "moments": image_moments(image.array),
        "ranges": [(float(channel.min()), float(channel.max())) for channel in image.array],
    }
    if case.label is None:
        contents.clear()
        sizes = _save_arrays({"image": to_grid(image, plan, case.sources[0])}, folder)
        return {**facts, "array_bytes": sizes}
    native = to_ras(read_label(case.label, contents.pop()))
    native = whole_label(case.label, native, image.shape, image.affine)
    contents.clear()  # a scan in memory is enough
    grid = to_grid(image, plan, case.sources[0])
    label = resample_label(native.array, (grid.shape[1], grid.shape[2], grid.shape[3]))
    resampled = label.shape != native.array.shape
    arrays = {"image": grid, "label": label, "centres": _centres(label)}
    if resampled:
        arrays["native_label"] = native.array
    sizes = _save_arrays(arrays, folder)
    counts = _counts(native.array, int(native.array.max(initial=0)) + 1)
    inside = np.flatnonzero(native.array)
    return {
        **facts,
        "array_bytes": sizes,
        "resampled": resampled,
        "foreground_moments": [_moments(channel.ravel()[inside]) for channel in image.array],
        "class_voxels": {str(value): int(counts[value]) for value in np.flatnonzero(counts)},
        "grid_dice": _grid_dice(native.array, label, counts) if resampled else {},
        "foreground_samples": _foreground_samples(image.array, inside)
        if "dataset" in plan.channel_rules
        else [],
    }


def _counts(label: LabelArray, number: int) -> NDArray[np.int64]:
    """Voxels of each value below a number, plane by plane: counting takes a copy of eight bytes a voxel."""
    return np.sum([np.bincount(plane.ravel(), minlength=number) for plane in label], axis=0)


def _grid_dice(native: LabelArray, label: LabelArray, counts: NDArray[np.int64]) -> dict[str, float]:
    """Each class's Dice after the way to the network's grid and back, about the most that a prediction can have."""
    x, y, z = native.shape
    back = resample_label(label, (x, y, z))
    found = _counts(back, len(counts))
    back[back != native] = 0
    kept = _counts(back, len(counts))
    values = np.flatnonzero(counts[1:]) + 1
    return {str(value): float(2 * kept[value] / (counts[value] + found[value])) for value in values}


def _centres(label: LabelArray) -> np.ndarray:
    rng = np.random.default_rng(0)
    # One pass over the volume however many classes: sort the labelled voxels by class, in their order.
    inside = np.flatnonzero(label)
    values = label.ravel()[inside]
    inside = inside[np.argsort(values, kind="stable")]
    rows, start = [], 0
    counts = np.bincount(values)
    for value in np.flatnonzero(counts):
        voxels = inside[start : start + counts[value]]
        start += counts[value]
        kept = voxels[rng.permutation(len(voxels))[:_CENTRES_PER_CLASS]]
        rows.append(np.column_stack([np.full(len(kept), value), *np.unravel_index(kept, label.shape)]))
    return np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 4), np.int32)


def _foreground_samples(image: ImageArray, inside: np.ndarray) -> list[list[float]]:
    kept = inside[np.random.default_rng(0).permutation(len(inside))[:_SAMPLES]]
    samples: list[list[float]] = image.reshape(len(image), -1)[:, kept].tolist()
    return samples


def _check_values(case: Case, facts: dict[str, Any], plan: Plan) -> None:
    unknown = sorted({int(value) for value in facts.get("class_voxels", ())} - {0, *plan.classes})
    if plan.classes and unknown:
        declared = ", ".join(f"{value} {name}" for value, name in plan.classes.items())
        raise DataError(
            f"{case.label} holds the label value {unknown[0]}, which the dataset does not declare (0 background, {declared}); declare it too (dataset.json or names.json) or correct the label"
        )
