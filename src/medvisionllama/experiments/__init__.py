"""Many runs that answer one question: which there are, who runs them, what they found.

The verbs of `medvisionllama experiment` are functions here: `plan`, `run`, `status` and `report`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvisionllama.experiments.verbs import plan, report, run, status

__all__ = ["plan", "report", "run", "status"]


def __getattr__(name: str) -> Any:
    # Workers import this package before they choose their cores, and PyTorch counts cores when it is imported.
    if name in __all__:
        return getattr(import_module("medvisionllama.experiments.verbs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
