"""Rules on the names of patients: one who counts as several, and several who count as one.

Which scans are one patient's is read from file names (`patient_of` in `data/index.py`). A name that the rule does
not know puts a patient into training and test at once, and nothing in the results tells.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.findings import Finding
from medvisionllama.data.index import PERSON, PLACE, Case
from medvisionllama.data.splits import LEAST_PATIENTS

_ENDING = re.compile(r"(?:[_. -][a-z]?\d{1,3}|[_. -][a-z]|(?<=\d)[a-z])$", re.IGNORECASE)
# A number of any length is a visit's as well: 1001_10002, OAS30001_MR_d0129, BraTS-GLI-00001-001.
_NUMBERED = re.compile(r"(?P<stem>.*\d.*)[_ -](?P<number>[a-z]?\d+)")
_SEPARATOR = re.compile(r"[_. -]+")
# Two names that differ in one of these alone are one patient's. A day, here, stands in front: 20200115_P001.
_TELLING = re.compile(
    r"left|right|lt|rt|l|r|pre|post|baseline|follow-?up\d*|fu\d*|(?:day|week|month|year|visit|ses|session|tp)\d+"
    r"|(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{6})?"
)
# A day within a name, and whom it follows: P001_20200115_3, P001_15.01.2020. Where what comes after the day may be
# a patient's number the rule leaves it in the name.
_DAYS = re.compile(
    r"(?P<stem>.+)[_. -](?:(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\2(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])([-_.])(?:0[1-9]|1[0-2])\3(?:19|20)\d\d)(?!\d)"
)
# A name that many follow is a study's or a site's; a patient comes a few times.
_MOST_SCANS = 6
# A patient with this many scans, and this many times as many as the others, may be several.
_CROWD, _CROWD_RATIO = 10, 5.0
_STEP = "name the patient by --patient-pattern here and by --set data.patient_pattern in train"


@dataclass(frozen=True)
class _Alike:
    """Patients whose names are equal but for one part."""

    place: int
    names: tuple[str, ...]
    parts: tuple[str, ...]
    rest: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """A `data.patient_pattern` that joins them."""
        if not self.place:
            return "^[^_. -]+[_. -]+(.+)$"
        more = f"(?:[_. -]+[^_. -]+){{{self.place - 1}}}" if self.place > 1 else ""
        return f"^([^_. -]+{more})"


def patient_findings(cases: Sequence[Case]) -> list[Finding]:
    """Too few patients for a split."""
    found = len({case.patient_id for case in cases})
    if found >= LEAST_PATIENTS:
        return []
    message = f"a split needs at least {LEAST_PATIENTS} patients (train, validation, test), found {found}; label more patients, train a single run on all of them without a score (--fold all), or check data.patient_pattern (--patient-pattern)"
    return [Finding("too-few-patients", message)]


def patient_name_findings(cases: Sequence[Case]) -> list[Finding]:
    """Names that look like one patient's but count as several, and patients with far more scans than others."""
    return [*_spelt_otherwise(cases), *(_apart(cases) or _endings(cases)), *_crowds(cases)]


def person_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Scans that say to be one person's and count as several patients.

    Nothing is told by a number that all cases with one have, as some programs write for the anonymous.
    """
    # Of two that share a number beside files of other formats, which have none, one person is likelier.
    num_numbered = max(3, sum(bool(case.persons) for case in cases))
    by_person: dict[str, list[CaseFacts]] = defaultdict(list)
    for case in cases:
        for person in case.persons:
            by_person[person].append(case)
    findings = []
    for group in by_person.values():
        patients = sorted({case.patient_id for case in group})
        if len(patients) < 2 or len(group) >= min(num_numbered, len(cases)):
            continue
        names = tuple(case.case_id for case in group)
        message = f"{' and '.join(names[:2])}{' and others' if len(names) > 2 else ''} have one PatientID but count as {len(patients)} patients, so one person can be trained on and tested; {_STEP}, or rename the scans"
        findings.append(Finding("person-apart", message, names))
    return findings


def _spelt_otherwise(cases: Sequence[Case]) -> list[Finding]:
    """Patients whose names are equal but for small and capital letters."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        spellings[case.patient_id.casefold()].add(case.patient_id)
    groups = [sorted(names) for names in spellings.values() if len(names) > 1]
    if not groups:
        return []
    several = {name for names in groups for name in names}
    message = f"{len(several)} patients differ from another in small and capital letters only, as {' and '.join(groups[0][:2])}; if those are one patient, who would be trained on and tested, rename the scans, or {_STEP}"
    members = tuple(case.case_id for case in cases if case.patient_id in several)
    return [Finding("patients-alike", message, members)]


