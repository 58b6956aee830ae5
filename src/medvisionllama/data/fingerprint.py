"""What a dataset looks like, from headers alone: shapes and spacings in RAS, checked for agreement.

Intensities and class volumes are measured while the cache is filled (`cache.py`), so voxels are read once.
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.findings import raise_first
from medvisionllama.data.check.headers import check_headers
from medvisionllama.data.grid_rules import round_mm
from medvisionllama.data.index import Dataset
from medvisionllama.types import SpacingMm, Triple


@dataclass(frozen=True)
class Fingerprint:
    """Shape and spacing of every case in RAS."""

    shapes: dict[str, Triple]
    spacings_mm: dict[str, SpacingMm]
    num_channels: int
    facts: tuple[CaseFacts, ...] = ()
    """Headers of all cases, for rules that only warn (`check/run.py`)."""

    @property
    def median_spacing_mm(self) -> SpacingMm:
        x, y, z = (round_mm(float(value)) for value in np.median(list(self.spacings_mm.values()), axis=0))
        return (x, y, z)

    @property
    def median_shape(self) -> tuple[float, float, float]:
        x, y, z = (float(value) for value in np.median(list(self.shapes.values()), axis=0))
        return (x, y, z)

    @property
    def median_extent_mm(self) -> SpacingMm:
        """Median size of the imaged region along each axis."""
        extents = [np.multiply(self.shapes[case], self.spacings_mm[case]) for case in self.shapes]
        x, y, z = (float(value) for value in np.median(extents, axis=0))
        return (x, y, z)


def fingerprint(dataset: Dataset, *, only: Container[str] | None = None) -> Fingerprint:
    """Read every header and check that images, labels and channels fit together.

    Args:
        only: names of the cases that are described; the others are checked all the same, so that a broken test case
            is found before training and not after.

    Raises:
        DataError: a file that cannot be read, a label whose grid differs from its image's, or a case with another
            number of channels; the first of them, with the number of the others.
    """
    facts, findings = check_headers(dataset)
    raise_first(findings, dataset.root)
    described = [case for case in facts if only is None or case.case_id in only]
    return Fingerprint(
        {case.case_id: case.shape for case in described},
        {case.case_id: case.spacing_mm for case in described},
        len(dataset.channels),
        tuple(facts),
    )
