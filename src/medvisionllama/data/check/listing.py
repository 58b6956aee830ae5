"""Rules on a dataset's list of files, before any is opened."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medvisionllama.data.check.findings import Finding
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.dicom_header import is_dicom
from medvisionllama.data.formats.dicom_series import files_below, find_series
from medvisionllama.data.formats.itk import is_segmentation
from medvisionllama.data.index import Case, Dataset
from medvisionllama.data.labels import check_class_names
from medvisionllama.data.near_names import unread_files
from medvisionllama.data.readers import SUFFIXES, is_scan, stem_of
from medvisionllama.errors import DataError

_FOLDERS = ("imagesTr", "labelsTr")
_PLAIN = ("images", "labels")


def listing_findings(dataset: Dataset) -> list[Finding]:
    """No cases, a case twice, names that are no text, or files that do not exist: what `open_dataset` refuses."""
    if not dataset.cases:
        unread = [
            name for folder in (*_FOLDERS, *_PLAIN) for name in unread_files(dataset.root / folder).values()
        ]
        step = "put images and labels of the same names there"
        if unread:
            step = f"{unread[0]} and the like are of a format that is not read: save them as {SUFFIXES[0]}"
        return [Finding("layout", f"{dataset.root} holds no labelled cases; {step}")]
    findings = []
    by_name = defaultdict(list)
    for case in dataset.cases:
        by_name[case.case_id].append(case)
    for case_id, cases in by_name.items():
        if len(cases) > 1:
            findings.append(Finding("listed-twice", f"{dataset.root}: {_twice(case_id, cases)}", (case_id,)))
    for case in dataset.cases:
        if not _is_text(case.case_id):
            # It would have no name in tables and pages.
            message = f"{dataset.root}: {case.case_id!r} is no name in UTF-8; rename its image and its label"
            findings.append(Finding("name-not-text", message, (case.case_id,), case.images[0]))
        for path in (*case.images, *([case.label] if case.label else [])):
            if not path.exists():
                message = f"{dataset.root}: {path} is named by the dataset but does not exist; restore it or remove the case"
                findings.append(Finding("missing-file", message, (case.case_id,), path))
    return findings


def _is_text(name: str) -> bool:
    """Whether a name can be written; bytes that are no UTF-8 are kept in a file's name as they are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def class_name_findings(dataset: Dataset) -> list[Finding]:
    """Names of classes by which `train` refuses to tell them apart, unless it merges all of them."""
    try:
        check_class_names(dataset.classes, dataset.root)
    except DataError as error:
        return [Finding("class-names", str(error))]
    return []


def _twice(case_id: str, cases: Sequence[Case]) -> str:
    places = list(dict.fromkeys(str(case.images[0]) for case in cases))
    if len(places) > 1:
        return f"{' and '.join(places[:2])} are both the case {case_id!r}; give them different names"
    times = "twice" if len(cases) == 2 else f"{len(cases)} times"
    return f"the case {case_id!r} is listed {times}; remove one"


def present(dataset: Dataset) -> Dataset:
    """The dataset without repeated cases and without those that lack a file."""
    cases: dict[str, Case] = {}
    for case in dataset.cases:
        if all(path.exists() for path in (*case.images, *([case.label] if case.label else []))):
            cases.setdefault(case.case_id, case)
    return replace(dataset, cases=tuple(cases.values()))


def name_findings(dataset: Dataset) -> list[Finding]:
    """Labels that carry another case's name, and files that nobody lists."""
    findings = []
    names = {case.case_id for case in dataset.cases}
    for case in dataset.cases:
        stem = stem_of(case.label) if case.label else case.case_id
        if stem != case.case_id and stem in names:
            message = f"{dataset.root}: the case {case.case_id!r} is paired with the label of {stem!r}; is the list right?"
            findings.append(Finding("pair-names", message, (case.case_id,), case.label))
    listed = (*dataset.cases, *dataset.excluded)
    used = {path.resolve() for case in listed for path in (*case.images, case.label) if path}
    for name in _FOLDERS:
        folder = dataset.root / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        unlisted = [path.name for path in files if is_scan(path) and path.resolve() not in used]
        if unlisted:
            message = f"{folder}: no case uses {len(unlisted)} of its files ({_shown(unlisted)}); list them or move them away"
            findings.append(Finding("unlisted-file", message, file=folder))
    for name in (*_FOLDERS, *_PLAIN):
        folder = dataset.root / name
        if unread := list(unread_files(folder).values()):
            message = f"{folder}: {len(unread)} files are of a format that is not read ({_shown(unread)}); save them as {SUFFIXES[0]}, or move them away"
            findings.append(Finding("unlisted-file", message, file=folder))
    return findings


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def scans_in(path: Path) -> list[ScanSource]:
    """Scans of a folder that is no dataset: files we read, at any depth, and the DICOM series that predict finds.

    Masks are left out: what is in folders named labels or masks, and files of segments.

    Raises:
        OSError: a folder cannot be listed.
    """
    if path.is_file():
        return [path]
    files = [child for child in files_below(path) if not _holds_masks(child.relative_to(path).parent)]
    found = [child for child in files if is_scan(child) and not is_segmentation(child)]
    try:
        series = find_series(path)
    except DataError:
        # A damaged file: each folder is a case then, so that the file is named and the others are checked.
        return [*sorted({*found, *(child.parent for child in files if _is_slice(child))})]
    return [*found, *(one for one in series if not _holds_masks(one.folder.relative_to(path)))]


def _holds_masks(folder: Path) -> bool:
    return any(part.lower().startswith(("labels", "masks")) for part in folder.parts)


def _is_slice(path: Path) -> bool:
    """A DICOM file, with or without a suffix."""
    return not is_scan(path) and (path.suffix.lower() in {".dcm", ".ima"} or is_dicom(path))
