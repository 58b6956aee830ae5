"""What a dataset folder holds: its cases, channels and classes, whatever its layout.

`open_dataset` recognises the layout; each layout has one file (`msd.py`, `folder.py`) that returns a `Dataset`.
"""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medvisionllama.config import DataConfig
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.data.labels import check_class_names
from medvisionllama.errors import DataError

if TYPE_CHECKING:
    from medvisionllama.data.check.findings import Finding

# BIDS: the label of the subject ends at the next underscore. ADNI: site, S, number.
_SUBJECT = re.compile(r"(?:sub-[a-z0-9]+|(?:ADNI_)?\d{3}_S_\d{4,5})(?=_|$)", re.IGNORECASE)
# What may follow a patient's name in a file name: cardiac frames and phases, visits, sessions, time points, scans
# of one study. Volumes that differ only from there on are one patient.
_MARK = re.compile(
    r"[_. -](?:(?P<sure>frame|phase|ph|time[_. -]?point|time|tp|visit|session|ses)(?:[_. -]?\d+[a-z]?)?"
    r"|(?:t|scan|run|ed|es)(?:[_. -]?(?P<number>\d+))?)(?=[_. -]|$)",
    re.IGNORECASE,
)
# A part of a name in brackets, which are no more than a way to write it.
_BRACKETS = re.compile(r"(?<=[_. -])[(\[{]([^()\[\]{}]*)[)\]}]")
# What may follow a mark that is a common word or a sequence of MR too: words, none of them a patient's number.
_WORDS = re.compile(r"(?:[_. -](?:[a-z]+|t[12][a-z]*))*", re.IGNORECASE)
_TIME = r"(?:[01]\d|2[0-3])(?:[0-5]\d){2}"
# A day, which ends a name as a visit does: P001_20200115, P001_2020-01-15_ct. With the time to the second it names
# an acquisition, and what follows counts within that: P001_CT_20200115103045_3, as dcm2niix has it. Some archives
# write parts of the second too.
_DATED = re.compile(
    r"(?P<stem>.+?)[_. -](?:19|20)\d\d(?P<between>[-_.]?)(?:0[1-9]|1[0-2])(?P=between)(?:0[1-9]|[12]\d|3[01])"
    rf"(?:{_WORDS.pattern}|(?:t?{_TIME}\d{{0,6}}|[_. -]t?{_TIME})(?P<rest>(?:[_. -].*)?))",
    re.IGNORECASE,
)
PERSON = re.compile(r"[_. -](?:patient|pat|pt|subject|subj|sub|case|p|s)[_. -]?\d", re.IGNORECASE)
# Numbered, but nobody: `site2_scan_001` is the first patient of a site, not the first scan of a patient.
PLACE = re.compile(
    r"(?:\D*[_. -])?(?:(?:site|cent(?:er|re)|hospital|clinic|cohort|dataset|vendor|scanner)[_. -]?\d+"
    r"|[1-9]t|[234]d|t[12][a-z]*)",
    re.IGNORECASE,
)
# What any scan may be called: of `scan_20200115` the day alone says who it is.
_ANYBODY = re.compile(
    r"(?:scan|image|img|volume|vol|case|patient|subject|study|series|exam|ct|mri?|pet|[\W_])+", re.IGNORECASE
)


@dataclass(frozen=True)
class Case:
    """One image with its label."""

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    label: Path | None
    series: Series | None = None
    """Which of several DICOM series, where `images` is the folder that holds them."""

    @property
    def sources(self) -> tuple[ScanSource, ...]:
        """What to read, one per channel file."""
        return self.images if self.series is None else (self.series,)


@dataclass(frozen=True)
class Dataset:
    """A task: labelled cases, channel names, and class names by label value (background left out).

    `classes` is empty for layouts that declare none; preprocessing then takes the values it finds.
    """

    name: str
    root: Path
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    classes: dict[int, str]
    excluded: tuple[Case, ...] = ()
    """Cases that were left out by name."""

    @property
    def patients(self) -> dict[str, str]:
        """Patient of each case."""
        return {case.case_id: case.patient_id for case in self.cases}

    def only(self, patients: Collection[str]) -> "Dataset":
        """The same without the cases of others."""
        return replace(self, cases=tuple(case for case in self.cases if case.patient_id in patients))


def open_configured(data: DataConfig, *, begun: bool = False) -> Dataset:
    """Open the dataset of a run as its settings say.

    Args:
        begun: the run has begun; whom it leaves out may be gone since.

    Raises:
        DataError: as `open_dataset`, or classes whose names its tables could not tell apart.
    """
    assert data.path is not None, "checked by the caller"
    dataset = open_dataset(
        data.path, patient_pattern=data.patient_pattern, exclude=data.exclude, may_be_gone=begun
    )
    if data.labels == "all":
        check_class_names(dataset.classes, dataset.root)
    return dataset


def open_dataset(
    root: Path,
    *,
    patient_pattern: str | None = None,
    exclude: Sequence[str] = (),
    may_be_gone: bool = False,
) -> Dataset:
    """Index an MSD folder, an nnU-Net raw folder, or a folder with images/ and labels/.

    Args:
        exclude: cases and patients that are left out as if they were not there.
        may_be_gone: do without those names in `exclude` that are not there indeed.

    Raises:
        DataError: no such folder, no layout recognised, or files that the layout promises are absent; the first of
            them, with the number of the others.
    """
    from medvisionllama.data.check.findings import raise_first
    from medvisionllama.data.check.listing import listing_findings

    dataset, problems = index_dataset(
        root, patient_pattern=patient_pattern, exclude=exclude, may_be_gone=may_be_gone
    )
    raise_first([*problems, *listing_findings(dataset)], dataset.root)
    return dataset


