"""The command line's verbs as functions of the same names and arguments."""

from medvisionllama.api.data import check, convert, download, fingerprint, plan, split
from medvisionllama.api.runs import demo, evaluate, explain, predict, train

__all__ = [
    "check",
    "convert",
    "demo",
    "download",
    "evaluate",
    "explain",
    "fingerprint",
    "plan",
    "predict",
    "split",
    "train",
]
