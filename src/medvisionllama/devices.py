"""Which device and precision a run uses; training and prediction ask here, so they agree."""

from contextlib import AbstractContextManager
from typing import TypeVar, get_args

import torch
from torch import nn

from medvisionllama.errors import ConfigError
from medvisionllama.types import DeviceChoice, PrecisionChoice

N = TypeVar("N", bound=nn.Module)
_BAD_CUDNN = range(90800, 91500)
"""Versions whose 3-D convolutions in bf16 give wrong numbers or take many times as long; some versions of PyTorch
go around them, slowly and with much memory (its issues 163539, 166122 and 166643)."""
_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def choose_device(wanted: DeviceChoice) -> torch.device:
    """Take the GPU if there is one, unless told otherwise.

    Raises:
        ConfigError: a GPU was asked for and there is none, or it was asked for by another name.
    """
    if wanted not in get_args(DeviceChoice):
        raise ConfigError(
            f"device={str(wanted)!r} does not exist; allowed: {', '.join(get_args(DeviceChoice))} (of several GPUs CUDA_VISIBLE_DEVICES chooses)"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "cuda was asked for, but PyTorch sees no GPU here; use cpu or auto (--device, train.device)"
        )
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def use_bf16(wanted: PrecisionChoice, device: torch.device) -> bool:
    """True if products run in bf16: when asked to, or by `auto` where the hardware has such products.

    That is AVX512-BF16 or AMX on CPUs, Ampere and later on GPUs. Elsewhere bf16 would be emulated, and slower.
    """
    if wanted != "auto":
        return wanted == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def device_words(wanted: DeviceChoice, precision: PrecisionChoice) -> str:
    """Where a network will work, for people: who has a GPU wants to know if it is not used."""
    device = choose_device(wanted)
    numbers = "bf16" if use_bf16(precision, device) else "float32"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, in {numbers}"
    why = "" if wanted == "cpu" else "; PyTorch sees no GPU"
    return f"the CPU, {torch.get_num_threads()} threads, in {numbers}{why}"


def convolution_caution(device: torch.device, *, bf16: bool, cudnn: int | None) -> str | None:
    """What to look at before convolutions in bf16 run on a GPU, if anything.

    Args:
        cudnn: its version as `torch.backends.cudnn.version` tells it; None if there is none.
    """
    if device.type != "cuda" or not bf16 or cudnn is None or cudnn not in _BAD_CUDNN:
        return None
    version = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return f"look at this: 3-D convolutions in bf16 are wrong or very slow with cuDNN {version}; pip install 'nvidia-cudnn-cu12>=9.15' (cu13 if PyTorch is for CUDA 13), or give --set train.precision=fp32"


def emulation_caution(device: torch.device, *, bf16: bool, block_dtype: str | None) -> str | None:
    """What to look at before a network runs in bf16 where the hardware has no such products, if anything.

    Args:
        bf16: whether training asks for it.
        block_dtype: precision in which a frozen block is kept, and computes without autocast; None without a block.
    """
    if use_bf16("auto", device) or not (bf16 or block_dtype == "bfloat16"):
        return None
    setting = "train.precision=auto" if bf16 else "network.block.dtype=float32"
    return f"look at this: this machine has no products in bf16, and what is emulated takes many times longer; give --set {setting}"


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that keeps the numerical libraries of a new process to so many threads."""
    return dict.fromkeys(_THREAD_LIMITS, str(threads))


def fast_layout(network: N) -> N:
    """Keep a network's convolutions in its own layout: channels last, unless it says otherwise."""
    wanted = getattr(network, "memory_format", torch.channels_last_3d)
    return network.to(memory_format=wanted)  # type: ignore[call-overload]


def autocast(wanted: PrecisionChoice, device: torch.device) -> AbstractContextManager[None]:
    """Context in which a network predicts: in the precision that training would use on this machine."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(wanted, device))
