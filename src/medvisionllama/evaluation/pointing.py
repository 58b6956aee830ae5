"""Whether a map points at a mask: scores of one map against one mask on one grid.

`hit` is the pointing game (Zhang et al. 2018): 1 if the map's maximum lies inside the mask. Where several voxels
share the maximum it is the share of them that lie inside, so a constant map scores as one that guesses.
`hit_near` grants a tolerance of one token, since a map knows no finer place. `energy` is the share of the map's sum
that lies inside; divided by the mask's share of the volume it is `energy_ratio`, 1 for a map that does not know the
mask. `auc` is the chance that the map is greater at a random voxel inside than at one outside: 0.5 for such a map,
whatever the map's unit and offset. What guessing would score stands beside: `volume_share` and `near_share`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from medvisionllama.types import MaskArray, Triple

Map = Float[np.ndarray, "x y z"]
Edges = tuple[float, float, float]
_NAN = float("nan")


@dataclass(frozen=True)
class Pointing:
    """One map and mask; every number but the shares is NaN where the mask is empty."""

    hit: float
    hit_near: float
    energy: float
    energy_ratio: float
    auc: float
    volume_share: float
    """Of the mask: what `hit` and `energy` would be by chance."""
    near_share: float
    """Of all voxels within a token of the mask: what `hit_near` would be by chance."""


@dataclass(frozen=True)
class Target:
    """A mask and its surroundings, prepared once for all maps.

    Held is the part of the scan with something in it, since a scan may have a hundred classes.
    """

    box: tuple[slice, ...]
    """Where that part lies."""
    mask: MaskArray
    near: MaskArray
    size: int
    """Voxels of the whole scan."""


def make_target(mask: MaskArray, token: Edges) -> Target:
    """Prepare a mask; `token` is the length of a token's edges in voxels."""
    from scipy.ndimage import find_objects

    near = within(mask, token)
    # The mask is near itself, so one box holds both.
    boxes = find_objects(near.view(np.uint8))
    box = boxes[0] if boxes else (slice(0, 0),) * mask.ndim
    return Target(box, mask[box].copy(), near[box].copy(), mask.size)


def score(values: Map, targets: Iterable[Target]) -> list[Pointing]:
    """Score a map that is nowhere negative against several masks on its grid."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=None).reshape(values.shape)
    best = values == values.max()
    num_best = int(best.sum())
    total = float(values.sum(dtype=np.float64))
    return [_score(values, ranks, best, num_best, total, target) for target in targets]


def _score(
    values: Map, ranks: np.ndarray, best: MaskArray, num_best: int, total: float, target: Target
) -> Pointing:
    inside, size = int(target.mask.sum()), target.size
    share, near_share = inside / size, int(target.near.sum()) / size
    if not inside:
        return Pointing(_NAN, _NAN, _NAN, _NAN, _NAN, share, near_share)
    # Voxels keep their order in the box, so sums are to the bit those over the whole scan.
    values, ranks, best = values[target.box], ranks[target.box], best[target.box]
    energy = float(values[target.mask].sum(dtype=np.float64)) / total if total > 0 else _NAN
    return Pointing(
        hit=int(target.mask[best].sum()) / num_best,
        hit_near=int(target.near[best].sum()) / num_best,
        energy=energy,
        energy_ratio=energy / share,
        auc=_auc(float(ranks[target.mask].sum()), inside, size - inside),
        volume_share=share,
        near_share=near_share,
    )


def _auc(sum_of_ranks: float, inside: int, outside: int) -> float:
    """Area under the ROC curve from the Mann-Whitney statistic."""
    return (sum_of_ranks - inside * (inside + 1) / 2) / (inside * outside) if outside else _NAN


def within(mask: MaskArray, reach: Edges) -> MaskArray:
    """Voxels at most one reach from the mask, measured along each axis in that axis' own reach."""
    from scipy.ndimage import distance_transform_edt, find_objects

    near = np.zeros(mask.shape, dtype=bool)
    boxes = find_objects(mask.view(np.uint8))
    if not boxes:
        return near
    # Far from the mask nothing is near it, so distances are measured in a box around it.
    margins = [math.ceil(edge) for edge in reach]
    part = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side, margin in zip(boxes[0], margins, strict=True)
    )
    distance = distance_transform_edt(~mask[part], sampling=[1 / edge for edge in reach])
    near[part] = distance <= 1 + 1e-9
    return near


def peak(values: Map) -> Triple:
    """Voxel of a map's maximum; of several equal ones, as at the border of a scan, the one nearest their middle."""
    equal = np.argwhere(values == values.max())
    nearest = equal[((equal - equal.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    x, y, z = nearest.tolist()
    return (x, y, z)
