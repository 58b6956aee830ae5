import math

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from medvisionllama.training.losses import SupervisedSegmenter, dice_ce_loss, targets

SHAPE = (5, 4, 3)


def _logits(num_outputs, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, num_outputs, *SHAPE, generator=generator, dtype=dtype)


def _labels(num_classes):
    return torch.randint(0, num_classes, (2, *SHAPE), generator=torch.Generator().manual_seed(1))


def test_softmax_loss_equals_monais():
    logits, labels = _logits(4), _labels(4)
    settings = {"include_background": False, "softmax": True, "to_onehot_y": True, "squared_pred": True}
    monai = DiceCELoss(**settings, batch=True)
    torch.testing.assert_close(dice_ce_loss(logits, targets(labels, 4)), monai(logits, labels[:, None]))


def test_sigmoid_loss_equals_monais():
    logits, labels = _logits(1), _labels(2)
    monai = DiceCELoss(sigmoid=True, squared_pred=True, batch=True)
    torch.testing.assert_close(
        dice_ce_loss(logits, targets(labels, 1)), monai(logits, labels[:, None].float())
    )


def test_even_odds_cost_what_a_hand_computes():
    """Two voxels, one of them foreground, probabilities of a half: Dice 2·½ / (½ + 1), entropy log 2."""
    labels = torch.tensor([0, 1]).view(1, 2, 1, 1)
    expected = 1 - 1 / 1.5 + math.log(2)
    for num_outputs in (1, 2):
        loss = dice_ce_loss(torch.zeros(1, num_outputs, 2, 1, 1), targets(labels, num_outputs))
        assert float(loss) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_outputs", [1, 4])
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(num_outputs):
    target = targets(_labels(4), num_outputs)
    assert float(dice_ce_loss(60 * target - 30, target)) == pytest.approx(0, abs=1e-5)
    assert float(dice_ce_loss(30 - 60 * target, target)) > 10


def test_a_class_that_is_absent_and_not_predicted_costs_nothing():
    target = targets(torch.zeros(1, *SHAPE, dtype=torch.long), 3)
    assert float(dice_ce_loss(60 * target - 30, target)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_gradients_equal_finite_differences(num_outputs):
    logits = _logits(num_outputs, dtype=torch.float64).requires_grad_()
    target = targets(_labels(3), num_outputs).double()
    assert torch.autograd.gradcheck(lambda logits: dice_ce_loss(logits, target), logits)


def test_gradient_descent_on_logits_finds_the_labels():
    logits, target = _logits(3).requires_grad_(), targets(_labels(3), 3)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        dice_ce_loss(logits, target).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), _labels(3))


def test_one_output_is_any_foreground():
    labels = torch.tensor([0, 1, 3]).view(1, 3, 1, 1)
    assert targets(labels, 1).flatten().tolist() == [0, 1, 1]
    assert targets(labels, 4)[0, :, :, 0, 0].T.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


class _Coarse(nn.Module):
    """Returns the same logits at full and at half resolution."""

    def __init__(self):
        super().__init__()
        self.full = nn.Parameter(torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
        self.coarse = nn.Parameter(torch.randn(1, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1)))

    def forward_all(self, images):
        return self.full, [self.coarse]


def test_coarser_logits_are_compared_with_shares_of_their_voxels():
    labels = torch.randint(0, 2, (1, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    network = _Coarse()
    full = dice_ce_loss(network.full, targets(labels, 2))
    foreground = labels.float().view(2, 2, 2, 2, 2, 2).mean(dim=(1, 3, 5))
    half = dice_ce_loss(network.coarse, torch.stack([1 - foreground, foreground])[None])
    for weight in (0.0, 0.3):
        model = SupervisedSegmenter(network, num_outputs=2, auxiliary_weight=weight)
        torch.testing.assert_close(model(torch.zeros(1), labels), full + weight * half)


def test_the_loss_is_computed_in_float32_under_autocast():
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    network = _Coarse().bfloat16()
    model = SupervisedSegmenter(network, num_outputs=2, auxiliary_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1), labels).dtype == torch.float32
