"""Frozen transformer blocks of pretrained language models, as plain modules on token sequences."""

from medvisionllama.llm.block import FrozenBlock
from medvisionllama.llm.catalog import CATALOG, CatalogEntry
from medvisionllama.llm.prompt import embed_prompt

__all__ = ["CATALOG", "CatalogEntry", "FrozenBlock", "embed_prompt"]
