"""Which scans are explained, and which mask their maps are scored against."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medvisionllama.config import Config
from medvisionllama.data.index import Case, open_configured, patient_of_stranger
from medvisionllama.data.labels import label_on_grid
from medvisionllama.data.planning import Plan
from medvisionllama.data.readers import ScanSource, read_label
from medvisionllama.data.volume import Volume
from medvisionllama.errors import CheckpointError, ConfigError, DataError
from medvisionllama.evaluation.evaluate import Split, merged_foreground, open_dataset_of, parts_of
from medvisionllama.evaluation.masks import read_mask
from medvisionllama.inference.inputs import collect_scans, files_of_scan
from medvisionllama.run_dir import RunDir
from medvisionllama.types import LabelArray

PREDICTION = "prediction"
"""The truth of a scan without a label: what the network itself says."""


@dataclass(frozen=True)
class ScanToExplain:
    """A scan, and where its true mask is."""

    case_id: str
    patient_id: str
    images: tuple[ScanSource, ...]
    label: Path | None
    """None where only the network's own mask is left to score against."""
    named: bool = False
    """The label was given by the user, and is not the dataset's."""
    part: str = ""
    """`train`, `validation` or `test` of the run; empty for a scan that is not of its dataset."""
    trained_here: bool = False
    """A case or patient of this name trained the run, as far as names tell: the scan is none of its dataset's."""
    trained_other: bool = False
    """The run that it is compared with was trained on a patient of this name."""
    trained_before: bool = False
    """A case or patient of this name trained a run whose weights the run began with."""

    @property
    def files(self) -> list[Path]:
        """Everything that is read of it, its mask too."""
        images = files_of_scan(self.images)
        return images if self.label is None else [*images, self.label]

    @property
    def truth(self) -> str:
        """Whose mask the maps are scored against, for the table."""
        if self.label is None:
            return PREDICTION
        return "label" if self.named else "dataset"


def scans_to_explain(
    run_dir: RunDir,
    config: Config,
    plan: Plan,
    images: Sequence[Path],
    *,
    split: Split | None,
    label: Path | None,
) -> list[ScanToExplain]:
    """List the scans of files, or of a split of the run's dataset.

    Raises:
        ConfigError: both or neither of images and split, or a label for several scans.
        DataError: scans that do not exist or do not fit the run, or a dataset that has moved.
    """
    if bool(images) == (split is not None):
        raise ConfigError("give either images to explain or --split test (or validation), and not both")
    if split:
        if label is not None:
            raise ConfigError("--label is the mask of one image; a split has the dataset's labels")
        dataset = open_dataset_of(run_dir, config, split, instead="give images to explain")
        parts = parts_of(run_dir)
        return [_of_dataset(case, split) for case in dataset.cases if parts.get(case.case_id) == split]
    scans = collect_scans(images, channels=plan.channels)
    if label is not None and len(scans) != 1:
        raise ConfigError(f"--label is the mask of one image, but {len(scans)} scans were given; give one")
    if label is not None and not label.exists():
        raise DataError(f"{label} does not exist; give the image's own mask with --label, or leave it out")
    known, parts = _known_cases(run_dir, config)
    result = []
    for scan in scans:
        case = known.get(_places(scan.images)) or known.get(_places(scan.images, by_folder=True))
        if case is not None:
            found = _of_dataset(case, parts.get(case.case_id, ""))
        else:
            patient = patient_of_stranger(scan.case_id, config.data.patient_pattern)
            found = ScanToExplain(scan.case_id, patient, scan.images, None)
        if label is not None:
            found = ScanToExplain(
                found.case_id, found.patient_id, found.images, label, named=True, part=found.part
            )
        result.append(found)
    return result


def read_truth(scan: ScanToExplain, image: Volume, plan: Plan) -> LabelArray:
    """Read the true mask of a scan in RAS, with the values that the run's masks have.

    Raises:
        DataError: unreadable, or on another grid than the image.
    """
    assert scan.label is not None, "the caller asked"
    by_name = scan.named and not plan.merged
    found = read_mask(scan.label, plan.mask_classes) if by_name else read_label(scan.label)
    truth = label_on_grid(scan.label, found, image.shape, image.affine)
    return (merged_foreground(truth) if plan.merged else truth).array


def _of_dataset(case: Case, part: str) -> ScanToExplain:
    return ScanToExplain(case.case_id, case.patient_id, case.sources, case.label, part=part)


def _known_cases(run_dir: RunDir, config: Config) -> tuple[dict[frozenset[Path], Case], dict[str, str]]:
    """Cases of the run's dataset by their files, if it is still where it was."""
    if config.data.path is None or not config.data.path.is_dir():
        return {}, {}
    try:
        dataset = open_configured(config.data, begun=True)
        parts = parts_of(run_dir)
    except (CheckpointError, DataError):
        # A dataset that has changed since says nothing about this scan, which may be of no dataset at all.
        return {}, {}
    return {_places(case.sources): case for case in dataset.cases}, parts


def _places(sources: Sequence[ScanSource], *, by_folder: bool = False) -> frozenset[Path]:
    """Where a scan is: two scans of one place are one.

    Args:
        by_folder: a DICOM series is known by its folder alone, as in a dataset with one series a folder.
    """

    def place(source: ScanSource) -> Path:
        if isinstance(source, Path):
            return source.resolve()
        folder = source.folder.resolve()
        return folder if by_folder else folder / source.series_uid

    return frozenset(map(place, sources))
