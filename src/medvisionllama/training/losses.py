"""Dice plus cross-entropy on probabilities, differentiable, at every supervised resolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.training.processes import sum_with_gradient
from medvisionllama.types import ImageBatch, LabelBatch, LogitBatch


def targets(labels: LabelBatch, num_outputs: int) -> Tensor:
    """Class numbers to `[b, k, x, y, z]`: one map a class, or the foreground alone if there is one output."""
    if num_outputs == 1:
        return (labels > 0).float()[:, None]
    # `F.one_hot` would hold 64-bit integers first: half a gigabyte for a crop with 62 outputs.
    maps = torch.zeros((*labels.shape, num_outputs), device=labels.device).movedim(-1, 1)
    return maps.scatter_(1, labels[:, None], 1.0)


def dice_ce_loss(
    logits: LogitBatch, target: Tensor, *, whole_batch: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """Mean of `1 - Dice` over foreground classes, plus cross-entropy (binary for one output).

    Dice is taken over the batch as one volume (Isensee et al. 2021), so a class absent from one crop is no cliff.
    Targets may be shares between 0 and 1, as at coarser strides.

    Args:
        whole_batch: turns sums over this process's share of the batch into sums over all of it. The mean over
            processes of what is returned is then the loss of the whole batch.
    """
    if logits.shape[1] == 1:
        probability, cross_entropy = logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, target)
    else:
        cross_entropy = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
        probability, target = logits.softmax(dim=1)[:, 1:], target[:, 1:]
    axes = (0, 2, 3, 4)
    overlap = 2 * (probability * target).sum(axes)
    total = (probability**2).sum(axes) + (target**2).sum(axes)
    overlap, total = whole_batch(torch.stack([overlap, total]))
    dice = (overlap + 1e-5) / (total + 1e-5)
    return 1 - dice.mean() + cross_entropy


class SupervisedSegmenter(nn.Module):
    """A network and its loss as one module, so that every wrapper (DDP, autocast, compile) sees one call.

    In a run of several processes each returns its part of the loss, of which the batch's is the mean.
    """

    def __init__(self, network: TokenSegmenter, *, num_outputs: int, auxiliary_weight: float) -> None:
        super().__init__()
        self.network = network
        self.num_outputs = num_outputs
        self.auxiliary_weight = auxiliary_weight

    def forward(self, images: ImageBatch, labels: LabelBatch) -> Tensor:
        """Return the loss of a batch."""
        logits, auxiliary = self.network.forward_all(images)
        with torch.autocast(logits.device.type, enabled=False):
            target = targets(labels, self.num_outputs)
            loss = dice_ce_loss(logits.float(), target, whole_batch=sum_with_gradient)
            # Also with weight zero: a layer without a gradient would make distributed training wait for one.
            for coarse in auxiliary:
                x, y, z = coarse.shape[2:]
                shares = F.adaptive_avg_pool3d(target, (x, y, z))
                lower = dice_ce_loss(coarse.float(), shares, whole_batch=sum_with_gradient)
                loss = loss + self.auxiliary_weight * lower
        return loss