def index_dataset(
    root: Path,
    *,
    patient_pattern: str | None = None,
    exclude: Sequence[str] = (),
    may_be_gone: bool = False,
) -> tuple[Dataset, list["Finding"]]:
    """Index a dataset as `open_dataset` does, but only list what is wrong with names of files and segments.

    Whether the files exist is not asked.

    Raises:
        DataError: no such folder, no layout recognised, or a name in `exclude` that is no case's and no patient's.
    """
    from medvisionllama.data.check.segments import name_segments

    dataset, findings = _index(root, patient_pattern, exclude)
    names = {name for case in dataset.cases for name in (case.case_id, case.patient_id)}
    # A case that is left out for its faults may be known by them alone.
    faulty = {case_id: patient_of(case_id, patient_pattern) for one in findings for case_id in one.cases}
    names |= {*faulty, *faulty.values()}
    findings = [
        one
        for one in findings
        if not one.cases or not all({name, faulty[name]} & set(exclude) for name in one.cases)
    ]
    unknown = sorted(set(exclude) - names)
    if unknown and not may_be_gone:
        raise DataError(
            f"{dataset.root} has no case and no patient {unknown[0]!r} to leave out (data.exclude); correct the name"
        )
    excluded = tuple(case for case in dataset.cases if {case.case_id, case.patient_id} & set(exclude))
    kept = tuple(case for case in dataset.cases if case not in excluded)
    dataset, found = name_segments(replace(dataset, cases=kept, excluded=excluded))
    return dataset, [*findings, *found]


def _index(
    root: Path, patient_pattern: str | None, exclude: Sequence[str]
) -> tuple[Dataset, list["Finding"]]:
    from medvisionllama.data import folder, msd

    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder; give an MSD folder, an nnU-Net raw folder, or one with images/ and labels/"
        )
    if (root / "dataset.json").is_file():
        content = msd.read_dataset_json(root / "dataset.json")
        dataset = (
            msd.index(root, content, patient_pattern)
            if "training" in content and not folder.is_nnunet(root, content)
            else folder.index_nnunet(root, content, patient_pattern)
        )
    elif (root / "images").is_dir() and (root / "labels").is_dir():
        return folder.index_plain(root, patient_pattern, exclude)
    else:
        raise folder.no_dataset(root)
    return dataset, []


def patient_of(case_id: str, pattern: str | None = None) -> str:
    """Name the patient of a case.

    Args:
        pattern: regular expression whose first group is the patient, or the whole match if it has none.

    >>> patient_of("patient003_frame15"), patient_of("sub-01_ses-2_T1w"), patient_of("hippocampus_003")
    ('patient003', 'sub-01', 'hippocampus_003')
    """
    if pattern is None:
        # P03 (visit 2) is P03 visit 2.
        plain = _BRACKETS.sub(r"\1", case_id)
        found = _patient_by_rule(plain)
        return case_id if found == plain else found
    try:
        match = re.search(pattern, case_id)
    except re.error as error:
        raise DataError(f"data.patient_pattern={pattern!r} is not a regular expression: {error}") from None
    patient = match and (match.group(1) if match.groups() else match.group(0))
    if not patient:
        raise DataError(
            f"data.patient_pattern={pattern!r} does not match the case {case_id!r}; every case needs a patient"
        )
    return patient


def patient_of_stranger(case_id: str, pattern: str | None) -> str:
    """Name the patient of a scan of no dataset: by a dataset's pattern where it fits the name, else by the rule."""
    with suppress(DataError):
        return patient_of(case_id, pattern)
    return patient_of(case_id)


def _patient_by_rule(case_id: str) -> str:
    """The part before the first mark of a frame, phase, visit, time point or day; else the whole name."""
    if subject := _SUBJECT.match(case_id):
        return subject[0]
    cuts = (found.start() for found in _MARK.finditer(case_id) if _ends_patient(case_id, found))
    patient = case_id[: next(cuts, len(case_id))]
    if dated := _DATED.fullmatch(patient):
        before = _patient_by_rule(dated["stem"])
        # LiTS_20200115103045_P001 has its patient at the end.
        named = not dated["rest"] or re.search(r"\d", before)
        if named and not PLACE.fullmatch(before) and not _ANYBODY.fullmatch(before):
            return before
    return patient


def _ends_patient(case_id: str, mark: re.Match[str]) -> bool:
    """What comes before a mark numbers somebody, and what comes after it nobody else."""
    stem, rest = case_id[: mark.start()], _MARK.sub("", case_id[mark.end() :])
    # scan_001 and scan_002 are two patients, not one called "scan".
    if not re.search(r"\d", stem):
        return False
    if PLACE.fullmatch(stem):
        return bool(mark["sure"]) and not re.search(r"\d", rest)
    if mark["sure"]:
        return not PERSON.search(rest)
    # Three digits number the scans of a study rather than those of a patient: LiTS17_scan_001_ct.
    return not rest or (len(mark["number"] or "") <= 2 and bool(_WORDS.fullmatch(rest)))
