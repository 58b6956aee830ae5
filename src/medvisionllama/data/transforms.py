"""Augmentation of a whole batch in torch: one resampling for image and label, affine and elastic, then intensities.

Parameters are drawn first, from a generator that the caller seeds; applying them is deterministic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvisionllama.config import AugmentConfig
from medvisionllama.types import ImageBatch, LabelBatch, SpacingMm, Triple

_IN_PLANE_RATIO = 3.0
"""Of a crop's sides, above which it is turned little out of its planes; of spacings, above which slices stay."""
_ELASTIC_SPANS = 3
"""Of an elastic displacement along each axis: a cubic spline over thirds of the crop."""
_BIAS_SPAN_MM = 70.0
"""A bias field changes over about the size of a coil's element; a small crop sees little more than its slope."""
_EFFECTS = ("brightness", "contrast", "gamma", "noise", "blur", "low_resolution")


@dataclass(frozen=True)
class Parameters:
    """What was drawn for one case of a batch."""

    matrix: np.ndarray
    """3×3, from an offset in the crop (voxels) to an offset in the region it is cut from."""
    shift: np.ndarray
    """Voxels added to that offset."""
    effects: dict[str, float]
    """Strength of each intensity effect that was drawn."""
    noise_seed: int
    apart: tuple[int, ...] = ()
    """Axes along which voxels are too far apart to be mixed."""
    elastic: np.ndarray | None = None
    """Displacements `[3, 6, 6, 6]` in voxels at a spline's control points."""
    bias_field: np.ndarray | None = None
    """Logarithms of a gain `[x, y, z]` at a spline's control points."""


class Augmentation:
    """Draws parameters and applies them to a batch of regions, giving crops.

    Args:
        unitless_channels: those normalised scan by scan, as in MR; others are not changed by a bias field.
    """

    def __init__(
        self,
        config: AugmentConfig,
        spacing_mm: SpacingMm,
        crop_size: Triple,
        flip_axes: tuple[int, ...],
        unitless_channels: tuple[int, ...] = (),
    ) -> None:
        self.config = config
        self.unitless_channels = unitless_channels
        self.spacing_mm = np.asarray(spacing_mm)
        self.crop_size = crop_size
        self.flip_axes = flip_axes
        # Along an axis of one voxel there is nothing to turn into, to zoom or to shift to.
        self.flat_axes = [axis for axis, size in enumerate(crop_size) if size == 1]
        # A mixture of two thick slices is nothing that a scanner makes, and nothing that prediction shows.
        self.apart = tuple(
            axis
            for axis, spacing in enumerate(self.spacing_mm)
            if spacing > _IN_PLANE_RATIO * np.delete(self.spacing_mm, axis).max()
        )
        self.still_axes = sorted({*self.flat_axes, *self.apart})

    def __call__(
        self, images: ImageBatch, labels: LabelBatch, rng: np.random.Generator
    ) -> tuple[ImageBatch, LabelBatch]:
        """Cut the middle of each region, moved and changed at random unless augmentation is off."""
        return self.apply(images, labels, self.draw_batch(len(images), rng))

    def draw_batch(self, size: int, rng: np.random.Generator) -> list[Parameters]:
        """Draw the parameters of a batch; none if augmentation is off."""
        return [self.draw(rng) for _ in range(size)] if self.config.enabled else []

    def apply(
        self, images: ImageBatch, labels: LabelBatch, parameters: list[Parameters]
    ) -> tuple[ImageBatch, LabelBatch]:
        """Do what was drawn, case by case."""
        if not self.config.enabled:
            return _middle(images, self.crop_size), _middle(labels, self.crop_size)
        images, labels = apply_spatial(images, labels, parameters, self.crop_size)
        changed = [
            apply_intensity(self._through_coil(image, drawn), drawn)
            for image, drawn in zip(images, parameters, strict=True)
        ]
        return torch.stack(changed), labels

    def _through_coil(self, image: Tensor, drawn: Parameters) -> Tensor:
        if drawn.bias_field is None:
            return image
        return apply_bias_field(image, drawn.bias_field, self.unitless_channels)

    def draw(self, rng: np.random.Generator) -> Parameters:
        """Draw one case's parameters."""
        config = self.config
        matrix, shift = np.eye(3), np.zeros(3)
        if rng.random() < config.spatial_probability:
            # Turn in millimetres, or a rotation would shear scans whose voxels are not cubes.
            turn = _rotation(
                np.deg2rad(rng.uniform(-1, 1, 3) * config.rotation_degrees * self._axis_freedom())
            )
            zoom = np.exp(rng.uniform(*np.log(config.scale)))
            matrix = np.diag(1 / self.spacing_mm) @ turn @ np.diag(self.spacing_mm) / zoom
            shift = rng.uniform(-1, 1, 3) * config.translation * np.asarray(self.crop_size)
            matrix[self.still_axes, self.still_axes] = 1.0
            shift[self.still_axes] = np.round(shift[self.still_axes])
            shift[self.flat_axes] = 0.0
        for axis in self.flip_axes:
            if rng.random() < 0.5:
                matrix[:, axis] *= -1
        effects = {
            name: float(rng.uniform(-1, 1))
            for name in _EFFECTS
            if rng.random() < config.intensity_probability
        }
        noise_seed = int(rng.integers(2**31))
        return Parameters(
            matrix,
            shift,
            effects,
            noise_seed,
            self.apart,
            self._draw_elastic(rng),
            self._draw_bias_field(rng),
        )

    def _draw_elastic(self, rng: np.random.Generator) -> np.ndarray | None:
        config = self.config
        # Nothing is drawn without need: runs from before there was this setting repeat themselves.
        if config.elastic == 0 or rng.random() >= config.elastic_probability:
            return None
        deviation = rng.uniform(0.3, 1.0) * config.elastic * np.asarray(self.crop_size)
        deviation[self.still_axes] = 0.0
        return rng.standard_normal((3, *[_ELASTIC_SPANS + 3] * 3)) * deviation[:, None, None, None]

    def _draw_bias_field(self, rng: np.random.Generator) -> np.ndarray | None:
        config = self.config
        if config.bias_field == 0 or not self.unitless_channels:
            return None
        if rng.random() >= config.bias_field_probability:
            return None
        extent_mm = np.asarray(self.crop_size) * self.spacing_mm
        points = [math.ceil(length / _BIAS_SPAN_MM) + 3 for length in extent_mm]
        return rng.standard_normal(points) * rng.uniform(0, config.bias_field)

    def _axis_freedom(self) -> np.ndarray:
        """Share of the full angle allowed about each axis.

        Thick slices are turned in their plane alone; a few thin ones turned far out of it show little but padding.
        """
        extent_mm = np.asarray(self.crop_size) * self.spacing_mm
        uneven = [
            any(
                np.delete(sizes, axis).max() > _IN_PLANE_RATIO * np.delete(sizes, axis).min()
                for sizes in (self.spacing_mm, extent_mm)
            )
            for axis in range(3)
        ]
        freedom = np.where(uneven, 0.25, 1.0)
        still = [any(other != axis for other in self.still_axes) for axis in range(3)]
        return np.where(still, 0.0, freedom)


