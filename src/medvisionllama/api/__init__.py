"""The command line's verbs as functions of the same names and arguments."""

from medvisionllama.api.data import check, fingerprint, plan, split
from medvisionllama.api.runs import demo, evaluate, explain, predict, train
from medvisionllama.data.convert import convert
from medvisionllama.data.download import download

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
