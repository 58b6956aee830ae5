"""Networks, all of one class; `MedVisionLlama` is the published one with its pieces named."""

from medvisionllama.networks.medvisionllama import MedVisionLlama
from medvisionllama.networks.segmenter import TokenSegmenter

__all__ = ["MedVisionLlama", "TokenSegmenter"]
