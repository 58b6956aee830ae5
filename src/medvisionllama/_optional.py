"""Packages that only an extra brings, imported where they are used."""

import importlib
from types import ModuleType

from medvisionllama.errors import MedVisionLlamaError


class MissingExtraError(MedVisionLlamaError):
    """A package of an extra is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import a module that an extra of this package installs.

    Raises:
        MissingExtraError: it is not there; the message has the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; run: pip install 'medvisionllama[{extra}]'"
        ) from None
