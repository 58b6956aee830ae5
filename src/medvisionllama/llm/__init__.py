"""Frozen transformer blocks of pretrained language models, as plain modules on token sequences."""

from medvisionllama.llm.block import FrozenBlock
from medvisionllama.llm.catalog import CATALOG, CatalogEntry
from medvisionllama.llm.describe import list_models, show
from medvisionllama.llm.prompt import embed_prompt
from medvisionllama.llm.pulling import Pulled, pull

__all__ = ["CATALOG", "CatalogEntry", "FrozenBlock", "Pulled", "embed_prompt", "list_models", "pull", "show"]
