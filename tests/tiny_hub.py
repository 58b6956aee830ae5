"""One random Llama as three repositories: in one file of safetensors, in several, and as a pickle."""

import shutil
from pathlib import Path

import torch

from tiny_llama import SETTINGS, save_tiny_llama

WIDER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
"""A layer of about half a megabyte: more than the first bytes that are read of any file."""
HUB_SETTINGS = {**SETTINGS, **WIDER, "model_type": "llama", "rms_norm_eps": 1e-6}
BLOCK_BYTES = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 3 * 128)
"""One layer and the last norm."""


def save_repositories(folder: Path) -> None:
    """Write `whole`, `sharded` and `pickled`."""
    model = save_tiny_llama(folder / "whole", **WIDER)
    save_tiny_llama(folder / "sharded", max_shard_size="700KB", **WIDER)
    (folder / "pickled").mkdir()
    shutil.copy(folder / "whole" / "config.json", folder / "pickled")
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
