"""What a check knows of a case: plain values, small enough to keep for ten thousand cases."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from nibabel.orientations import aff2axcodes

from medvisionllama.data.check.findings import path_of
from medvisionllama.data.check.storage import Storage
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.formats.header import Header
from medvisionllama.data.volume import ras_grid, spacing_of, voxel_ml
from medvisionllama.types import AffineMatrix, SpacingMm, Triple


@dataclass(frozen=True)
class FileFacts:
    """A file's header, and how a NIfTI file stores its place."""

    path: ScanSource
    header: Header
    storage: Storage | None = None

    @property
    def axes(self) -> str:
        """Where the array's axes point, as `LPS`."""
        return "".join(str(code) for code in aff2axcodes(self.header.affine))

    @cached_property
    def ras(self) -> tuple[Triple, AffineMatrix]:
        """Shape and affine once the axes run right, anterior, superior."""
        return ras_grid(self.header.shape, self.header.affine)


@dataclass(frozen=True)
class ChannelFacts:
    """Values of one channel."""

    dtype: str
    low: float
    high: float
    percentiles: tuple[float, float, float]
    """1st, 50th and 99th, over the voxels that are not zero."""
    num_values: int
    """Distinct values, among those sampled."""
    mostly_one_value: bool
    """At least 99 % of the sampled voxels are equal."""
    num_bad: int
    first_bad: Triple | None
    sha256: str
    """Of shape and voxels in RAS as float32, so that file format, type and axis order do not matter."""

    @property
    def constant(self) -> bool:
        return self.num_bad == 0 and self.low == self.high

    @property
    def scale(self) -> float:
        """Width of the intensities: between the 1st and the 99th percentile of the voxels that are not zero."""
        return self.percentiles[2] - self.percentiles[0]


@dataclass(frozen=True)
class MaskFacts:
    """Values of a label. Positions are shares of the grid in RAS, 0 to 1."""

    dtype: str
    low: float
    high: float
    num_values: int
    num_bad: int
    num_fractional: int
    fraction: float | None
    """One value that is not whole."""
    voxels: dict[int, int]
    """Number of voxels of each value but 0; empty where the values are no class numbers."""
    centroids: dict[int, tuple[float, float, float]]
    specks: dict[int, int]
    """Number of tiny islands of each class that has some."""
    sha256: str

    @property
    def countable(self) -> bool:
        """The values are class numbers."""
        return self.num_bad == self.num_fractional == 0 and self.low >= 0 and self.high <= 65_535

    @property
    def num_labelled(self) -> int:
        return sum(self.voxels.values())

    @property
    def centroid(self) -> tuple[float, float, float] | None:
        """Of all classes together."""
        total = self.num_labelled
        if not total:
            return None
        x, y, z = (
            sum(self.voxels[value] * self.centroids[value][axis] for value in self.voxels) / total
            for axis in range(3)
        )
        return (x, y, z)


@dataclass(frozen=True)
class CaseFacts:
    """One case: its files, and once its voxels are read, what is in them."""

    case_id: str
    patient_id: str
    images: tuple[FileFacts, ...]
    label: FileFacts | None
    channels: tuple[ChannelFacts, ...] = ()
    mask: MaskFacts | None = None
    image_is_mask: bool = field(default=False)
    """A channel has the few values of a mask, and the label's shape or a label with the values of a scan."""
    mirror_scores: tuple[float, ...] = ()
    """How much better the label's edge fits the image than its mirror images do; see `mirrors.py`."""
    persons: frozenset[str] = field(default=frozenset(), repr=False)
    """SHA-256 of each PatientID in the images' series, which tells scans of one person and is shown nowhere."""

    @property
    def files(self) -> tuple[FileFacts, ...]:
        return self.images if self.label is None else (*self.images, self.label)

    @property
    def num_channels(self) -> int:
        return sum(file.header.num_channels for file in self.images)

    @property
    def shape(self) -> Triple:
        """Shape in RAS."""
        return self.images[0].ras[0]

    @property
    def spacing_mm(self) -> SpacingMm:
        """Spacing in RAS."""
        return spacing_of(self.images[0].ras[1])

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Size of the imaged region in RAS."""
        x, y, z = (size * edge for size, edge in zip(self.shape, self.spacing_mm, strict=True))
        return (x, y, z)

    @property
    def volumes_ml(self) -> dict[int, float]:
        """Volume of each class."""
        if self.mask is None or self.label is None:
            return {}
        each_ml = voxel_ml(self.label.header.affine)
        return {value: count * each_ml for value, count in self.mask.voxels.items()}

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "case": self.case_id,
            "patient": self.patient_id,
            "images": [str(path_of(file.path)) for file in self.images],
            "label": None if self.label is None else str(path_of(self.label.path)),
            "axes": self.images[0].axes,
            "shape": list(self.shape),
            "spacing_mm": [round(edge, 5) for edge in self.spacing_mm],
        }
        if self.channels:
            result["channels"] = [{**asdict(channel), "scale": channel.scale} for channel in self.channels]
        if self.mask is not None:
            result["labels"] = {
                "dtype": self.mask.dtype,
                "voxels": self.mask.voxels,
                "volumes_ml": {value: round(volume, 5) for value, volume in self.volumes_ml.items()},
                "centroids": self.mask.centroids,
                "sha256": self.mask.sha256,
            }
        return result
