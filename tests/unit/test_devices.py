"""What is said of the device that is used."""

import torch

from medvisionllama.devices import device_words


def test_who_has_a_gpu_is_told_that_it_is_not_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    assert device_words("auto", "fp32") == f"the CPU, {threads} threads, in float32; PyTorch sees no GPU"
    assert device_words("cpu", "bf16") == f"the CPU, {threads} threads, in bf16"


def test_a_gpu_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert device_words("auto", "bf16") == "NVIDIA H200, in bf16"
