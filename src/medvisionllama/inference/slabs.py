"""From probabilities on the network's grid to the scan's own grid, a few planes at a time."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvisionllama.data.planning import Plan
from medvisionllama.types import LabelArray, Triple

_SLAB_BYTES = 64 << 20


def native_slabs(
    planes: Iterable[Tensor], grid: Triple, shape: Triple, *, axis: int, thickness: int
) -> Iterator[Tensor]:
    """Interpolate linearly from `grid` to `shape`, as `F.interpolate` does with `align_corners=False`.

    Args:
        planes: `[k, x, y, z]` pieces that follow each other along `axis`.
        thickness: planes of the scan in each piece given out; the last may be thinner.
    """
    source, dim = iter(planes), axis + 1
    before, after, share = _neighbours(grid[axis], shape[axis])
    held: list[Tensor] = []
    first = 0  # plane of the grid that `held` begins with
    for start in range(0, shape[axis], thickness):
        wanted = slice(start, min(start + thickness, shape[axis]))
        low, high = int(before[wanted][0]), int(after[wanted][-1])
        while first + sum(piece.shape[dim] for piece in held) <= high:
            held.append(next(source))
            while held and first + held[0].shape[dim] <= low:
                first += held.pop(0).shape[dim]
        joined = torch.cat(held, dim) if len(held) > 1 else held[0]
        held = [joined.narrow(dim, low - first, joined.shape[dim] - (low - first))]
        first = low
        slab = _between(held[0], before[wanted] - low, after[wanted] - low, share[wanted], dim)
        target = [slab.shape[1 + other] if other == axis else shape[other] for other in range(3)]
        if list(slab.shape[1:]) != target:
            slab = F.interpolate(slab[None], size=target, mode="trilinear", align_corners=False)[0]
        yield slab


def native_mask(
    planes: Iterable[Tensor], grid: Triple, shape: Triple, plan: Plan, *, axis: int
) -> LabelArray:
    """Bring probabilities to the scan's grid and take the likeliest class of each voxel; arguments as above.

    All classes of a whole scan are never held at once.
    """
    values = label_values(plan)
    thickness = slab_thickness(shape, len(values), axis)
    slabs = native_slabs(planes, grid, shape, axis=axis, thickness=thickness)
    return np.concatenate([values[likeliest(slab)] for slab in slabs], axis=axis)


def label_values(plan: Plan) -> np.ndarray:
    """What a mask stores for each class, background first, in the smallest type that holds it."""
    values = np.array([0, *plan.output_values])
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)


def slab_thickness(shape: Triple, num_classes: int, axis: int) -> int:
    """Planes that keep a slab of probabilities near 64 MB."""
    plane = 4 * num_classes * int(np.prod([shape[other] for other in range(3) if other != axis]))
    return max(1, min(shape[axis], _SLAB_BYTES // plane))


def likeliest(slab: Tensor) -> np.ndarray:
    """Index of the largest of `[k, x, y, z]`; the first of equals."""
    if len(slab) > 256:
        return slab.argmax(dim=0).cpu().numpy()
    # Class by class instead of argmax over the outermost axis, which PyTorch walks against the grain of memory.
    best = slab[0].clone()
    winner = torch.zeros(slab.shape[1:], dtype=torch.uint8, device=slab.device)
    for index in range(1, len(slab)):
        stronger = slab[index] > best
        winner.masked_fill_(stronger, index)
        torch.maximum(best, slab[index], out=best)
    return winner.cpu().numpy()


def entropy(slab: Tensor) -> Tensor:
    """Entropy of `[k, x, y, z]` over classes, 0 where one class is certain and 1 where all are equally likely."""
    return torch.special.entr(slab).sum(dim=0) / float(np.log(len(slab)))


def _neighbours(size: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each plane of the target: the planes before and after it, and how far it is from the first."""
    place = ((torch.arange(target, dtype=torch.float64) + 0.5) * (size / target) - 0.5).clamp_min(0)
    before = place.long().clamp_max(size - 1)
    return before, (before + 1).clamp_max(size - 1), (place - before).float()


def _between(held: Tensor, before: Tensor, after: Tensor, share: Tensor, dim: int) -> Tensor:
    if not share.any():
        low, high = int(before[0]), int(before[-1])
        if high - low + 1 == len(before):
            return held.narrow(dim, low, len(before))
    weight = share.view([-1 if other == dim else 1 for other in range(held.dim())])
    return torch.lerp(held.index_select(dim, before), held.index_select(dim, after), weight)
