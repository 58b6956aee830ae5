"""Rules on all cases together: what stands apart, what occurs twice, what is never there."""

import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.findings import Finding
from medvisionllama.data.check.outliers import MIN_CASES, find_outliers
from medvisionllama.data.planning import AIR, has_values_of_ct, is_ct

# The smallest ratio to the median that is worth a look.
SPACING_FACTOR, EXTENT_FACTOR, INTENSITY_FACTOR, VOLUME_FACTOR = 1.5, 2.0, 5.0, 4.0
# Widths of intensities that differ by this are a mixture of scales.
MIXTURE_RATIO = 10.0
# Labels smaller than this may be equal by chance.
_DUPLICATE_LABEL_VOXELS = 50
_FLAT_RATIO = 16.0


def class_findings(cases: Sequence[CaseFacts], classes: Mapping[int, str]) -> list[Finding]:
    """Classes that no label holds."""
    values = [(case.case_id, set(case.mask.voxels)) for case in cases if case.mask and case.mask.countable]
    if not values:
        return []
    met = {value for _, own in values for value in own}
    if not met:
        message = f"none of the {len(values)} labels holds a labelled voxel; check that the label files hold the masks and not the images"
        return [Finding("all-labels-empty", message)]
    if not classes and len(met) > 1:
        return uneven_findings(values)
    return [
        Finding(
            "class-unseen",
            f"the class {value} ({name}) is declared but in none of the {len(values)} labels; remove it from the declared classes or label it",
        )
        for value, name in classes.items()
        if value not in met
    ]


def uneven_findings(values: Sequence[tuple[str, Collection[int]]]) -> list[Finding]:
    """Of classes that nobody names: values that some labels lack, as those that two programs wrote do.

    Args:
        values: of each case, its name and the values in its label, background left out.
    """
    met = {value for _, own in values for value in own}
    lacking = {value: [name for name, own in values if value not in own] for value in sorted(met)}
    uneven = {value: without for value, without in lacking.items() if without}
    if not uneven:
        return []
    words = ", ".join(f"{value} ({len(without)} lack it)" for value, without in uneven.items())
    message = f"no names.json says what the label values mean, each is a class of its own, and not all labels have the values {words}; if one class is written in two ways (1 and 255), make it one, else name the classes in names.json"
    return [Finding("values-uneven", message, tuple(without[0] for without in uneven.values()))]


