"""What is said of the device that is used."""

import pytest
import torch

from medvisionllama.devices import (
    choose_device,
    convolution_caution,
    device_words,
    emulation_caution,
    use_bf16,
)
from medvisionllama.errors import ConfigError


def test_who_has_a_gpu_is_told_that_it_is_not_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    assert device_words("auto", "fp32") == f"the CPU, {threads} threads, in float32; PyTorch sees no GPU"
    assert device_words("cpu", "bf16") == f"the CPU, {threads} threads, in bf16"


def test_a_gpu_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert device_words("auto", "bf16") == "NVIDIA H200, in bf16"


@pytest.mark.parametrize(
    ("cudnn", "said"),
    [
        (90701, None),
        (90800, "cuDNN 9.8.0;"),
        (91002, "cuDNN 9.10.2;"),
        (91400, "cuDNN 9.14.0;"),
        (91500, None),
    ],
)
def test_a_cudnn_that_is_bad_at_bf16_is_pointed_out_with_the_cure(cudnn, said):
    line = convolution_caution(torch.device("cuda"), bf16=True, cudnn=cudnn)
    assert line is None if said is None else said in line and "nvidia-cudnn-cu12>=9.15" in line
    assert convolution_caution(torch.device("cuda"), bf16=False, cudnn=cudnn) is None
    assert convolution_caution(torch.device("cpu"), bf16=True, cudnn=None) is None


@pytest.mark.parametrize("wanted", ["cuda:1", "gpu", torch.device("cpu")])
def test_a_device_by_another_name_is_not_taken_for_one(wanted):
    with pytest.raises(ConfigError, match=r"does not exist; allowed: auto, cpu, cuda .*CUDA_VISIBLE_DEVICES"):
        choose_device(wanted)


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_bf16_is_chosen_where_the_processor_has_it_and_elsewhere_doubted(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu, has = torch.device("cpu"), avx512 or amx
    assert use_bf16("auto", cpu) is has
    assert use_bf16("bf16", cpu)
    assert not use_bf16("fp32", cpu)
    for asked, setting in (
        ({"bf16": True, "block_dtype": None}, "train.precision=auto"),
        ({"bf16": False, "block_dtype": "bfloat16"}, "network.block.dtype=float32"),
    ):
        line = emulation_caution(cpu, **asked)
        assert (line is None) if has else (line and line.endswith(f"give --set {setting}"))
    assert emulation_caution(cpu, bf16=False, block_dtype="float32") is None
