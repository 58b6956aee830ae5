"""Settings as typed code: `load_config` turns a preset, a file and overrides into one validated `Config`."""

from medvisionllama.config.load import ONE_VIEW, load_config, read_config, write_config
from medvisionllama.config.presets import PRESETS
from medvisionllama.config.schema import (
    AugmentConfig,
    BlockConfig,
    Config,
    DataConfig,
    InferenceConfig,
    NetworkConfig,
    TrainConfig,
)

__all__ = [
    "ONE_VIEW",
    "PRESETS",
    "AugmentConfig",
    "BlockConfig",
    "Config",
    "DataConfig",
    "InferenceConfig",
    "NetworkConfig",
    "TrainConfig",
    "load_config",
    "read_config",
    "write_config",
]
