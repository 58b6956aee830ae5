"""`check_dataset`: read every case in parallel, apply every rule."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medvisionllama._machine import scans_at_once
from medvisionllama.data.check.case_rules import value_findings
from medvisionllama.data.check.division import division_findings, leak_findings, read_division
from medvisionllama.data.check.examine import examine_case
from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.findings import Finding, path_of
from medvisionllama.data.check.headers import (
    channel_findings,
    grid_findings,
    read_headers,
)
from medvisionllama.data.check.listing import (
    class_name_findings,
    listing_findings,
    name_findings,
    present,
    scans_in,
)
from medvisionllama.data.check.mirrors import label_mirror_findings
from medvisionllama.data.check.patients import patient_findings, patient_name_findings, person_findings
from medvisionllama.data.check.places import (
    axis_order_findings,
    identity_findings,
    mirror_findings,
    orientation_findings,
    side_findings,
    storage_findings,
)
from medvisionllama.data.check.report import CheckReport
from medvisionllama.data.check.rules import (
    class_findings,
    ct_findings,
    duplicate_findings,
    intensity_findings,
    outlier_findings,
)
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.data.formats.header import why_unreadable
from medvisionllama.data.index import Case, Dataset, index_dataset
from medvisionllama.data.labels import whole_label
from medvisionllama.data.near_names import datasets_in, misnamed_folders
from medvisionllama.data.readers import read_voxels, stem_of
from medvisionllama.data.volume import Volume, to_ras
from medvisionllama.errors import DataError
from medvisionllama.progress import Progress, Silent

Look = Callable[[CaseFacts, Sequence[Volume], Volume | None, Mapping[int, str]], None]
"""Shown each case while its voxels are in memory, in RAS; called from several threads."""


def check_dataset(
    root: Path,
    *,
    fast: bool = False,
    splits: Path | None = None,
    patient_pattern: str | None = None,
    exclude: Sequence[str] = (),
    look: Look | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Find what would break or mislead training on a dataset, or on scans without labels.

    Args:
        root: a dataset's folder; or a scan, or a folder of scans, whose images alone are then checked.
        fast: read headers only.
        splits: a splits file that must fit the dataset.
        exclude: cases and patients to leave out, as `data.exclude` does in training.
        look: called with each case's voxels, for pictures.

    Raises:
        DataError: there is nothing at `root` that could be checked.
    """
    root = Path(root)
    dataset, findings, labelled = _open(root, patient_pattern, exclude)
    listed = labelled and not any(finding.code == "layout" for finding in findings)
    whole = present(dataset)
    if listed:
        findings += listing_findings(dataset)
        findings += name_findings(dataset)
        findings += class_name_findings(dataset)
        if dataset.cases:
            findings += patient_findings(dataset.cases)
    facts, found = _examine(whole, labelled=labelled, fast=fast, look=look, progress=progress or Silent())
    # Of labels in layers the listing says more than their headers.
    layered = {finding.file for finding in findings if finding.code == "label-channels"}
    findings += [
        finding for finding in found if finding.code != "label-channels" or finding.file not in layered
    ]
    findings += dataset_findings(facts, dataset)
    if splits is not None:
        drawn, found = read_division(splits)
        findings += found
        if drawn is not None and dataset.cases:
            findings += division_findings(drawn, dataset.patients, splits)
            findings += leak_findings(drawn, dataset.patients, findings, splits)
    return CheckReport(
        root=root,
        name=dataset.name,
        num_cases=len(dataset.cases),
        num_patients=len(set(dataset.patients.values())),
        channels=dataset.channels,
        classes=dataset.classes,
        fast=fast,
        findings=tuple(sorted(findings, key=lambda finding: finding.rank)),
        facts=tuple(facts),
    )


def dataset_findings(facts: Sequence[CaseFacts], dataset: Dataset) -> list[Finding]:
    """Every rule that looks at all cases together."""
    # Scans without labels are not divided.
    labelled = [case for case in dataset.cases if case.label is not None]
    return [
        # First, as `train` shows the first one: what a scan says of itself is surer than what names look like.
        *(person_findings(facts) if labelled else []),
        *patient_name_findings(labelled),
        *class_findings(facts, dataset.classes),
        *duplicate_findings(facts),
        *ct_findings(facts, dataset.channels),
        *intensity_findings(facts, dataset.channels),
        *outlier_findings(facts, dataset.classes),
        *storage_findings(facts),
        *identity_findings(facts),
        *orientation_findings(facts),
        *mirror_findings(facts),
        *label_mirror_findings(facts),
        *axis_order_findings(facts),
        *side_findings(facts, dataset.classes),
    ]


