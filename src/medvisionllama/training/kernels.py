"""Kernels of one network for another that halves other axes: what thick slices taught, for even voxels."""

from torch import Tensor, nn

Convolution = nn.Conv3d | nn.ConvTranspose3d


def reshaped(weight: Tensor, before: Convolution, now: Convolution) -> Tensor:
    """A kernel of one voxel along an axis as one of several, and the other way; others stay as they are.

    What looked at one slice looks at the middle one of three, and computes the same. What looked at three looks at
    one as if all three were alike. What was written to one voxel along the axis is written to each of several.

    Args:
        weight: `[out, in, x, y, z]` of `before`, or `[in, out, x, y, z]` if it is transposed.
    """
    sizes = list(zip(before.kernel_size, now.kernel_size, strict=True))
    if before.transposed != now.transposed or not all(
        _can_change(*pair, transposed=now.transposed) for pair in sizes
    ):
        return weight
    for axis, (old, new) in enumerate(sizes):
        dim = axis + 2
        if old == new:
            continue
        if now.transposed and new == 1:
            # Where boxes overlap, a voxel is the sum of as many cells as a box is longer than its stride.
            weight = weight.sum(dim, keepdim=True) / before.stride[axis]
        elif now.transposed:
            weight = weight.repeat_interleave(new, dim) * (now.stride[axis] / new)
        elif new == 1:
            weight = weight.sum(dim, keepdim=True)
        else:
            weight = _in_the_middle(weight, dim, new)
    return weight


def _can_change(old: int, new: int, *, transposed: bool) -> bool:
    """Whether one length can become the other: to a convolution, a box of an even one has no middle."""
    return old == new or (1 in (old, new) and (transposed or old * new % 2 == 1))


def _in_the_middle(weight: Tensor, dim: int, length: int) -> Tensor:
    """One along `dim` among zeros."""
    shape = list(weight.shape)
    shape[dim] = length
    longer = weight.new_zeros(shape)
    longer.narrow(dim, length // 2, 1).copy_(weight)
    return longer