def _patients(cases: Sequence[Case]) -> list[str]:
    """Names of patients, one spelling of each."""
    names = sorted({case.patient_id for case in cases}, reverse=True)
    return sorted({name.casefold(): name for name in names}.values(), key=str.casefold)


def _apart(cases: Sequence[Case]) -> list[Finding]:
    patients = _patients(cases)
    groups = [*_suspicious(patients), *_followed(patients), *_numbered(patients), *_dated(patients)]
    if not groups:
        return []
    example, names = groups[0], {name for group in groups for name in group.names}
    shown = " and ".join(example.names[:2])
    message = f"{len(names)} patients differ from another in a side, a visit, a last number or the like only, as {shown}; if those are one patient, who would be trained on and tested, {_STEP}, as {example.pattern!r}"
    members = tuple(case.case_id for case in cases if case.patient_id in names)
    return [Finding("patients-alike", message, members)]


def _suspicious(patients: Sequence[str]) -> list[_Alike]:
    """Groups of names that differ in a word that tells, or in one of a few parts that come again and again."""
    by_place: dict[int, list[_Alike]] = defaultdict(list)
    for group in _groups(patients):
        by_place[group.place].append(group)
    found = []
    for _, groups in sorted(by_place.items()):
        telling = [one for group in groups if (one := _telling(group)) is not None]
        common = [group for group in groups if _numbers_somebody(group)]
        # Few visits of many patients, and not few sites of many patients.
        few = len({part for group in common for part in group.parts}) <= len(common)
        found += telling or (common if few and len(common) > 1 else [])
    return found


def _followed(patients: Sequence[str]) -> list[_Alike]:
    """A name, and the same with a visit or a side behind it: P001 and P001_followup."""
    known = {tuple(_SEPARATOR.split(_plain(name))): name for name in patients}
    groups = []
    for (*stem, last), name in known.items():
        before = known.get(tuple(stem))
        if before is not None and _is_somebody(" ".join(stem)) and _TELLING.fullmatch(last):
            groups.append(_Alike(len(stem), (before, name), (last,), tuple(stem)))
    return groups


def _is_somebody(stem: str) -> bool:
    """Whether what a name begins with numbers a patient, and not a site or a study."""
    return bool(re.search(r"\d", stem)) and not PLACE.fullmatch(stem)


def _plain(name: str) -> str:
    """Small letters, and no brackets around what they hold: `P001 (2)`."""
    return re.sub(r"[()\[\]{}]", "", name.casefold()).strip()


def _numbered(patients: Sequence[str]) -> list[_Alike]:
    """Several names that a few numbers each follow: their visits, if no patients of a site."""
    stems: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in patients:
        found = _NUMBERED.fullmatch(_plain(name))
        if found and not PLACE.fullmatch(found["stem"]):
            stems[found["stem"]].append((name, found["number"]))
    groups = []
    for stem, members in stems.items():
        if 2 <= len(members) <= _MOST_SCANS:
            parts = tuple(_SEPARATOR.split(stem))
            names, numbers = zip(*members, strict=True)
            groups.append(_Alike(len(parts), names, numbers, parts))
    return groups if len(groups) > 1 else []


def _dated(patients: Sequence[str]) -> list[_Alike]:
    """Names that are equal up to a day: visits of one, if those are not the patients of a site.

    A scan whose name ends with its day is somebody's already: Smith_J, of whom Smith_J_20200115_2 is one more.
    """
    known = {name.casefold(): name for name in patients}
    stems: dict[str, list[str]] = {}
    for name in patients:
        found = _DAYS.match(name.casefold())
        stem = found["stem"] if found else ""
        # Without a digit it may be a study's name, unless somebody is called so.
        is_somebody = stem in known or re.search(r"\d", stem)
        if found and is_somebody and not PLACE.fullmatch(stem) and not PERSON.search(name[found.end() :]):
            stems.setdefault(stem, [known[stem]] if stem in known else []).append(name)
    return [
        _Alike(len(parts), tuple(names), (), tuple(parts))
        for stem, names in stems.items()
        if 2 <= len(names) <= _MOST_SCANS and (parts := _SEPARATOR.split(stem))
    ]