def _open(root: Path, pattern: str | None, exclude: Sequence[str]) -> tuple[Dataset, list[Finding], bool]:
    """Dataset, what its listing says, and whether it has labels."""
    try:
        dataset, findings = index_dataset(root, patient_pattern=pattern, exclude=exclude)
    except DataError as error:
        if root.is_dir() and _means_to_be_a_dataset(root):
            # So what is wrong with it is a finding like others.
            return Dataset(root.name, root, (), (), {}), [Finding("layout", str(error))], True
        scans = scans_in(root) if root.exists() and not (root.is_dir() and datasets_in(root)) else []
        if not scans:
            raise
        cases = tuple(_scan_case(root, path) for path in scans)
        message = f"{root} is no dataset; {len(cases)} scan{' was' if len(cases) == 1 else 's were'} checked as images, without labels"
        return Dataset(root.name, root, cases, ("image",), {}), [Finding("no-labels", message)], False
    return dataset, findings, True


def _means_to_be_a_dataset(root: Path) -> bool:
    return (
        (root / "dataset.json").is_file()
        or (root / "images").is_dir()
        or (not datasets_in(root) and bool(misnamed_folders(root)))
    )


def _scan_case(root: Path, source: ScanSource) -> Case:
    path = path_of(source)
    if isinstance(source, Series):
        inside = path.relative_to(root).as_posix() if path != root and root.is_dir() else ""
        case_id = f"{inside}/{source.name}".lstrip("/")
        return Case(case_id, case_id, (path,), None, source)
    name = path.relative_to(root).as_posix() if path != root else path.name
    case_id = name[: len(name) - len(path.name)] + stem_of(path)
    return Case(case_id, case_id, (path,), None)


def _examine(
    dataset: Dataset, *, labelled: bool, fast: bool, look: Look | None, progress: Progress
) -> tuple[list[CaseFacts], list[Finding]]:
    """Read the cases, several at a time; results are in the order of the dataset."""

    def one(case: Case) -> tuple[CaseFacts | None, list[Finding]]:
        return _examine_one(case, dataset, labelled=labelled, fast=fast, look=look)

    results = []
    pool = ThreadPoolExecutor(max_workers=scans_at_once())
    try:
        with progress.track("checking scans", len(dataset.cases)) as advance:
            for number, result in enumerate(pool.map(one, dataset.cases), start=1):
                results.append(result)
                advance(number, dataset.cases[number - 1].case_id)
    except BaseException:
        # Ctrl-C: let go of the cases not begun.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return [facts for facts, _ in results if facts is not None], [
        finding for _, findings in results for finding in findings
    ]


def _examine_one(
    case: Case, dataset: Dataset, *, labelled: bool, fast: bool, look: Look | None
) -> tuple[CaseFacts | None, list[Finding]]:
    facts, findings = read_headers(case)
    if facts is None:
        return None, findings
    findings += grid_findings(facts)
    if labelled:
        findings += channel_findings(facts, dataset.channels)
    if fast:
        return facts, findings
    volumes: list[Volume | None] = []
    for file in facts.files:
        try:
            volumes.append(to_ras(read_voxels(file.path)))
        except (DataError, OSError) as error:
            message = why_unreadable(file.path, error)
            findings.append(Finding("unreadable", message, (case.case_id,), file.path))
            volumes.append(None)
        except MemoryError:
            message = f"{file.path} of shape {file.header.shape} does not fit into memory; is its header right? Crop it, or check it on a machine with more"
            findings.append(Finding("unreadable", message, (case.case_id,), file.path))
            volumes.append(None)
    images = [volume for volume in volumes[: len(facts.images)] if volume is not None]
    if len(images) < len(facts.images):
        return facts, findings
    label = volumes[-1] if facts.label is not None else None
    if label is not None:
        # Several channels were reported from the header.
        label = Volume(label.array[0], label.affine) if len(label.array) == 1 else None
    if label is not None and facts.label is not None:
        label = whole_label(facts.label.path, label, images[0].shape, images[0].affine)
    facts = examine_case(facts, [image.array for image in images], None if label is None else label.array)
    findings += value_findings(facts, dataset.channels, dataset.classes)
    if look is not None:
        look(facts, images, label, dataset.classes)
    return facts, findings
