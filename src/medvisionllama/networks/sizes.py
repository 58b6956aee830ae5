"""How large a network is: its parameters, and the operations of one crop.

Operations are those of matrix products and convolutions in the forward pass of one crop, in evaluation: a multiply
and an add count as two; norms, activations, softmax and interpolation do not count. Attention counts every pair of
tokens, masked or not. Counted on the meta device, where nothing is computed and attention is plain products;
elsewhere PyTorch's counter does not see the fused kernel.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.types import Triple


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and of operations for one crop."""

    tokens: int
    """Visual tokens of a crop."""
    trainable: int
    frozen: int
    flops_forward: int
    insert_trainable: int
    """Of these, what lies in the insert."""
    insert_frozen: int
    insert_flops: int

    @property
    def total(self) -> int:
        """Parameters, trained or not."""
        return self.trainable + self.frozen

    @property
    def gflops(self) -> float:
        """Billions of operations in the forward pass of one crop."""
        return self.flops_forward / 1e9


def sizes_of(network: TokenSegmenter, *, num_channels: int, crop_size: Triple) -> Sizes:
    """Count a network that lies on the meta device (`factory.build_meta_network`)."""
    assert all(value.is_meta for value in network.parameters()), "fused attention would not be counted"
    tokens = 0

    def count_tokens(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal tokens
        tokens = inputs[0].shape[1]

    hook = network.encoder.register_forward_pre_hook(count_tokens)
    counter = FlopCounterMode(display=False)
    was_training = network.training
    try:
        with counter, torch.no_grad():
            network.eval()(torch.empty(1, num_channels, *crop_size, device="meta"))
    finally:
        hook.remove()
        network.train(was_training)
    # Modules are named by their place below the outermost one's class.
    inside = counter.get_flop_counts().get(f"{type(network).__name__}.insert", {})
    return Sizes(
        tokens,
        *_parameters(network),
        counter.get_total_flops(),
        *_parameters(network.insert),
        sum(inside.values()),
    )


def _parameters(module: nn.Module) -> tuple[int, int]:
    """Trainable and frozen."""
    counts = [0, 0]
    for parameter in module.parameters():
        counts[not parameter.requires_grad] += parameter.numel()
    return counts[0], counts[1]
