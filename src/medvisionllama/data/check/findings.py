"""What a check can find: a code for each kind, its severity, and one line that says what and what to do.

`error` means that training must not start, `warning` that somebody should look, `note` that it is good to know.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.errors import DataError, command

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# Code: what it means, as a heading. The order is that of the report.
_ERRORS = {
    "layout": "the folder cannot be indexed",
    "missing-file": "files that the dataset names are absent",
    "no-partner": "an image without a label, or a label without an image",
    "listed-twice": "a case is listed twice",
    "name-not-text": "names of files that are no text",
    "too-few-patients": "too few patients to divide",
    "unreadable": "files that cannot be read",
    "segment-names": "labels whose segments are numbered otherwise than in the others",
    "channel-count": "another number of channels than declared",
    "channel-grid": "channels on different grids",
    "label-channels": "labels that are not 3-D",
    "label-shape": "labels of another shape than their image",
    "label-affine": "labels placed elsewhere than their image",
    "label-fractional": "labels that are not whole numbers",
    "label-range": "label values out of range",
    "label-not-finite": "labels with NaN or infinite voxels",
    "label-undeclared": "label values that the dataset does not declare",
    "all-labels-empty": "no label holds a class",
    "image-not-finite": "images with NaN or infinite voxels",
    "image-constant": "images of one value",
    "image-is-mask": "images that look like masks",
    "duplicate-across-patients": "the same image under several patients",
    "splits": "a splits file that cannot be used",
    "not-in-splits": "patients that the splits do not know",
    "splits-leak": "the same image in training and test",
}
_WARNINGS = {
    "patients-alike": "names that look like one patient's",
    "person-apart": "one PatientID under several patients",
    "patient-crowded": "patients with far more scans than the others",
    "segment-values": "segments of one name that have several values, and whose name is not declared",
    "label-empty": "labels without a labelled voxel",
    "class-names": "classes that tables could not tell apart, which train refuses",
    "class-unseen": "classes that no label holds",
    "values-uneven": "values without a name that only some labels hold",
    "image-nearly-constant": "images almost of one value",
    "channel-constant": "channels of one value",
    "duplicate-channel": "channels with the same voxels",
    "duplicate-within-patient": "the same image twice in one patient",
    "duplicate-label": "the same label on different images",
    "pair-names": "a label named like another case",
    "ct-not-hu": "CT values that are not Hounsfield units",
    "ct-undeclared": "channels that look like CT and are not called so",
    "ct-mixture": "CT of very different intensity scales",
    "intensity-outlier": "intensity scales unlike the other cases'",
    "spacing-outlier": "spacings unlike the other cases'",
    "shape-outlier": "sizes unlike the other cases'",
    "label-volume-outlier": "label volumes unlike the other cases'",
    "mirrored": "labels on the other side than in the other cases",
    "label-mirrored": "labels that would fit their image better mirrored",
    "axis-order": "axes in another order than in the other cases",
    "sides-swapped": "left and right exchanged compared to the other cases",
    "affine-unset": "files that do not say where they lie, while others do",
    "affine-sheared": "affine matrices with shear",
    "sform-qform": "two matrices in one file that disagree",
    "spacing-unit": "lengths that are not in millimetres",
    "spacing-implausible": "spacings that no scanner has",
    "anisotropy": "extremely flat voxels",
}
_NOTES = {
    "no-labels": "images alone were checked",
    "label-float": "whole label values stored as real numbers",
    "specks": "single stray voxels",
    "intensity-mixture": "very different intensity scales",
    "mixed-orientations": "axes in different orders",
    "placement-unset": "no file says where it lies",
    "unit-unset": "lengths without a unit",
    "sides-unusual": "left lies on the right in most cases",
    "patient-names": "names that may belong to one patient",
    "unlisted-file": "files that no case uses",
    "splits-absent": "patients of the splits that are not in the dataset",
}
TITLES = {**_ERRORS, **_WARNINGS, **_NOTES}


@dataclass(frozen=True)
class Finding:
    """One thing found, in one case, several, or the dataset as a whole."""

    code: str
    message: str
    """One line: what is wrong, in which file, and the next step."""
    cases: tuple[str, ...] = ()
    file: ScanSource | None = None

    def __post_init__(self) -> None:
        assert self.code in TITLES, f"{self.code} has no row in TITLES"

    @property
    def severity(self) -> Severity:
        return "error" if self.code in _ERRORS else "warning" if self.code in _WARNINGS else "note"

    @property
    def rank(self) -> int:
        """Place of the code in a report, the worst first."""
        return list(TITLES).index(self.code)

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity,
            "cases": list(self.cases),
            "file": None if self.file is None else str(path_of(self.file)),
            "message": self.message,
        }


def path_of(source: ScanSource) -> Path:
    """Where a scan lies: its file, or the folder of its series."""
    return source.folder if isinstance(source, Series) else source


def raise_first(findings: list[Finding], root: Path) -> None:
    """Raise the first error, and say how many there are besides.

    Raises:
        DataError: a finding is an error.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    more = len(errors) - 1
    rest = f" (and {more} more; list them all with: {command('data check', root)})" if more else ""
    raise DataError(errors[0].message + rest)
