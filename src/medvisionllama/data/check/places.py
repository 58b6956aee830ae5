"""Rules on where scans lie: matrices unset or in disagreement, axes in another order, left and right exchanged."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from medvisionllama.data.check.facts import CaseFacts, FileFacts
from medvisionllama.data.check.findings import Finding
from medvisionllama.data.check.outliers import robust_spread
from medvisionllama.data.volume import same_place, shear_fault

_MIN_CASES = 10
_MIN_SIDED_CASES = 5
# Nearer to the middle than this, a label has no side.
_MIRROR_SHARE = 0.15
_AXES = ("left to right", "back to front", "down to up")


def storage_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """What the headers store about place, file by file."""
    findings = []
    files = [(case, file) for case in cases for file in case.files]
    stored = [(case, file) for case, file in files if file.storage is not None]
    unset = [(case, file) for case, file in stored if not _placed(file)]
    if unset and len(unset) == len(files):
        message = f"none of the {len(unset)} files says where it lies (sform and qform are unset); left and right rest on the order of the voxels"
        findings.append(Finding("placement-unset", message))
    else:
        for case, file in unset:
            message = f"{file.path} does not say where it lies (sform and qform are unset), other files do; export it again with its geometry"
            findings.append(Finding("affine-unset", message, (case.case_id,), file.path))
    for case, file in stored:
        assert file.storage is not None
        sform, qform = file.storage.sform, file.storage.qform
        if sform is not None and qform is not None and not same_place(sform, qform, file.header.shape):
            message = f"{file.path}: its sform and qform place it differently; the sform is used, other programs may take the qform: set both to the right one"
            findings.append(Finding("sform-qform", message, (case.case_id,), file.path))
        if file.storage.unit in {"meter", "micron"}:
            message = f"{file.path} gives lengths in {file.storage.unit}s, and is read so: make sure that its numbers are {file.storage.unit}s"
            findings.append(Finding("spacing-unit", message, (case.case_id,), file.path))
    for case, file in files:
        if fault := shear_fault(file.header.affine):
            findings.append(Finding("affine-sheared", f"{file.path}: {fault}", (case.case_id,), file.path))
    unknown = sorted(
        {case.case_id for case, file in stored if file.storage and file.storage.unit == "unknown"}
    )
    if unknown:
        message = f"the headers of {len(unknown)} cases give no unit of length; millimetres are assumed"
        findings.append(Finding("unit-unset", message, tuple(unknown)))
    return findings


def identity_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Scans placed by the identity matrix, where most have another spacing or other axes: geometry was lost."""
    plain = [case for case in cases if np.array_equal(case.images[0].header.affine, np.eye(4))]
    # An origin alone tells little: crops of 1 mm begin at 0 or at 1.
    real = [case for case in cases if not np.allclose(case.images[0].header.affine[:3, :3], np.eye(3))]
    if len(cases) < _MIN_SIDED_CASES or len(real) < 0.75 * len(cases):
        return []
    return [
        Finding(
            "affine-unset",
            f"{case.images[0].path} is placed by the identity matrix, most others by a real one; export it again with its geometry",
            (case.case_id,),
            case.images[0].path,
        )
        for case in plain
    ]


def orientation_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Axes in different orders between cases: harmless where the headers tell, and good to know."""
    axes = Counter(case.images[0].axes for case in cases)
    if len(axes) < 2:
        return []
    words = ", ".join(f"{count} × {code}" for code, count in axes.most_common())
    usual = axes.most_common(1)[0][0]
    others = tuple(case.case_id for case in cases if case.images[0].axes != usual)
    return [
        Finding("mixed-orientations", f"axes differ between cases ({words}); all are turned to RAS", others)
    ]


def mirror_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Labels that lie where the others' mirror image would.

    A case counts if its label is more than five robust deviations, and 15 % of the scan, from the median place
    along an axis, and within two deviations of it once mirrored.
    """
    centres = {
        case.case_id: case.mask.centroid for case in cases if case.mask is not None and case.mask.centroid
    }
    if len(centres) < _MIN_CASES:
        return []
    findings = []
    for axis, words in enumerate(_AXES):
        middle, spread = robust_spread([centre[axis] for centre in centres.values()])
        spread = max(spread, 0.01)
        for case in cases:
            centre = centres.get(case.case_id)
            if centre is None:
                continue
            place = centre[axis]
            if abs(place - middle) > max(5 * spread, _MIRROR_SHARE) and abs(1 - place - middle) < 2 * spread:
                path = case.images[0].path
                message = f"{path}: the label's centre is at {place:.2f} of the way {words}, in the other cases at {middle:.2f}; is the scan mirrored?"
                findings.append(Finding("mirrored", message, (case.case_id,), path))
    return findings


