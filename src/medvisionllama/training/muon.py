"""Muon: momentum made orthogonal, for the kernels between channels."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of degree five that lifts small singular values fastest (Jordan et al. 2024)."""
_ITERATIONS = 5
_UPDATE_SCALE = 0.2
"""Root mean square of AdamW's usual updates: both take one learning rate by it (Liu et al. 2025, 2502.16982)."""
_TURN = 15.0
"""Size of a step beside its kernel's where a norm follows, at a rate of one: 3 % at 0.002 (decision 0036)."""
_FEWEST_CHANNELS = 8


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups marked `orthogonal`, AdamW for the others.

    Kernels of groups marked `turns` are turned and keep their size, all by one angle, however large they began. A
    kernel of any number of axes counts as a matrix, its first axis against all others. One optimiser and not two,
    so that a run has one state and one set of groups; PyTorch's own takes matrices alone.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step; a closure is not supported, as nothing here has one."""
        assert closure is None
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                self._step_orthogonal(group)
        # AdamW steps through every group it sees.
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        for kernel in group["params"]:
            if kernel.grad is None:
                continue
            state = self.state[kernel]
            if not state:
                state["momentum"] = torch.zeros_like(kernel)
            momentum = state["momentum"].lerp_(kernel.grad, 1 - _MOMENTUM)
            ahead = kernel.grad.lerp(momentum, _MOMENTUM).flatten(1)
            direction = orthogonalised(ahead).view(kernel.shape)
            if group["turns"]:
                size = kernel.norm()
                kernel.sub_(direction * (group["lr"] * _TURN * size / min(ahead.shape) ** 0.5))
                # Without this it would grow by its every step, each larger than the last.
                kernel.mul_(size / kernel.norm())
            else:
                scale = _UPDATE_SCALE * max(ahead.shape) ** 0.5
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.add_(direction, alpha=-group["lr"] * scale)


def kernels_before_norms(network: nn.Module) -> set[Tensor]:
    """Kernels whose direction alone counts: of convolutions without a bias, which a norm would take away as well.

    Not those of one voxel, which are maps of ours that no norm follows; nor those of a network that says by
    `norms_first` that its norms come before its convolutions; nor what begins at zero and has no size to keep.
    """
    others = {
        inner
        for module in network.modules()
        if getattr(module, "norms_first", False)
        for inner in module.modules()
    }
    return {
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Conv3d)
        and module not in others
        and module.bias is None
        and math.prod(module.kernel_size) > 1
        and module.weight.any()
    }


def is_orthogonal(parameter: nn.Parameter) -> bool:
    """Whether a convolution's kernel maps channels to channels; the rest is left to AdamW.

    So is what reads voxels or writes a few classes, and so are the matrices of tokens: the work goes by weights,
    and tokens are few, so that it would take as long as their forward and backward pass.
    """
    return parameter.ndim > 2 and min(parameter.shape[:2]) >= _FEWEST_CHANNELS


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring every singular value of `[m, n]` near one (0.7 to 1.2), but for those below a thousandth of them all.

    Newton and Schulz's iteration goes over the Gram matrix of the shorter side, which is many times smaller than a
    kernel, and in float32, where squaring loses nothing that matters; the kernel is multiplied once, at the end.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    matrix = matrix / matrix.norm().clamp_min(1e-12)
    gram = matrix @ matrix.T
    product = factor = _factor(gram)
    for _ in range(_ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ matrix


def _factor(gram: Tensor) -> Tensor:
    """What one iteration multiplies a matrix by whose Gram matrix this is."""
    linear, cubic, quintic = _COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
    factor.diagonal().add_(linear)
    return factor
