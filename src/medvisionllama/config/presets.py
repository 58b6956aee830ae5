"""Named full configurations. Each is the difference from the defaults of `schema.py`, with literal sizes."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from medvisionllama.errors import ConfigError
from medvisionllama.types import RivalName

Settings = dict[str, Any]


def small() -> Settings:
    """Two networks of a thin convolutional stem and skip head around the tokens; minutes on two CPU cores."""
    return {
        "augment": _AUGMENTATION,
        "network": {**_SKIP_HEAD, "gate": "zero", "context_channels": [96, 192]},
        "train": {**_TRAINING, "max_minutes": 20.0, "members": 2},
        "inference": {"turn": True},
    }


def large() -> Settings:
    """`small` in the widths of one GPU: crops up to four times as large, five times the trained parameters."""
    return {
        "data": {"max_crop_voxels": 524_288},
        "augment": _AUGMENTATION,
        "network": {
            **_SKIP_HEAD,
            "gate": "zero",
            "stem_channels": [32, 64, 128],
            "context_channels": [256, 320],
            "width": 384,
            "depth": 8,
            "insert_after": 6,
            "num_heads": 6,
        },
        "train": {**_TRAINING, "max_minutes": 60.0, "batch_size": 4},
        "inference": {"turn": True},
    }


def paper() -> Settings:
    """The published data flow (arXiv 2410.02458): encoder, VD1, block with a residual, VD2, decoder.

    The text gives one number of transformer blocks; we read it as encoder and decoder together. Dropout acts on
    the sublayers' outputs, not on the attention matrix, so that 4,096 tokens fit a machine of ordinary memory.
    """
    return {
        "data": _PUBLISHED_DATA,
        "augment": _PUBLISHED_AUGMENTATION,
        "network": {
            **_PUBLISHED_VIT,
            "insert_after": 8,
            "mapper": "linear+lora",
            "block": {"source": "llama-3.1-8b", "lora_rank": 4},
        },
        "train": _PUBLISHED_TRAINING,
        "inference": {"flip": False},
    }


def reference() -> Settings:
    """The published code's data flow: the block before positions and transformer, frozen random mappers.

    Its scales differ: the last norm's weights are 1 there, the update of a mapper counts a quarter (1 / rank), and
    positions start with deviation 1. So does its augmentation.
    """
    return {
        "data": _PUBLISHED_DATA,
        "augment": _PUBLISHED_AUGMENTATION,
        "network": {
            **_PUBLISHED_VIT,
            "insert_after": 0,
            "positions": "after_insert",
            "attention_dropout": 0.2,
            "mapper": "lora",
            "block": {"source": "llama-3.1-8b"},
        },
        "train": {**_PUBLISHED_TRAINING, "schedule": "plateau"},
        "inference": {"flip": False},
    }


_SKIP_HEAD: Settings = {"refine": True, "join_convolutions": None}
_AUGMENTATION: Settings = {"elastic": 0.05, "bias_field": 0.6}
# Few validations: each segments all validation cases, in minutes that training could have.
_TRAINING: Settings = {"optimizer": "muon", "num_validations": 4, "gate_learning_rate_scale": 5.0}
_PUBLISHED_DATA: Settings = {"labels": "foreground", "geometry": "resize", "crop_size": [128, 128, 128]}
_PUBLISHED_AUGMENTATION: Settings = {"rotation_degrees": 10.0, "scale": [0.9, 1.1], "translation": 0.05}
_PUBLISHED_VIT: Settings = {
    "head": "linear",
    "patch_size": 8,
    "width": 64,
    "depth": 16,
    "num_heads": 4,
    "dropout": 0.2,
}
_PUBLISHED_TRAINING: Settings = {
    "epochs": 200,
    "batch_size": 4,
    "optimizer": "adam",
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_steps": 0,
    "ema_decay": 0.0,
    "auxiliary_weight": 0.0,
}


def rival(architecture: str) -> Settings:
    """One of MONAI's networks, trained as `small` is."""
    return {**small(), "network": {"architecture": architecture, "tokens": False, "insert": "none"}}


RIVALS: tuple[str, ...] = get_args(RivalName)
"""MONAI's networks, each a preset of its own name."""
PRESETS: dict[str, Callable[[], Settings]] = {
    "small": small,
    "large": large,
    "paper": paper,
    "reference": reference,
    **{name: partial(rival, name) for name in RIVALS},
}


def preset_settings(name: str) -> Settings:
    """Return a preset's settings.

    Raises:
        ConfigError: no preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; the presets are: {', '.join(PRESETS)}")
    return {"preset": name, **PRESETS[name]()}