def apply_spatial(
    images: ImageBatch, labels: LabelBatch, parameters: list[Parameters], crop: Triple
) -> tuple[ImageBatch, LabelBatch]:
    """Resample regions to crops: images linearly, labels class by class, both on the same grid of points."""
    theta = torch.from_numpy(np.stack([_theta(p, crop, images.shape[2:]) for p in parameters])).to(images)
    grid = F.affine_grid(theta, [len(images), 1, *crop], align_corners=False)
    to_unit = torch.tensor([2 / size for size in images.shape[2:]])
    for points, drawn in zip(grid, parameters, strict=True):
        if drawn.elastic is not None:
            field = spline_field(drawn.elastic, crop).movedim(0, -1) * to_unit
            points += field.flip(-1).to(points)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved, _sample_labels(labels, grid)


def spline_field(control_points: np.ndarray, size: Sequence[int]) -> Tensor:
    """Smooth field `[k, x, y, z]` by the splines of free-form deformation (Rueckert et al. 1999).

    A spline flattens what is drawn at its points; that is made up for, so that the field deviates as they do.

    Args:
        control_points: `[k, i, j, l]`, along each axis three more than the spline has spans.
    """
    field = torch.from_numpy(control_points).float()
    for length, points in zip(size, control_points.shape[1:], strict=True):
        # The axis in front goes to the end: after three turns x, y and z stand as before.
        field = torch.tensordot(field, _spline(length, points - 3), dims=([1], [1]))
    return field


@lru_cache(maxsize=16)
def _spline(size: int, spans: int) -> Tensor:
    """Weights `[size, spans + 3]` of the control points at each voxel of an axis."""
    from scipy.interpolate import BSpline

    # Knots go on past the ends, or the field would be largest there.
    knots = np.arange(-3, spans + 4) / spans
    weights = BSpline.design_matrix((np.arange(size) + 0.5) / size, knots, 3).toarray()
    return torch.from_numpy(weights / np.sqrt((weights**2).sum(axis=1).mean())).float()