def _groups(patients: Sequence[str]) -> list[_Alike]:
    members: dict[tuple[int, tuple[str, ...]], list[tuple[str, str]]] = defaultdict(list)
    for name in patients:
        parts = _SEPARATOR.split(_plain(name))
        for place, part in enumerate(parts):
            rest = (*parts[:place], *parts[place + 1 :])
            members[place, rest].append((name, part))
    return [
        _Alike(place, tuple(name for name, _ in found), tuple(part for _, part in found), rest)
        for (place, rest), found in members.items()
        if len(found) > 1
    ]


def _telling(group: _Alike) -> _Alike | None:
    """What of a group differs in words that tell, if the rest numbers somebody."""
    # "week-4" is two parts.
    before = group.rest[group.place - 1] if group.place else ""
    found = [
        (name, part)
        for name, part in zip(group.names, group.parts, strict=True)
        if _TELLING.fullmatch(before + part if part.isdigit() else part)
    ]
    if len(found) < 2 or not re.search(r"\d", " ".join(group.rest)):
        return None
    return _Alike(group.place, tuple(name for name, _ in found), tuple(part for _, part in found), group.rest)


def _numbers_somebody(group: _Alike) -> bool:
    """What comes before the differing part is a patient's number, and that part is not one."""
    before = " ".join(group.rest[: group.place])
    last = group.place == len(group.rest)
    return (
        2 <= len(group.names) <= _MOST_SCANS
        and _is_somebody(before)
        and (not last or all(re.match("[a-z]{2}|t[12]", part) for part in group.parts))
    )


def _endings(cases: Sequence[Case]) -> list[Finding]:
    """Names that differ in a number or a letter at their end only, which may as well be the patient's."""
    groups: dict[str, list[str]] = {}
    patients = {_plain(patient): patient for patient in _patients(cases)}
    for plain, patient in patients.items():
        base = _ENDING.sub("", plain)
        # Without a digit it is the name of the study, not of a patient.
        if base != plain and re.search(r"\d", base):
            # The first visit often has no ending: P001, P001_2.
            groups.setdefault(base, [patients[base]] if base in patients else []).append(patient)
    alike = {base: names for base, names in groups.items() if 2 <= len(names) <= _MOST_SCANS}
    if len(alike) < 2:
        return []
    base, names = next(iter(alike.items()))
    parts = tuple(_SEPARATOR.split(base))
    attached = any(_plain(name).removeprefix(base).isalpha() for name in names)
    pattern = r"^(.+?\d)[A-Za-z]?$" if attached else _Alike(len(parts), tuple(names), (), parts).pattern
    count = sum(map(len, alike.values()))
    message = f"{count} patients differ from another in the ending of their name only, as {', '.join(names[:3])}; if those are one patient, {_STEP}, as '{pattern}'"
    members = tuple(
        case.case_id for case in cases if any(case.patient_id in names for names in alike.values())
    )
    return [Finding("patient-names", message, members)]


def _crowds(cases: Sequence[Case]) -> list[Finding]:
    """Patients with far more scans than the others: `LiTS17_scan_001` is rather a patient of that set."""
    counts = Counter(case.patient_id for case in cases)
    usual = median(counts.values()) if counts else 0.0
    findings = []
    for patient, count in counts.items():
        if count >= _CROWD and count >= _CROWD_RATIO * usual:
            members = tuple(case.case_id for case in cases if case.patient_id == patient)
            message = f"{count} scans count as one patient, {patient} ({', '.join(members[:2])} and more), while others have {usual:g}; if they are of several, {_STEP}, as '^(.+)$' for a patient each"
            findings.append(Finding("patient-crowded", message, members))
    return findings
