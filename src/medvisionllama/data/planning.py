"""From a fingerprint to the numbers a run needs: spacing, crop, strides, mirrored axes, normalisation."""

import math
import re
from typing import Literal, TypedDict

from pydantic import BaseModel, ConfigDict

from medvisionllama.config import DataConfig
from medvisionllama.data.fingerprint import Fingerprint
from medvisionllama.data.index import Dataset
from medvisionllama.types import SpacingMm, Triple

Strides = tuple[Triple, Triple, Triple]
# An axis is halved only while its voxels are not much longer than the finest axis's: nnU-Net's rule (Isensee et
# al. 2021, Nature Methods, supplementary note on architecture), which keeps 10 mm slices apart.
_COARSER = 2.0


class NetworkSizes(TypedDict):
    """Arguments of `networks.factory.build_network` that come from the data."""

    num_channels: int
    num_outputs: int
    crop_size: Triple
    strides: Strides


class Normalisation(BaseModel):
    """How one channel's intensities are brought to a common scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["image", "dataset"]
    """`image`: mean and deviation of each scan's non-zero voxels (MR). `dataset`: fixed numbers for CT, whose
    values have a unit."""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0


class Plan(BaseModel):
    """What was decided from the data; stored with the run, since prediction must repeat it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: tuple[str, ...]
    classes: dict[int, str]
    """Class names by label value, in the order of the network's outputs after background."""
    merged: bool
    """All classes are one foreground."""
    resize: bool
    """Volumes are squeezed to `crop_size` instead of cropped."""
    spacing_mm: SpacingMm
    crop_size: Triple
    strides: Strides
    """Downsampling of the stem's second and third stage and of the tokens, an axis each."""
    flip_axes: tuple[int, ...]
    normalisation: tuple[Normalisation, ...] = ()

    @property
    def num_outputs(self) -> int:
        """Channels of the network's output: one for merged classes (sigmoid), else classes and background."""
        return 1 if self.merged else len(self.classes) + 1

    @property
    def mask_classes(self) -> dict[int, str]:
        """Class names by the value that a mask stores."""
        return {1: "foreground"} if self.merged else self.classes

    @property
    def network_sizes(self) -> NetworkSizes:
        """What a network must fit."""
        return {
            "num_channels": len(self.channels),
            "num_outputs": self.num_outputs,
            "crop_size": self.crop_size,
            "strides": self.strides,
        }

    @property
    def output_values(self) -> tuple[int, ...]:
        """Label value that a mask stores for each class after background."""
        return tuple(self.mask_classes)


def make_plan(
    dataset: Dataset, found: Fingerprint, data: DataConfig, *, flip: bool, patch_size: int | None
) -> Plan:
    """Decide spacing, crop and strides.

    Args:
        patch_size: edge of a cubic token patch, or None where a stem with planned strides makes the tokens.
    """
    spacing = data.spacing_mm or found.median_spacing_mm
    if data.geometry == "resize":
        assert data.crop_size is not None, "checked with the configuration"
        # Voxels of a squeezed scan are this large, and rotations must know it.
        x, y, z = (
            round(extent / size, 4)
            for extent, size in zip(found.median_extent_mm, data.crop_size, strict=True)
        )
        spacing = (x, y, z)
    strides = plan_strides(spacing) if patch_size is None else ((patch_size,) * 3, (1, 1, 1), (1, 1, 1))
    unit = total_stride(strides)
    if data.crop_size is not None:
        x, y, z = (math.ceil(size / step) * step for size, step in zip(data.crop_size, unit, strict=True))
        crop = (x, y, z)
    else:
        crop = plan_crop(found.median_extent_mm, spacing, unit, data.max_crop_voxels)
    return Plan(
        channels=dataset.channels,
        classes=dataset.classes,
        merged=data.labels == "foreground",
        resize=data.geometry == "resize",
        spacing_mm=spacing,
        crop_size=crop,
        strides=strides,
        flip_axes=(0,) if flip and not _tells_sides(dataset.classes) else (),
    )


def plan_strides(spacing_mm: SpacingMm) -> Strides:
    """Halve each axis at each of three stages, but leave an axis alone while its voxels are much coarser.

    >>> plan_strides((1.5, 1.5, 10.0))
    ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    """
    stages = []
    current = list(spacing_mm)
    for _ in range(3):
        finest = min(current)
        x, y, z = (2 if size < _COARSER * finest else 1 for size in current)
        stages.append((x, y, z))
        current = [size * step for size, step in zip(current, stages[-1], strict=True)]
    return (stages[0], stages[1], stages[2])


def total_stride(strides: Strides) -> Triple:
    """Voxels per token along each axis."""
    x, y, z = (math.prod(stage[axis] for stage in strides) for axis in range(3))
    return (x, y, z)


def plan_crop(extent_mm: SpacingMm, spacing_mm: SpacingMm, unit: Triple, max_voxels: int) -> Triple:
    """Cover the median scan, then shorten the physically longest axis until the crop fits the budget."""
    crop = [
        max(1, math.ceil(extent / size / step - 0.05)) * step
        for extent, size, step in zip(extent_mm, spacing_mm, unit, strict=True)
    ]
    while math.prod(crop) > max_voxels:
        lengths = [
            size * edge if size > step else 0.0
            for size, edge, step in zip(crop, spacing_mm, unit, strict=True)
        ]
        longest = lengths.index(max(lengths))
        if lengths[longest] == 0.0:
            break
        crop[longest] -= unit[longest]
    x, y, z = crop
    return (x, y, z)


def is_ct(channel: str) -> bool:
    """MSD and nnU-Net name computed tomography `CT`."""
    return channel.strip().lower() in {"ct", "ctnormalization"}


def _tells_sides(classes: dict[int, str]) -> bool:
    # "left ventricle" and "right ventricle" differ in shape and wall, not by mirroring alone, but a network that
    # has seen mirrored hearts has lost the position that tells them apart in an unclear scan.
    return any(
        re.search(r"(?<![a-z])(left|right|l|r|lt|rt|lv|rv|la|ra|lh|rh)(?![a-z])", name.lower())
        for name in classes.values()
    )
