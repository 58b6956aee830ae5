"""From a fingerprint to the numbers a run needs, and why: spacing, crop, strides, mirrored axes, normalisation."""

import math
import re
from collections.abc import Container
from typing import Literal

from pydantic import BaseModel, ConfigDict

from medvisionllama.config import DataConfig
from medvisionllama.data import plan_reasons as why
from medvisionllama.data.fingerprint import Fingerprint
from medvisionllama.data.grid_rules import (
    Strides,
    median_or_thinner,
    plan_crop,
    plan_strides,
    raise_spacing,
    round_mm,
    seen_share,
    thick_axis,
    total_stride,
)
from medvisionllama.data.index import Dataset
from medvisionllama.data.places import Places
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.run_dir import RunDir
from medvisionllama.types import NetworkShapes, SpacingMm, Triple

# Computed tomography: of vessels, by a cone of rays, without and with contrast; and nnU-Net's name for its scaling.
_CT = {"ct", "cta", "cbct", "ncct", "cect", "ctnormalization"}
# Hounsfield units of air in a lung or around a body, and the lowest that a file may hold for what was not scanned.
AIR, _LOWEST_CT = -900, -5000
# Words that only look as if they told a side.
_NO_SIDES = {"leftover", "leftovers", "cleft", "righteous"} | {
    f"{start}right" for start in ("al", "b", "birth", "copy", "down", "f", "forth", "out", "playw", "up", "w")
}


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
    normalisation_rules: tuple[str, ...] = ()
    """What was asked for each channel (`data.normalisation`); empty if nothing was."""
    places: Places | None = None
    """Where the labels that train lie; None before they were measured."""
    reasons: dict[str, str] = {}
    """Why, in one sentence for each decision."""

    @property
    def decisions(self) -> "Plan":
        """The plan without its reasons and without places, which follow from the rest: what two runs must share."""
        return self.model_copy(update={"places": None, "reasons": {}})

    @property
    def channel_rules(self) -> tuple[str, ...]:
        """Each channel's rule with `auto` resolved: `image`, `dataset`, or a window as `-160:240`."""
        asked = self.normalisation_rules or ("auto",) * len(self.channels)
        return tuple(
            ("dataset" if is_ct(name) else "image") if rule == "auto" else rule
            for name, rule in zip(self.channels, asked, strict=True)
        )

    @property
    def unitless_channels(self) -> tuple[int, ...]:
        """Channels whose intensities have no unit (MR), so that each scan is normalised by its own."""
        return tuple(number for number, rule in enumerate(self.channel_rules) if rule == "image")

    def with_normalisation(self, rules: tuple[Normalisation, ...], num_cases: int) -> "Plan":
        """Add what was measured on the cases that train."""
        reasons = {
            why.normalisation_key(self.channels, number): why.normalisation(
                asked,
                by_hand=bool(self.normalisation_rules) and self.normalisation_rules[number] != "auto",
                limits=(rule.low, rule.high),
                num_cases=num_cases,
            )
            for number, (asked, rule) in enumerate(zip(self.channel_rules, rules, strict=True))
        }
        return self.model_copy(update={"normalisation": rules, "reasons": self.reasons | reasons})

    @property
    def lines(self) -> list[str]:
        """The plan in a few lines: what was decided, and why."""
        size = "×".join(map(str, self.crop_size))
        decided = {
            "resize": f"whole scans resized to {size} voxels" if self.resize else "",
            "crop_size": "" if self.resize else f"crops of {size} voxels",
            "spacing_mm": "" if self.resize else f"voxels of {why.lengths(self.spacing_mm)}",
            "strides": "strides " + ", ".join("×".join(map(str, stride)) for stride in self.strides),
            "flip_axes": "mirrored axes: " + (", ".join("xyz"[axis] for axis in self.flip_axes) or "none"),
        }
        lines = [f"{text}: {self.reasons[key]}" for key, text in decided.items() if text]
        rest: dict[str, list[str]] = {}
        for key, reason in self.reasons.items():
            if key not in decided:
                rest.setdefault(reason, []).append(key.removeprefix("normalisation of "))
        return lines + [f"normalisation of {', '.join(keys)}: {reason}" for reason, keys in rest.items()]

    @property
    def num_outputs(self) -> int:
        """Channels of the network's output: one for merged classes (sigmoid), else classes and background."""
        return 1 if self.merged else len(self.classes) + 1

    @property
    def mask_classes(self) -> dict[int, str]:
        """Class names by the value that a mask stores."""
        return {1: "foreground"} if self.merged else self.classes

    @property
    def network_shapes(self) -> NetworkShapes:
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
        flip: mirroring is allowed.
        patch_size: edge of a cubic token patch, or None where a stem with planned strides makes the tokens.

    Raises:
        ConfigError: `data.normalisation` names another number of channels than the dataset has, or a crop would be
            a single voxel.
    """
    reasons: dict[str, str] = {}
    spacing, reasons["spacing_mm"] = _spacing(found, data)
    extent = found.median_extent_mm
    shape = tuple(length / edge for length, edge in zip(extent, spacing, strict=True))
    if patch_size is not None:
        strides: Strides = ((patch_size,) * 3, (1, 1, 1), (1, 1, 1))
        reasons["strides"] = f"tokens are cubes of {patch_size} voxels (network.patch_size)"
    elif data.strides is not None:
        strides, reasons["strides"] = data.strides, f"{why.BY_HAND} (data.strides)"
    else:
        # To whole voxels, or a median scan of 15.99 would be counted as one of 15.
        strides = plan_strides(spacing, [round(size, 1) for size in shape])
        reasons["strides"] = why.strides(strides, spacing, shape)
    unit = total_stride(strides)
    if data.crop_size is not None:
        x, y, z = (math.ceil(size / step) * step for size, step in zip(data.crop_size, unit, strict=True))
        crop = (x, y, z)
    else:
        crop = plan_crop(extent, spacing, unit, data.max_crop_voxels)
    if math.prod(crop) < 2:
        raise ConfigError(
            f"a crop of {'×'.join(map(str, crop))} voxel has nothing to learn from (voxels of {why.lengths(spacing)}); use larger scans, or a smaller data.spacing_mm"
        )
    reasons["crop_size"] = why.crop(crop, spacing, extent, unit, data)
    flips, reasons["flip_axes"] = _flips(dataset, data, allowed=flip)
    reasons["resize"] = (
        "whole scans are squeezed to crop_size (data.geometry=resize)"
        if data.geometry == "resize"
        else "scans keep their proportions and are cropped (data.geometry=native)"
    )
    asked = data.normalisation or ()
    if asked and len(asked) != len(dataset.channels):
        raise ConfigError(
            f"data.normalisation names {len(asked)} channels, the dataset has {len(dataset.channels)} ({', '.join(dataset.channels)}); name each"
        )
    plan = Plan(
        channels=dataset.channels,
        classes=dataset.classes,
        merged=data.labels == "foreground",
        resize=data.geometry == "resize",
        spacing_mm=spacing,
        crop_size=crop,
        strides=strides,
        flip_axes=flips,
        normalisation_rules=asked,
    )
    for number, rule in enumerate(plan.channel_rules):
        key = why.normalisation_key(dataset.channels, number)
        reasons[key] = why.normalisation(rule, by_hand=bool(asked) and asked[number] != "auto")
    return plan.model_copy(update={"reasons": reasons})


def _spacing(found: Fingerprint, data: DataConfig) -> tuple[SpacingMm, str]:
    extent = found.median_extent_mm
    if data.geometry == "resize":
        assert data.crop_size is not None, "checked with the configuration"
        # Voxels of a squeezed scan are this large, and rotations must know it.
        x, y, z = (round_mm(length / size) for length, size in zip(extent, data.crop_size, strict=True))
        return (x, y, z), f"follows from squeezing the median scan of {why.lengths(extent)}"
    if data.spacing_mm is not None:
        return data.spacing_mm, f"{why.BY_HAND} (data.spacing_mm)"
    axis = thick_axis(found.median_spacing_mm, found.median_shape)
    spacings = list(found.spacings_mm.values())
    native = median_or_thinner(spacings, axis, data.thick_axis_percentile)
    reason = why.native_spacing(spacings, native, axis, data.thick_axis_percentile)
    if data.crop_size is not None:
        return native, reason
    share = seen_share(axis)
    raised = raise_spacing(native, extent, data.max_crop_voxels, data.coarsest_mm, share=share)
    if raised != native:
        reason = why.raised_spacing(native, raised, extent, data, share=share)
    return raised, reason


def _flips(dataset: Dataset, data: DataConfig, *, allowed: bool) -> tuple[tuple[int, ...], str]:
    sides = _tells_sides(dataset.classes)
    if data.flip_axes is not None:
        reason = f"{why.BY_HAND} (data.flip_axes)"
        if sides and "x" in data.flip_axes:
            reason += f", although the class {sides!r} tells left from right"
        return tuple("xyz".index(name) for name in sorted(set(data.flip_axes))), reason
    if not allowed:
        return (), f"{why.BY_HAND} (augment.flip=none or augment.enabled=false)"
    if sides:
        return (), f"nothing is mirrored, since the class {sides!r} tells left from right"
    if not dataset.classes:
        return (0,), f"left and right are mirrored; {why.SIDES_UNNAMED}"
    return (0,), "left and right are mirrored, since no class name tells them apart"


def has_values_of_ct(low: float, high: float) -> bool:
    """Whether a scan reaches from air to tissue in Hounsfield units, whatever its channel is called.

    Air is -1000; outside of the circle some scanners write lower values. MRI has none below 0.
    """
    return _LOWEST_CT <= low <= AIR and high > 0


def is_ct(channel: str) -> bool:
    """MSD and nnU-Net name computed tomography `CT`; others add words to it, or what it shows.

    >>> [is_ct(name) for name in ("CT arterial", "CTA", "T1ct", "PET/CT")]
    [True, True, False, False]
    """
    words = re.findall("[a-z0-9]+", channel.lower())
    # `T1 ct` is contrast-enhanced MR, `PET/CT` may be either, and maps of perfusion are no Hounsfield units.
    if any(re.fullmatch("t[12].*|pet|mri?|cb[fv]|mtt|tmax|maps?", word) for word in words):
        return False
    return not _CT.isdisjoint(words)


def _tells_sides(classes: dict[int, str]) -> str | None:
    """The first class name that tells a side."""
    # "left ventricle" and "right ventricle" differ in shape and wall, not by mirroring alone, but a network that
    # has seen mirrored hearts has lost the position that tells them apart in an unclear scan.
    names = {_spelt(name): name for name in classes.values()}
    return next(
        (name for spelt, name in names.items() if _names_side(spelt) or _has_twin(spelt, names)), None
    )


def _spelt(name: str) -> str:
    """Words in small letters: `KidneyRight` and `LKidney` are two words each, but `LNs` (lymph nodes) is one."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", " ", name).lower()


def _names_side(spelt: str) -> bool:
    # Vertebrae are called L1, and margins R0.
    if re.search(r"(?<![a-z])([lr](?!\d)|lt|rt|lv|rv|la|ra|lh|rh)(?![a-z])", spelt):
        return True
    words = set(re.findall("[a-z]+", spelt)) - _NO_SIDES
    return any(word.startswith(("left", "right")) or word.endswith(("left", "right")) for word in words)


def _has_twin(spelt: str, others: Container[str]) -> bool:
    """Another class has this name but for the side, as `rib_L1` and `rib_R1`, or `lkidney` and `rkidney`."""
    letters = re.finditer(r"(?<![a-z])l|l(?![a-z])", spelt)
    twins = [f"{spelt[: found.start()]}r{spelt[found.end() :]}" for found in letters]
    return any(twin in others for twin in [*twins, spelt.replace("left", "right")] if twin != spelt)


def read_plan(run_dir: RunDir) -> Plan:
    """Read a run's plan.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return Plan.model_validate_json(run_dir.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir.plan} is missing or damaged ({' '.join(str(error).split())[:80]}); restore the run folder"
        ) from None
