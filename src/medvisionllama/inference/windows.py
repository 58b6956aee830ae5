"""Probabilities on the grid that the network sees, a few planes at a time.

Windows of the training crop's size are blended with Gaussian weights: first those that lie side by side in a slab,
then the slabs along one axis, whose planes are given out as soon as no further slab touches them. The weights are a
product over axes, so the result is that of blending all windows at once, as MONAI does, and memory holds one slab
of logits however long the scan is.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from medvisionllama.data.planning import Plan
from medvisionllama.inference.views import View, brought_back, can_turn, coverage, seen, views_of
from medvisionllama.types import LogitBatch, Triple

Network = Callable[[Tensor], LogitBatch]
Context = Callable[[], AbstractContextManager[None]]
_SIGMA = 0.125  # of the Gaussian weights, as a share of the window: MONAI's and nnU-Net's value
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class SlidingWindow:
    """A network that looks at a scan through windows of its crop's size, slab by slab along one axis."""

    network: Network
    plan: Plan
    axis: int
    """Along which slabs follow each other; see `slab_axis`."""
    overlap: float
    """Share of a window that its neighbour covers too."""
    device: torch.device | str = "cpu"
    normalise: Callable[[Tensor], Tensor] = lambda slab: slab
    """Applied to each slab of a scan before the network sees it."""
    context: Context = nullcontext
    """Entered while the network works, and for nothing else: autocast, say, under which PyTorch turns and averages
    views in half precision too."""

    def probabilities(self, image: Tensor, *, flip: bool, turn: bool = False) -> Iterator[Tensor]:
        """Yield class probabilities `[k, x, y, z]`, background first: pieces that follow each other along the axis.

        Args:
            image: `[c, x, y, z]` on the network's grid.
            flip: average with the prediction of the mirrored image, along the axes that training mirrors.
            turn: average with those of the image turned and zoomed across the axis, where its voxels allow it.
        """
        x, y, z = image.shape[1:]
        views = views_of(self.plan, (x, y, z), axis=self.axis, flip=flip, turn=turn)
        counts = [view.weight * coverage(view, self.axis, self.plan, (x, y, z)) for view in views]
        total = sum(counts, torch.zeros(1))
        weights = [count / total for count in counts]
        for logits in self.blended(image, views):
            yield _squash(logits, self.plan, weights)

    def blended(self, image: Tensor, views: Sequence[View] = (View(),)) -> Iterator[Tensor]:
        """Yield what the network returns, windows blended: `[view, k, x, y, z]` pieces along the axis.

        Args:
            views: ways to look at the image, whose logits come back onto its own voxels.
        """
        axis = self.axis
        window, size = self.plan.crop_size[axis], image.shape[axis + 1]
        starts = window_starts(size, window, self.overlap)
        profile = _profile(window).view([-1 if dim == axis + 2 else 1 for dim in range(5)])
        total = weight = torch.empty(0)
        for number, start in enumerate(starts):
            slab = self.normalise(image.narrow(axis + 1, start, min(window, size)))
            with torch.no_grad():
                logits = torch.cat([self._seen_as(view, slab) for view in views])
            if len(starts) == 1:
                yield logits
                return
            if number == 0:
                total, weight = logits * profile, profile.clone()
            else:
                kept = window - (start - starts[number - 1])
                total = _shifted(total, kept, axis + 2) + logits * profile
                weight = _shifted(weight, kept, axis + 2) + profile
            finished = starts[number + 1] - start if number + 1 < len(starts) else window
            yield total.narrow(axis + 2, 0, finished) / weight.narrow(axis + 2, 0, finished)

    def _seen_as(self, view: View, slab: Tensor) -> LogitBatch:
        """Logits `[1, k, x, y, z]` of a slab `[c, x, y, z]` that the network sees as a view shows it."""
        x, y, z = slab.shape[1:]
        shown = seen(slab[None], view, self.axis, self.plan)
        with self.context():
            logits = self._blend_row(shown)
        return brought_back(logits, view, self.axis, self.plan, (x, y, z)).cpu()

    def _blend_row(self, slab: Tensor) -> LogitBatch:
        """Logits `[1, k, x, y, z]` of a slab `[1, c, x, y, z]` one window thick."""
        window = self.plan.crop_size
        padded, inside = _padded(slab, window)
        weights = _row_weights(window, self.axis)
        sides = zip(padded.shape[2:], window, strict=True)
        starts = (window_starts(size, length, self.overlap) for size, length in sides)
        total = weight = torch.empty(0)
        for corner in product(*starts):
            here = _box(corner, window)
            # Windows visit the device one by one; the scan itself, which may be large, stays in main memory.
            # The averaged thing must be linear in what is averaged, so blend logits and squash once.
            logits = self.network(padded[here].to(self.device)).float()
            if not total.numel():
                shape = (1, logits.shape[1], *padded.shape[2:])
                place = _place_of_sums(logits.device, math.prod(shape))
                total, weights = torch.zeros(shape, device=place), weights.to(place)
                weight = torch.zeros(1, 1, *padded.shape[2:], device=place)
            total[here] += logits.to(total.device) * weights
            weight[here] += weights
        return (total / weight)[inside]