def duplicate_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Images and labels with the same voxels."""
    findings, known = [], set()
    by_image: dict[tuple[str, ...], list[CaseFacts]] = defaultdict(list)
    for case in cases:
        if case.channels and not all(channel.constant for channel in case.channels):
            by_image[tuple(channel.sha256 for channel in case.channels)].append(case)
    for group in by_image.values():
        if len(group) < 2:
            continue
        names = tuple(case.case_id for case in group)
        known |= set(names)
        patients = sorted({case.patient_id for case in group})
        if len(patients) > 1:
            labels = {case.mask.sha256 for case in group if case.mask is not None}
            differ = ", with different labels," if len(labels) > 1 else ""
            left_out = patients[-1]
            message = f"{_listed(names)} hold the same image{differ} but count as {len(patients)} patients ({_listed(patients)}), so it can be trained on and tested; keep one ({shlex.join(['--exclude', left_out])} here, {shlex.join(['--set', f'data.exclude={left_out}'])} in train), or name the patient by --patient-pattern"
            findings.append(Finding("duplicate-across-patients", message, names, group[1].images[0].path))
        else:
            message = f"{_listed(names)} of the patient {patients[0]} hold the same image; keep one"
            findings.append(Finding("duplicate-within-patient", message, names, group[1].images[0].path))
    by_label: dict[str, list[CaseFacts]] = defaultdict(list)
    for case in cases:
        if case.mask is not None and case.mask.num_labelled >= _DUPLICATE_LABEL_VOXELS:
            by_label[case.mask.sha256].append(case)
    for group in by_label.values():
        names = tuple(case.case_id for case in group)
        if len(group) > 1 and not set(names) <= known:
            path = group[1].label.path if group[1].label else None
            message = (
                f"{_listed(names)} have the same label on different images; was it copied to the wrong case?"
            )
            findings.append(Finding("duplicate-label", message, names, path))
    return findings


def ct_findings(cases: Sequence[CaseFacts], channels: Sequence[str]) -> list[Finding]:
    """Channels with the values of CT under another name: they would be scaled as MRI is, scan by scan."""
    findings = []
    for number, name in enumerate(channels):
        facts = [case.channels[number] for case in cases if number < len(case.channels)]
        like_ct = sum(has_values_of_ct(one.low, one.high) for one in facts)
        if facts and not is_ct(name) and like_ct > len(facts) / 2:
            message = f"the channel {number} ({name}) reaches down to {AIR} and below in {like_ct} of {len(facts)} scans, as CT does, and is not called so, so it would be scaled as MRI is; name it CT in names.json or dataset.json"
            findings.append(Finding("ct-undeclared", message))
    return findings


def outlier_findings(cases: Sequence[CaseFacts], classes: Mapping[int, str]) -> list[Finding]:
    """Spacings, sizes and label volumes unlike the others; see `outliers.py` for the rule."""
    findings = []
    for axis, name in enumerate("xyz"):
        findings += _outliers(
            cases,
            "spacing-outlier",
            {case.case_id: case.spacing_mm[axis] for case in cases},
            SPACING_FACTOR,
            (f"the spacing along {name} is", " mm", "is the header right?"),
        )
        findings += _outliers(
            cases,
            "shape-outlier",
            {case.case_id: case.extent_mm[axis] for case in cases},
            EXTENT_FACTOR,
            (f"the scan's length along {name} is", " mm", "is it cut, or of another region?"),
        )
    names = {value: name for case in cases for value, name in _class_names(case, classes).items()}
    for value, name in sorted(names.items()):
        findings += _outliers(
            cases,
            "label-volume-outlier",
            {case.case_id: case.volumes_ml.get(value, 0.0) for case in cases},
            VOLUME_FACTOR,
            (f"{name} has", " ml", "look at the label"),
        )
    for case in cases:
        ratio = max(case.spacing_mm) / min(case.spacing_mm)
        edges, path = " × ".join(f"{edge:.4g}" for edge in case.spacing_mm), case.images[0].path
        if min(case.spacing_mm) < 0.01 or max(case.spacing_mm) > 50:
            message = f"{path}: a spacing of {edges} mm is no scanner's; is the unit millimetres?"
            findings.append(Finding("spacing-implausible", message, (case.case_id,), path))
        elif ratio > _FLAT_RATIO:
            message = (
                f"{path}: voxels of {edges} mm are {ratio:.0f} times longer than wide; is the header right?"
            )
            findings.append(Finding("anisotropy", message, (case.case_id,), path))
    return findings


def intensity_findings(cases: Sequence[CaseFacts], channels: Sequence[str]) -> list[Finding]:
    """Intensity scales, channel by channel: a mixture, or single cases that stand apart."""
    findings = []
    for index, name in enumerate(channels):
        scales = {
            case.case_id: case.channels[index].scale
            for case in cases
            if len(case.channels) == len(channels) and case.channels[index].scale > 0
        }
        if len(scales) < MIN_CASES:
            continue
        # The outermost twentieth on both sides, at least one case, is left out: one case is no mixture.
        ordered, cut = sorted(scales.values()), max(1, round(0.05 * len(scales)))
        low, high = ordered[cut], ordered[-1 - cut]
        if high / low >= MIXTURE_RATIO:
            highs = [case.channels[index].high for case in cases if case.case_id in scales]
            words = f"{name}: intensities are on very different scales (widths of {low:.3g} to {high:.3g} in nine of ten cases; maxima from {min(highs):.7g} to {max(highs):.7g})"
            findings.append(
                Finding(
                    "ct-mixture", f"{words}; CT should be in Hounsfield units everywhere: convert the others"
                )
                if is_ct(name)
                else Finding(
                    "intensity-mixture", f"{words}; each scan is normalised by itself, so nothing to do"
                )
            )
            continue
        findings += _outliers(
            cases,
            "intensity-outlier",
            scales,
            INTENSITY_FACTOR,
            (f"the width of the intensities ({name}) is", "", "is it the same kind of scan?"),
        )
    return findings


def _outliers(
    cases: Sequence[CaseFacts],
    code: str,
    values: Mapping[str, float],
    factor: float,
    words: tuple[str, str, str],
) -> list[Finding]:
    """One finding per outlier; `words` are what comes before the value, its unit, and the question to ask."""
    found = find_outliers(values, factor=factor)
    (subject, unit, question), findings = words, []
    for case in cases:
        if case.case_id in found:
            value, median = found[case.case_id]
            file = case.label if code == "label-volume-outlier" and case.label else case.images[0]
            message = (
                f"{file.path}: {subject} {value:.4g}{unit}, the median is {median:.4g}{unit}; {question}"
            )
            findings.append(Finding(code, message, (case.case_id,), file.path))
    return findings


def _class_names(case: CaseFacts, classes: Mapping[int, str]) -> dict[int, str]:
    values = case.mask.voxels if case.mask is not None else ()
    return {value: classes.get(value, f"class {value}") for value in values}


def _listed(names: Sequence[str]) -> str:
    """The first names of a list, in words."""
    shown = list(names[:4])
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
