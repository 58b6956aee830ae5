"""Segment 3-D medical scans from a handful of labelled cases.

Every name below is imported on first use, so that `import medvisionllama` costs milliseconds: torch, MONAI and
transformers load only when something needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "medvisionllama.config",
    "FrozenBlock": "medvisionllama.llm",
    "MedVisionLlama": "medvisionllama.networks",
    "Predictor": "medvisionllama.inference.predictor",
    "TokenSegmenter": "medvisionllama.networks",
    "check": "medvisionllama.api",
    "convert": "medvisionllama.api",
    "demo": "medvisionllama.api",
    "download": "medvisionllama.api",
    "evaluate": "medvisionllama.api",
    "explain": "medvisionllama.api",
    "fingerprint": "medvisionllama.api",
    "fit": "medvisionllama.training.fit",
    "load_config": "medvisionllama.config",
    "plan": "medvisionllama.api",
    "predict": "medvisionllama.api",
    "split": "medvisionllama.api",
    "train": "medvisionllama.api",
}
_PACKAGES = ("experiments", "llm")
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from medvisionllama.api import check as check
    from medvisionllama.api import convert as convert
    from medvisionllama.api import demo as demo
    from medvisionllama.api import download as download
    from medvisionllama.api import evaluate as evaluate
    from medvisionllama.api import explain as explain
    from medvisionllama.api import fingerprint as fingerprint
    from medvisionllama.api import plan as plan
    from medvisionllama.api import predict as predict
    from medvisionllama.api import split as split
    from medvisionllama.api import train as train
    from medvisionllama.config import Config as Config
    from medvisionllama.config import load_config as load_config
    from medvisionllama.inference.predictor import Predictor as Predictor
    from medvisionllama.llm import FrozenBlock as FrozenBlock
    from medvisionllama.networks import MedVisionLlama as MedVisionLlama
    from medvisionllama.networks import TokenSegmenter as TokenSegmenter
    from medvisionllama.training.fit import fit as fit


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(
            f"module 'medvisionllama' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
