"""Test-time augmentation: views of a scan whose predictions are averaged, as it is, mirrored, turned and zoomed.

A turned view is resampled in the planes across one axis, segmented, and its logits are brought back. Planes stay
planes, so a slab of a scan can be turned by itself, and scans with thick slices are not cut between them. What a
turn moves out of the picture is not seen in that view, which does not count there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvisionllama.data.planning import Plan
from medvisionllama.types import Triple

Padding = Literal["border", "zeros"]
_MOST_UNEVEN = 1.5
"""Ratio of spacings in a plane above which turning it would make stairs."""
_MOST_OBLONG = 4
"""Ratio of a plane's sides, in voxels, above which most of it would be turned out of the picture."""


@dataclass(frozen=True)
class View:
    """One way to look at a scan."""

    mirrored: tuple[int, ...] = ()
    """Axes."""
    degrees: float = 0.0
    """Turn in the planes across the axis along which a scan is read."""
    zoom: float = 1.0
    """Above 1 everything looks larger."""
    weight: float = 1.0
    """In the mean of all views."""

    @property
    def is_turned(self) -> bool:
        return self.degrees != 0 or self.zoom != 1


TURNED = (View(degrees=-18, zoom=0.83, weight=0.5), View(degrees=18, zoom=1.2, weight=0.5))
"""Nearly as far as augmentation turns and zooms in training. Resampling blurs what is thin, so they count half."""


def views_of(plan: Plan, shape: Sequence[int], *, axis: int, flip: bool, turn: bool) -> list[View]:
    """List the views of a scan that is read along `axis`: as it is, mirrored as in training, and turned.

    Args:
        shape: of the scan on the network's grid.
    """
    mirrored = [View(mirrored=(turned,)) for turned in plan.flip_axes if flip]
    return [View(), *mirrored, *(TURNED if turn and can_turn(plan, shape, axis) else ())]


def can_turn(plan: Plan, shape: Sequence[int], axis: int) -> bool:
    """Whether the planes across `axis` have voxels that are nearly squares, and are no strips.

    Of squeezed scans nobody knows what their voxels are.
    """
    edges, sides = (
        [lengths[other] for other in range(3) if other != axis] for lengths in (plan.spacing_mm, shape)
    )
    even = max(edges) <= _MOST_UNEVEN * min(edges) and max(sides) <= _MOST_OBLONG * min(sides)
    return not plan.resize and even


def seen(slab: Tensor, view: View, axis: int, plan: Plan) -> Tensor:
    """Return a slab `[1, c, x, y, z]` as a view shows it; zoomed, it has more or fewer voxels across `axis`."""
    slab = slab.flip([other + 2 for other in view.mirrored])
    if not view.is_turned:
        return slab
    x, y, z = slab.shape[2:]
    shape = _shown_shape((x, y, z), view, axis)
    return _moved(slab, axis, shape, plan, degrees=view.degrees, zoom=view.zoom)


def brought_back(
    logits: Tensor, view: View, axis: int, plan: Plan, shape: Triple, *, padding: Padding = "border"
) -> Tensor:
    """Return what was computed from a view `[1, k, x, y, z]`, on the slab's own voxels.

    Args:
        padding: what lies where the view shows nothing: what is next to it, or zeros.
    """
    if view.is_turned:
        turn = {"degrees": -view.degrees, "zoom": 1 / view.zoom}
        logits = _moved(logits, axis, shape, plan, **turn, padding=padding)
    return logits.flip([other + 2 for other in view.mirrored])


def coverage(view: View, axis: int, plan: Plan, shape: Triple) -> Tensor:
    """Return how much of each voxel a view shows, from 0 to 1; `[1, x, y, z]`, of size 1 along `axis`.

    A view that is not turned shows all of everything: `[1, 1, 1, 1]`.
    """
    if not view.is_turned:
        return torch.ones(1, 1, 1, 1)
    x, y, z = (1 if other == axis else size for other, size in enumerate(shape))
    shown = torch.ones(1, 1, *_shown_shape((x, y, z), view, axis))
    return brought_back(shown, view, axis, plan, (x, y, z), padding="zeros")[0]


def _shown_shape(shape: Triple, view: View, axis: int) -> Triple:
    x, y, z = (
        size if other == axis else max(1, math.ceil(size * view.zoom)) for other, size in enumerate(shape)
    )
    return (x, y, z)


def _moved(
    volume: Tensor,
    axis: int,
    shape: Triple,
    plan: Plan,
    *,
    degrees: float,
    zoom: float,
    padding: Padding = "border",
) -> Tensor:
    """Turn `[1, c, x, y, z]` about its middle and zoom it, plane by plane across `axis`, onto another shape."""
    first, second = (other for other in range(3) if other != axis)
    spacing = np.diag([plan.spacing_mm[first], plan.spacing_mm[second]])
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    # From a voxel of the result, counted from the middle, to one of what is given; turned in millimetres.
    matrix = np.linalg.inv(spacing) @ turn @ spacing / zoom
    given = np.array([volume.shape[first + 2], volume.shape[second + 2]])
    wanted = np.array([shape[first], shape[second]])
    # grid_sample counts each axis from -1 to 1 across its full length and names the last axis first.
    unit = (matrix * wanted / given[:, None])[::-1, ::-1]
    theta = torch.tensor(np.concatenate([unit, np.zeros((2, 1))], axis=1), dtype=volume.dtype)
    # Channels and planes are all moved alike.
    planes = volume[0].movedim(axis + 1, 1)
    flat = planes.flatten(0, 1)[None]
    # On the CPU, as a GPU may be allowed to round what multiplies positions.
    grid = F.affine_grid(theta[None], [1, 1, *wanted.tolist()], align_corners=False)
    moved = F.grid_sample(
        flat, grid.to(volume.device), mode="bilinear", padding_mode=padding, align_corners=False
    )
    return moved[0].unflatten(0, planes.shape[:2]).movedim(1, axis + 1)[None]