def slab_axis(shape: Sequence[int], plans: Sequence[Plan], *, turn: bool = False) -> int:
    """The longest axis that no plan mirrors: a slab along it is the smallest share of the scan.

    Along a mirrored axis the windows of the mirrored image would lie a little elsewhere than the mirrored windows.

    Args:
        turn: first of all an axis across which most plans can turn a scan: of thick slices, that across them.
    """
    mirrored = {axis for plan in plans for axis in plan.flip_axes}
    turning = [sum(can_turn(plan, shape, axis) for plan in plans) if turn else 0 for axis in range(3)]
    return max(range(3), key=lambda axis: (turning[axis], axis not in mirrored, shape[axis], axis))


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First planes of the windows along an axis: as few as overlap by that share, evenly from end to end.

    So nnU-Net has them. In steps of full length, as MONAI has them, the last two lie nearly on each other, and what
    stands in the middle of the scan lies in no window's middle.

    >>> window_starts(175, 112, 0.5)
    [0, 32, 63]
    """
    if size <= window:
        return [0]
    number = math.ceil((size - window) / max(1, int(window * (1 - overlap)))) + 1
    return [round(place * (size - window) / (number - 1)) for place in range(number)]


def _profile(length: int) -> Tensor:
    offsets = torch.arange(length) - (length - 1) / 2
    return torch.exp(-(offsets**2) / (2 * (_SIGMA * length) ** 2)).clamp_min(_LEAST_WEIGHT)


def _shifted(held: Tensor, kept: int, dim: int) -> Tensor:
    """Drop the planes that were given out, and add as many empty ones at the end."""
    length = held.shape[dim]
    empty = torch.zeros_like(held.narrow(dim, 0, length - kept))
    return torch.cat([held.narrow(dim, length - kept, kept), empty], dim=dim)


def _padded(slab: Tensor, window: Triple) -> tuple[Tensor, tuple[slice, ...]]:
    """A slab with zeros around it where it is smaller than a window, and where in that it lies."""
    sizes = slab.shape[2:]
    missing = [max(0, length - size) for size, length in zip(sizes, window, strict=True)]
    before = [number // 2 for number in missing]
    # PyTorch names the last axis first.
    margins = [end for axis in (2, 1, 0) for end in (before[axis], missing[axis] - before[axis])]
    return torch.nn.functional.pad(slab, margins), _box(before, sizes)


def _box(corner: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Where a box lies in `[b, k, x, y, z]`."""
    sides = (slice(start, start + length) for start, length in zip(corner, size, strict=True))
    return (slice(None), slice(None), *sides)


def _place_of_sums(device: torch.device, number: int) -> torch.device:
    """Where so many logits of a row are added up: where they are computed if there is plenty of room, else in main
    memory, to which each window's logits are then brought."""
    if device.type != "cuda":
        return device
    # Turned back, a row is there up to four times; half of what is free is left to others.
    fits = 8 * 4 * number < torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


def _row_weights(window: Triple, axis: int) -> Tensor:
    profiles = [torch.ones(size) if dim == axis else _profile(size) for dim, size in enumerate(window)]
    return reduce(torch.mul, torch.meshgrid(*profiles, indexing="ij")).clamp_min(_LEAST_WEIGHT)[None, None]


def _squash(logits: LogitBatch, plan: Plan, weights: Sequence[Tensor]) -> Tensor:
    """Logits `[view, k, x, y, z]` to probabilities `[k, x, y, z]`, averaged over views by their weights.

    Args:
        weights: of each view, `[1, x, y, z]` or of size 1 along any of these; their sum is 1 everywhere.
    """
    shares = logits.sigmoid() if plan.num_outputs == 1 else logits.softmax(dim=1)
    if len(shares) == 1:
        mean = shares[0]  # itself, to the last bit
    else:
        weighted = (share * weight for share, weight in zip(shares, weights, strict=True))
        mean = sum(weighted, torch.zeros(1))
    return torch.cat([1 - mean, mean]) if plan.num_outputs == 1 else mean