def apply_bias_field(image: Tensor, control_points: np.ndarray, channels: Sequence[int]) -> Tensor:
    """Brighten one side of `[c, x, y, z]` and darken another, as the coils of an MR scanner do.

    The gain multiplies what is above the darkest voxel, which stands for no signal. Mean and deviation stay, since
    each scan is normalised by its own.

    Args:
        control_points: logarithms of the gain `[i, j, l]`, for `spline_field`.
        channels: those to change; one field for all, as they come from one scanner.
    """
    gain = spline_field(control_points[None], image.shape[1:]).exp()
    changed = image.clone()
    for channel in channels:
        before = image[channel]
        after = (before - before.min()) * gain[0]
        scale = before.std(correction=0) / after.std(correction=0).clamp_min(1e-6)
        changed[channel] = (after - after.mean()) * scale + before.mean()
    return changed


def apply_intensity(image: Tensor, drawn: Parameters) -> Tensor:
    """Change the intensities of `[c, x, y, z]`, normalised to about unit deviation."""
    for name, strength in drawn.effects.items():
        image = _APPLY[name](image, strength, drawn)
    return image


def _theta(drawn: Parameters, crop: Triple, region: torch.Size) -> np.ndarray:
    # grid_sample counts each axis from -1 to 1 across its full length and names the last axis first.
    to_voxels, to_unit = np.diag(np.asarray(crop) / 2), np.diag(2 / np.asarray(region))
    matrix = to_unit @ drawn.matrix @ to_voxels
    shift = to_unit @ drawn.shift
    return np.concatenate([matrix[::-1, ::-1], shift[::-1, None]], axis=1).astype(np.float32)


def _sample_labels(labels: LabelBatch, grid: Tensor) -> LabelBatch:
    best = torch.zeros(grid.shape[:-1])
    result = torch.zeros(grid.shape[:-1], dtype=torch.int64)
    # A few classes at a time: the places are found once for all of them, and memory stays small for many classes.
    for values in _present(labels).split(4):
        masks = (labels[:, None] == values.view(-1, 1, 1, 1)).float()
        shares = F.grid_sample(masks, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for value, share in zip(values.tolist(), shares.unbind(1), strict=True):
            # Outside the region no class has a share, and the result stays background.
            stronger = share > best
            result[stronger] = value
            best = torch.where(stronger, share, best)
    return result


def _present(labels: LabelBatch) -> Tensor:
    """Class numbers that occur: `unique`, without sorting every voxel, which takes 3 % of a training step."""
    return labels.flatten().bincount().nonzero()[:, 0]


def _rotation(angles: np.ndarray) -> np.ndarray:
    x, y, z = angles
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def _middle(batch: Tensor, crop: Triple) -> Tensor:
    starts = [(size - length) // 2 for size, length in zip(batch.shape[-3:], crop, strict=True)]
    x, y, z = (slice(start, start + length) for start, length in zip(starts, crop, strict=True))
    return batch[..., x, y, z]


def _brightness(image: Tensor, strength: float, _: Parameters) -> Tensor:
    return image + 0.3 * strength


def _contrast(image: Tensor, strength: float, _: Parameters) -> Tensor:
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return (image - mean) * 1.5**strength + mean


def _gamma(image: Tensor, strength: float, _: Parameters) -> Tensor:
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return ((image - low) / span) ** (1.5**strength) * span + low


def _noise(image: Tensor, strength: float, drawn: Parameters) -> Tensor:
    generator = torch.Generator().manual_seed(drawn.noise_seed)
    return image + 0.15 * abs(strength) * torch.randn(image.shape, generator=generator)


def _blur(image: Tensor, strength: float, drawn: Parameters) -> Tensor:
    sigma = 0.5 + 0.5 * abs(strength)
    offsets = torch.arange(-2.0, 3.0)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    blurred = image[:, None]
    for axis in set(range(3)) - set(drawn.apart):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 5
        padding = [2 if other == axis else 0 for other in range(3)]
        blurred = F.conv3d(blurred, kernel.view(shape), padding=padding)
        # At the ends less of the kernel lies in the crop, and of an axis of one voxel its middle alone.
        inside = F.conv1d(torch.ones(1, 1, image.shape[1 + axis]), kernel.view(1, 1, 5), padding=2)
        blurred = blurred / inside.view([-1 if size == 5 else 1 for size in shape])
    return blurred[:, 0]


def _low_resolution(image: Tensor, strength: float, drawn: Parameters) -> Tensor:
    factor = 1 - 0.5 * abs(strength)
    sizes = enumerate(image.shape[1:])
    small = [size if axis in drawn.apart else max(1, round(size * factor)) for axis, size in sizes]
    reduced = F.interpolate(image[None], size=small, mode="nearest-exact")
    return F.interpolate(reduced, size=image.shape[1:], mode="trilinear", align_corners=False)[0]


_APPLY = {
    "brightness": _brightness,
    "contrast": _contrast,
    "gamma": _gamma,
    "noise": _noise,
    "blur": _blur,
    "low_resolution": _low_resolution,
}
