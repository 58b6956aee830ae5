"""What a dataset looks like, from headers alone: shapes and spacings in RAS, checked for agreement.

Intensities and class volumes are measured while the cache is filled (`cache.py`), so voxels are read once.
"""

from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import io_orientation

from medvisionllama.data.index import Case, Dataset
from medvisionllama.data.readers import Header, read_header
from medvisionllama.data.volume import same_place
from medvisionllama.errors import DataError
from medvisionllama.types import SpacingMm, Triple


@dataclass(frozen=True)
class Fingerprint:
    """Shape and spacing of every case in RAS."""

    shapes: dict[str, Triple]
    spacings_mm: dict[str, SpacingMm]
    num_channels: int

    @property
    def median_spacing_mm(self) -> SpacingMm:
        x, y, z = (round(float(value), 4) for value in np.median(list(self.spacings_mm.values()), axis=0))
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
        DataError: a label whose grid differs from its image's, or a case with another number of channels.
    """
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(check_case, dataset.cases))
    num_channels = len(dataset.channels)
    for case, (channels, _, _) in zip(dataset.cases, headers, strict=True):
        if channels != num_channels:
            names = ", ".join(dataset.channels)
            raise DataError(
                f"{case.images[0]} has {channels} channels, the dataset declares {num_channels} ({names}); correct one of them"
            )
    described = [
        (case.case_id, header)
        for case, header in zip(dataset.cases, headers, strict=True)
        if only is None or case.case_id in only
    ]
    return Fingerprint(
        {name: shape for name, (_, shape, _) in described},
        {name: spacing for name, (_, _, spacing) in described},
        num_channels,
    )


def check_case(case: Case) -> tuple[int, Triple, SpacingMm]:
    """Return channels, shape and spacing in RAS of one case.

    Raises:
        DataError: image and label lie on different grids.
    """
    images = [read_header(path) for path in case.images]
    first = images[0]
    if case.label is not None:
        label = read_header(case.label)
        if label.shape != first.shape:
            raise DataError(
                f"{case.label} has shape {label.shape}, its image {case.images[0].name} has {first.shape}; redraw or resample the label on the image's grid"
            )
        if not same_place(first.affine, label.affine, first.shape):
            raise DataError(
                f"{case.label} has another affine than its image {case.images[0].name}; if the voxels do match, copy the image's header to the label"
            )
    order = _ras_order(first)
    x, y, z = (first.shape[axis] for axis in order)
    dx, dy, dz = (first.spacing_mm[axis] for axis in order)
    return sum(header.num_channels for header in images), (x, y, z), (dx, dy, dz)


def _ras_order(header: Header) -> list[int]:
    """Array axis that becomes x, y and z."""
    target = io_orientation(header.affine)[:, 0].astype(int).tolist()
    return [target.index(axis) for axis in range(3)]
