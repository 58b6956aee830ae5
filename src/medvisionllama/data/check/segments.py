"""What 3D Slicer writes into labels: class names, which must agree, and overlapping segments in layers.

Slicer numbers segments in the order in which they were drawn, so the same number may be another class in the next
label, and nothing in the voxels tells.
"""

from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace

from medvisionllama.data.check.findings import Finding
from medvisionllama.data.formats import itk
from medvisionllama.data.index import Case, Dataset
from medvisionllama.errors import DataError

_STEP = "Slicer numbers segments in the order they were made: give each the same value in every label (Segmentations module, export to labelmap with one color table)"


@dataclass(frozen=True)
class _Segment:
    """One segment of a label."""

    case: Case
    value: int
    name: str

    @property
    def pair(self) -> tuple[int, str]:
        """Value and name, however it is written."""
        return self.value, self.name.casefold()

    @property
    def file(self) -> str:
        assert self.case.label is not None, "segments come from labels"
        return self.case.label.name


def name_segments(dataset: Dataset) -> tuple[Dataset, list[Finding]]:
    """Take class names from the labels if the dataset declares none, and find labels that contradict each other.

    Returns:
        The dataset, with classes if all names agree; labels that contradict others or the declared classes, labels
        that contradict others in words of their own, and labels in layers.
    """
    segments, findings = [], []
    for case in dataset.cases:
        if case.label is None or not case.label.name.lower().endswith(".nrrd"):
            continue
        # What cannot be read is said when headers are checked.
        with suppress(DataError, OSError):
            names = itk.segment_names(case.label)
            segments += [_Segment(case, value, name) for value, name in names.items()]
            if itk.is_segmentation(case.label) and not names:
                findings += _layer_findings(case)
    if dataset.classes:
        return dataset, [*findings, *_against_declared(dataset, segments)]
    agreed, found = _agreed(segments)
    if not found:
        dataset = replace(dataset, classes=agreed)
    return dataset, [*findings, *found]


def _agreed(segments: list[_Segment]) -> tuple[dict[int, str], list[Finding]]:
    """Name of each value, as most labels have it, and the labels that have it otherwise."""
    counts = Counter(segment.pair for segment in segments)
    first = {segment.pair: segment for segment in reversed(segments)}
    by_value: dict[int, _Segment] = {}
    by_name: dict[str, _Segment] = {}
    contradicted = {}
    for pair, _ in counts.most_common():
        value, name = pair
        if value in by_value:
            other, mine = by_value[value], first[pair]
            contradicted[pair] = f"the value {value} is {mine.name!r}, in {other.file} it is {other.name!r}"
        elif name in by_name:
            other, mine = by_name[name], first[pair]
            contradicted[pair] = f"{mine.name!r} has the value {value}, in {other.file} it has {other.value}"
        else:
            by_value[value] = by_name[name] = first[pair]
    step = f"{_STEP}; if only the names differ, declare the classes in names.json, as {{'classes': {{'1': 'liver'}}}}"
    return {value: by_value[value].name for value in sorted(by_value)}, _findings(
        segments, contradicted, step
    )


def _against_declared(dataset: Dataset, segments: list[_Segment]) -> list[Finding]:
    """Labels that give a declared name to another value, or a name of their own to another value than others do."""
    values: dict[str, set[int]] = defaultdict(set)
    for value, name in dataset.classes.items():
        values[name.strip().casefold()].add(value)
    where = "dataset.json" if (dataset.root / "dataset.json").is_file() else "names.json"
    contradicted = {}
    for segment in segments:
        declared = values.get(segment.pair[1], {segment.value})
        if segment.value not in declared:
            words = f"{segment.name!r} has the value {segment.value}, {where} gives it {min(declared)}"
            contradicted[segment.pair] = words
    foreign = [segment for segment in segments if segment.pair[1] not in values]
    return [
        *_findings(segments, contradicted, f"{_STEP}, or correct {where}"),
        *_findings(
            foreign,
            _at_several_values(foreign),
            f"{_STEP}, and the name it has in {where}",
            code="segment-values",
        ),
    ]


def _at_several_values(segments: list[_Segment]) -> dict[tuple[int, str], str]:
    """Names with another value than in most labels, and what is wrong with each."""
    first = {segment.pair: segment for segment in reversed(segments)}
    usual: dict[str, _Segment] = {}
    contradicted = {}
    for pair, _ in Counter(segment.pair for segment in segments).most_common():
        mine, other = first[pair], usual.setdefault(pair[1], first[pair])
        if mine is not other:
            words = f"{mine.name!r} has the value {mine.value}, in {other.file} it has {other.value}"
            contradicted[pair] = words
    return contradicted


def _findings(
    segments: list[_Segment],
    contradicted: dict[tuple[int, str], str],
    step: str,
    *,
    code: str = "segment-names",
) -> list[Finding]:
    """One finding for each contradiction, unless its labels are in another one already."""
    findings: list[Finding] = []
    told: set[str] = set()
    for pair, words in contradicted.items():
        cases = [segment.case for segment in segments if segment.pair == pair]
        names = tuple(case.case_id for case in cases)
        if set(names) <= told:
            continue
        told |= set(names)
        more = len(names) - 1
        rest = f" ({more} more label{'s' if more > 1 else ''} like it)" if more else ""
        message = f"{cases[0].label}: {words}{rest}; {step}"
        findings.append(Finding(code, message, names, cases[0].label))
    return findings


def _layer_findings(case: Case) -> list[Finding]:
    assert case.label is not None, "asked by the caller"
    layers = itk.read_header(case.label).num_channels
    if layers < 2:
        return []
    message = f"{case.label} has {layers} layers, as Slicer saves overlapping segments; a voxel can have one class: in Slicer, Segmentations module, export to labelmap (or collapse labelmap layers) and save that"
    return [Finding("label-channels", message, (case.case_id,), case.label)]
