"""Why a plan is as it is: one plain sentence for each decision, for the terminal and for plan.json."""

import math
from collections.abc import Sequence

from medvisionllama.config import DataConfig
from medvisionllama.data.grid_rules import Strides, total_stride
from medvisionllama.types import SpacingMm, Triple

BY_HAND = "set by you"
SIDES_UNNAMED = "the classes have no names; is one left and another right, name them in names.json or give --set data.flip_axes=[]"


def lengths(values: Sequence[float]) -> str:
    """`1.5 × 1.5 × 10 mm`, to four digits."""
    return " × ".join(f"{value:.4g}" for value in values) + " mm"


def native_spacing(
    spacings_mm: Sequence[SpacingMm], chosen: SpacingMm, axis: int | None, percentile: float
) -> str:
    """Median, or a percentile along a thick axis."""
    if all(max(abs(a - b) for a, b in zip(each, chosen, strict=True)) < 1e-3 for each in spacings_mm):
        return "what every scan has" if len(spacings_mm) > 1 else "what the one scan has"
    median = f"the median of {len(spacings_mm)} scans"
    if axis is None:
        return median
    return (
        f"{median}; along {'xyz'[axis]}, where slices are thick and differ, percentile {percentile:g}, "
        "so that finely sliced scans keep their slices"
    )


def raised_spacing(
    native: SpacingMm, raised: SpacingMm, extent_mm: SpacingMm, data: DataConfig, *, share: float
) -> str:
    """Coarser than the scans, for a larger view."""
    seen = data.max_crop_voxels * math.prod(native) / math.prod(extent_mm)
    limit = " (data.coarsest_mm allows no more)" if min(raised) >= data.coarsest_mm else ""
    return (
        f"raised from {lengths(native)}, where a crop of {data.max_crop_voxels} voxels shows {_percent(seen)} of the "
        f"median scan and not {_percent(share)}{limit}; masks still come on each scan's own grid"
    )


def strides(chosen: Strides, spacing_mm: SpacingMm, shape: Sequence[float]) -> str:
    """Which axes are halved less, and why."""
    fewer = [axis for axis, total in enumerate(total_stride(chosen)) if total < 8]
    if not fewer:
        return "every axis is halved at each of three stages, as no voxel is twice as long as wide"
    parts = []
    for axis in fewer:
        name, total = "xyz"[axis], total_stride(chosen)[axis]
        held = shape[axis] / total < 4
        cause = (
            f"has {shape[axis]:.0f} voxel{'s' if shape[axis] > 1 else ''}"
            if held and spacing_mm[axis] < 2 * min(spacing_mm)
            else f"has voxels of {spacing_mm[axis]:.4g} mm against {min(spacing_mm):.4g} mm"
        )
        often = ("is never halved", "is halved once", "is halved twice")[int(math.log2(total))]
        parts.append(f"{name} {cause} and {often} in three stages")
    return "; ".join(parts)


def crop(chosen: Triple, spacing_mm: SpacingMm, extent_mm: SpacingMm, unit: Triple, data: DataConfig) -> str:
    """What a crop shows."""
    sizes = [size * edge for size, edge in zip(chosen, spacing_mm, strict=True)]
    if data.crop_size is not None:
        rounded = "" if chosen == data.crop_size else f", rounded up to whole tokens of {_times(unit)} voxels"
        return f"{BY_HAND} or the preset (data.crop_size){rounded}"
    shortened = [
        "xyz"[axis]
        for axis in range(3)
        if sizes[axis] + 0.05 * unit[axis] * spacing_mm[axis] < extent_mm[axis]
    ]
    if not shortened:
        return f"covers the median scan of {lengths(extent_mm)} in whole tokens of {_times(unit)} voxels"
    return (
        f"shows {lengths([min(pair) for pair in zip(sizes, extent_mm, strict=True)])} of the median scan's {lengths(extent_mm)}; the longest side was shortened until at most "
        f"{data.max_crop_voxels} voxels were left (data.max_crop_voxels)"
    )


def normalisation_key(channels: Sequence[str], number: int) -> str:
    """Name of a channel's reason; channels may share a name."""
    name = channels[number]
    return (
        f"normalisation of {name}"
        if list(channels).count(name) == 1
        else f"normalisation of {name} ({number})"
    )


def normalisation(
    rule: str, *, by_hand: bool, limits: tuple[float, float] | None = None, num_cases: int = 0
) -> str:
    """How a channel is scaled; `limits` are known once training cases were measured."""
    prefix = f"{BY_HAND} (data.normalisation): " if by_hand else ""
    if rule == "image":
        cause = "" if by_hand else ", since its intensities have no unit"
        return f"{prefix}mean and deviation of each scan's non-zero voxels{cause}"
    if rule == "dataset":
        numbers = "" if limits is None else f", here {limits[0]:.5g} to {limits[1]:.5g}"
        cases = f"the {num_cases} training cases" if num_cases else "the training cases"
        cause = "" if by_hand else "CT has a unit, so it is "
        return f"{prefix}{cause}clipped to percentiles 0.5 and 99.5 of labelled voxels in {cases}{numbers}, and scaled by their mean and deviation"
    return f"{prefix}clipped to the window {rule}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _times(size: Triple) -> str:
    return "×".join(map(str, size))