def axis_order_findings(cases: Sequence[CaseFacts]) -> list[Finding]:
    """Scans whose size fits the others' only after exchanging axes."""
    if len(cases) < _MIN_CASES:
        return []
    logs = np.log([case.extent_mm for case in cases])
    middles = np.median(logs, axis=0)
    spread = 1.4826 * np.median(np.abs(logs - middles), axis=0)
    findings = []
    for case, row in zip(cases, logs, strict=True):
        off = np.abs(row - middles)
        if not ((off > np.log(1.3)) & (off > 5 * spread)).any():
            continue
        order = min(itertools.permutations(range(3)), key=lambda o: np.abs(row[list(o)] - middles).max())
        if order != (0, 1, 2) and np.abs(row[list(order)] - middles).max() < np.log(1.1):
            path = case.images[0].path
            ours, usual = (" × ".join(f"{size:.0f}" for size in np.exp(sizes)) for sizes in (row, middles))
            message = f"{path}: the scan is {ours} mm, the others {usual} mm; are its axes in another order than its header says?"
            findings.append(Finding("axis-order", message, (case.case_id,), path))
    return findings


def side_findings(cases: Sequence[CaseFacts], classes: Mapping[int, str]) -> list[Finding]:
    """Classes named left and right: do they lie on their sides, and on the same sides in every case?"""
    findings = []
    for left, right in _sided(classes):
        # Millimetres by which the right one lies further to the right.
        offsets = {}
        for case in cases:
            if case.mask is not None and {left, right} <= set(case.mask.centroids):
                share = case.mask.centroids[right][0] - case.mask.centroids[left][0]
                if abs(share) * case.shape[0] > 2:
                    offsets[case.case_id] = share * case.extent_mm[0]
        if len(offsets) < _MIN_SIDED_CASES:
            continue
        wrong = {case_id for case_id, offset in offsets.items() if offset < 0}
        names = f"{classes[left]} and {classes[right]}"
        if len(wrong) > len(offsets) / 2:
            message = f"{names}: the left one lies on the right in {len(wrong)} of {len(offsets)} cases; are the headers or the names mirrored?"
            findings.append(Finding("sides-unusual", message))
            wrong = set(offsets) - wrong
        if len(wrong) <= len(offsets) / 4:
            for case in cases:
                if case.case_id in wrong and case.label is not None:
                    message = f"{case.label.path}: {names} have exchanged sides compared to the other cases; is the scan mirrored or the label mistaken?"
                    findings.append(Finding("sides-swapped", message, (case.case_id,), case.label.path))
    return findings


def _placed(file: FileFacts) -> bool:
    return file.storage is not None and file.storage.placed


def _sided(classes: Mapping[int, str]) -> list[tuple[int, int]]:
    """Pairs of classes whose names differ in left and right only."""
    plain = {re.sub(r"[^a-z0-9]+", " ", name.lower()).strip(): value for value, name in classes.items()}
    pairs = []
    for name, value in plain.items():
        for word, other in (("left", "right"), ("lt", "rt"), ("l", "r")):
            opposite = re.sub(rf"\b{word}\b", other, name)
            if opposite != name and opposite in plain:
                pairs.append((value, plain[opposite]))
    return pairs
