"""When plain matrix products beat PyTorch's fused attention kernel."""

import torch

from medvisionllama.autocast import autocast_dtype

_SHORT = 1024


def plain_is_faster(tokens: torch.Tensor) -> bool:
    """True for short bf16 sequences `[..., n, width]` on a CPU, whose fused kernel is tuned for long ones.

    Forward and backward on Zen 4: 175 tokens of 9 heads on two cores take 3.1 ms plain, 11.2 ms fused; 980 of 2×4
    heads on one core 39 and 63, 2,048 the same 410 and 420. At float32 and on GPUs the fused kernel wins.
    """
    if tokens.is_cuda or tokens.shape[-2] > _SHORT:
        return False
    return (autocast_dtype(tokens.device.type) or tokens.dtype) == torch.bfloat16
