"""Probabilities of a whole scan: windows of the training crop's size, blended with Gaussian weights (MONAI)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvisionllama.data.planning import Plan
from medvisionllama.types import LogitBatch


@torch.no_grad()
def predict_probabilities(
    network: nn.Module,
    image: Tensor,
    plan: Plan,
    *,
    overlap: float,
    flip: bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return class probabilities `[k, x, y, z]`, background first, of a normalised image `[c, x, y, z]`.

    Args:
        overlap: share of a window that its neighbour covers too.
        flip: average with the prediction of the mirrored image, along the axes that training mirrors.
    """
    batch = image[None]
    total = _probabilities(network, batch, plan, overlap, device)
    turns = [(axis + 2,) for axis in plan.flip_axes] if flip else []
    for axes in turns:
        total = total + _probabilities(network, batch.flip(axes), plan, overlap, device).flip(axes)
    return (total / (1 + len(turns)))[0]


def native_mask(probabilities: Tensor, shape: Sequence[int], plan: Plan) -> np.ndarray:
    """Bring probabilities to the scan's grid in RAS and take the likeliest class, as label values."""
    if tuple(probabilities.shape[1:]) != tuple(shape):
        probabilities = F.interpolate(
            probabilities[None], size=tuple(shape), mode="trilinear", align_corners=False
        )[0]
    winner = probabilities.argmax(dim=0).cpu().numpy()
    values = np.array([0, *plan.output_values])
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)[winner]


def _probabilities(
    network: nn.Module, batch: Tensor, plan: Plan, overlap: float, device: torch.device | str
) -> Tensor:
    from monai.inferers import sliding_window_inference

    def logits(windows: Tensor) -> LogitBatch:
        # The averaged thing must be linear in what is averaged, so blend logits and squash once.
        result: Tensor = network(windows.contiguous(memory_format=torch.channels_last_3d))
        return result.float()

    # Windows visit the device one by one; the scan itself, which may be large, stays in main memory.
    blended = sliding_window_inference(
        batch,
        plan.crop_size,
        1,
        logits,
        overlap=overlap,
        mode="gaussian",
        sigma_scale=0.125,
        sw_device=device,
        device="cpu",
    )
    assert isinstance(blended, Tensor)
    if plan.num_outputs == 1:
        foreground = blended.sigmoid()
        return torch.cat([1 - foreground, foreground], dim=1)
    return blended.softmax(dim=1)
