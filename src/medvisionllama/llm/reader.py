"""`CheckpointReader`: a checkpoint in Hugging Face's or Meta's layout as a source, wherever its files lie.

Which file holds a tensor comes from the index or the file's own directory; then the bytes of the tensors asked for
are read, each converted before the next, so that no more than one is there twice.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medvisionllama.errors import BlockError
from medvisionllama.llm.families import Family
from medvisionllama.llm.names import in_pairs, is_meta, meta_settings, transformers_names, undo_pairs
from medvisionllama.llm.pickle_file import pickle_entries
from medvisionllama.llm.ranges import ByteSource, Entry, read_rows, read_tensor, row_ranges
from medvisionllama.llm.safetensors_file import safetensors_entries
from medvisionllama.llm.sources import LayerTensors, SmallFiles
from medvisionllama.llm.vocabulary import tokenizer_from

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_WEIGHTS_NAME = re.compile(r"[\w][\w.-]{0,200}\.(safetensors|bin)")


class Place(SmallFiles, Protocol):
    """Where a checkpoint's files lie."""

    def weight_files(self) -> Iterable[tuple[str, ...]]:
        """Under which names the weights may lie, best first: an index, or files that hold them together."""

    def open(self, file: str) -> ByteSource | None:
        """Open a file for reading in parts; None if it is not there."""


@dataclass(frozen=True)
class _Stored:
    """The name and the file under which a tensor is stored."""

    name: str
    file: str


@dataclass(frozen=True)
class _Index:
    """What a checkpoint holds, by the names that transformers would use."""

    tensors: dict[str, _Stored]
    meta: bool
    """Whether queries and keys are stored in pairs, as Meta does."""
    total_bytes: int | None


class CheckpointReader:
    """Reads a checkpoint's parts from a place; files are opened when first needed."""

    def __init__(self, place: Place, *, name: str) -> None:
        self.place = place
        self.name = name
        self.settings = read_settings(place)
        self._files: dict[str, tuple[ByteSource, dict[str, Entry | Tensor]]] = {}

    def layer_tensors(
        self,
        positions: Sequence[int],
        family: Family,
        *,
        dtype: torch.dtype | None = None,
        wanted: Collection[str] | None = None,
    ) -> LayerTensors:
        """Read some layers and the last norm.

        Raises:
            BlockError: tensors or files that are missing or damaged.
        """
        layers = [self._layer(position, family, wanted) for position in positions]
        norm = self._first_group(family.norm_prefixes)
        self._prefetch(name for group in (*layers, norm) for name in group.values())
        return LayerTensors(
            tuple(self._tensors(group, dtype) for group in layers), self._tensors(norm, dtype)
        )

    def embedding_rows(self, token_ids: Sequence[int], family: Family) -> Tensor:
        """Read the embeddings of some tokens.

        Raises:
            BlockError: no embedding there, or a token beyond it.
        """
        name = next((name for name in family.embedding_names if name in self._index.tensors), None)
        if name is None:
            raise BlockError(
                f"{self.place.name} holds no {family.embedding_names[0]}; check that config.json belongs to these weights"
            )
        source, content = self._locate(name)
        check_tokens(token_ids, content.shape[0], self.place.name)
        if isinstance(content, Tensor):
            return content[torch.tensor(token_ids, dtype=torch.long)].float()
        source.prefetch(row_ranges(content, token_ids))
        return read_rows(source, content, token_ids).float()

    def tokenizer(self) -> "Tokenizer":
        """Build the tokenizer from the files beside the weights."""
        return tokenizer_from(self.place)

    def checkpoint_bytes(self) -> int | None:
        """Size of all the tensors, as the index says, or of the file."""
        return self._index.total_bytes

    def layer_bytes(self, positions: Sequence[int], family: Family) -> int:
        """Bytes that some layers and the last norm take in the checkpoint; no tensor is read."""
        groups = [self._layer(position, family, None) for position in positions]
        names = [
            name for group in (*groups, self._first_group(family.norm_prefixes)) for name in group.values()
        ]
        contents = [self._locate(name)[1] for name in names]
        return sum(
            content.end - content.start if isinstance(content, Entry) else content.nbytes
            for content in contents
        )

    def is_whole(self) -> bool:
        """Whether every file of weights is there.

        Raises:
            BlockError: none is.
        """
        return all(self.place.open(file) for file in {stored.file for stored in self._index.tensors.values()})

    @cached_property
    def _index(self) -> _Index:
        for files in self.place.weight_files():
            if files[0].endswith(".index.json"):
                content = self.place.content(files[0])
                if content is not None:
                    homes, total = _read_index(content, f"{self.place.name}/{files[0]}", self.place.advice)
                    return _index_of(homes, total)
            elif self._opened(files[0]) is not None:
                return _index_of(
                    {name: file for file in files for name in self._file(file)[1]},
                    sum(self._file(file)[0].size for file in files),
                )
        raise BlockError(
            f"{self.place.name} holds no weights: neither .safetensors nor pytorch_model.bin; {self.place.advice}"
        )

    def _layer(self, position: int, family: Family, wanted: Collection[str] | None) -> dict[str, str]:
        prefixes = [prefix.format(i=position) for prefix in family.layer_prefixes]
        group = self._first_group(prefixes)
        if not group:
            raise BlockError(
                f"{self.place.name} holds no tensor named {prefixes[0]}*; check that config.json belongs to these weights"
            )
        if wanted is None:
            # Old checkpoints keep masks and the like, which are no numbers to compute with.
            return {inner: name for inner, name in group.items() if self._is_floating(name)}
        return {inner: name for inner, name in group.items() if inner in wanted}

    def _is_floating(self, name: str) -> bool:
        return self._locate(name)[1].dtype.is_floating_point

    def _first_group(self, prefixes: Iterable[str]) -> dict[str, str]:
        """Full names of the tensors behind the first prefix that has any, by the rest of the name."""
        groups = (
            {name.removeprefix(prefix): name for name in self._index.tensors if name.startswith(prefix)}
            for prefix in prefixes
        )
        return next(filter(None, groups), {})

    def _tensors(self, group: dict[str, str], dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {inner: self._tensor(name, dtype) for inner, name in group.items()}

    def _tensor(self, name: str, dtype: torch.dtype | None) -> Tensor:
        # A function of its own, so that the tensor as stored is gone before the next is read.
        source, content = self._locate(name)
        tensor = read_tensor(source, content) if isinstance(content, Entry) else content
        if not tensor.is_floating_point():
            raise BlockError(
                f"{self.place.name}: {name} holds {tensor.dtype} numbers; give the unquantised checkpoint"
            )
        if self._index.meta and in_pairs(name):
            tensor = undo_pairs(tensor, name=name, settings=self.settings)
        return tensor.to(dtype or tensor.dtype)

    def _prefetch(self, names: Iterable[str]) -> None:
        located = [self._locate(name) for name in names]
        for source in {source.name: source for source, _ in located}.values():
            entries = [
                content for other, content in located if other is source and isinstance(content, Entry)
            ]
            source.prefetch([(entry.start, entry.end) for entry in entries])

    def _locate(self, name: str) -> tuple[ByteSource, Entry | Tensor]:
        stored = self._index.tensors[name]
        source, entries = self._file(stored.file)
        if stored.name not in entries:
            raise BlockError(
                f"{source.name} lacks {stored.name}, which the checkpoint's index says it holds; {source.advice}"
            )
        return source, entries[stored.name]

    def _file(self, file: str) -> tuple[ByteSource, dict[str, Entry | Tensor]]:
        opened = self._opened(file)
        if opened is None:
            raise BlockError(
                f"{self.place.name}/{file} is named by the checkpoint's index but absent; {self.place.advice}"
            )
        return opened

    def _opened(self, file: str) -> tuple[ByteSource, dict[str, Entry | Tensor]] | None:
        if file not in self._files:
            source = self.place.open(file)
            if source is None:
                return None
            entries: dict[str, Any] = (
                safetensors_entries(source) if file.endswith(".safetensors") else pickle_entries(source)
            )
            self._files[file] = source, entries
        return self._files[file]


def read_settings(place: SmallFiles) -> dict[str, Any]:
    """Read a checkpoint's config.json, or Meta's params.json.

    Raises:
        BlockError: neither is there, not JSON, no model_type, or a quantised checkpoint.
    """
    content, file = place.content("config.json"), "config.json"
    if content is None:
        content, file = place.content("params.json"), "params.json"
    if content is None:
        raise BlockError(
            f"{place.name} has no config.json, so it is no Hugging Face checkpoint; {place.advice}"
        )
    where = f"{place.name}/{file}"
    settings = _parse(content, where, place.advice)
    if file == "params.json" and isinstance(settings, dict):
        return meta_settings(settings, where=where)
    # A model for images and text keeps its language model's settings inside.
    if isinstance(settings, dict) and isinstance(settings.get("text_config"), dict):
        settings = {key: settings[key] for key in ("quantization_config",) if key in settings} | settings[
            "text_config"
        ]
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise BlockError(f"{where} has no model_type; give a Hugging Face checkpoint")
    if settings.get("quantization_config"):
        raise BlockError(
            f"{where} describes a quantised checkpoint; give the unquantised one, or a GGUF file"
        )
    return settings


def check_tokens(token_ids: Sequence[int], num_tokens: int, name: str) -> None:
    """Refuse tokens that the embedding does not have."""
    for token in token_ids:
        if not 0 <= token < num_tokens:
            raise BlockError(
                f"token {token} is not among the {num_tokens} of {name}; the tokenizer and the weights do not belong together"
            )


def _parse(content: bytes, where: str, advice: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BlockError(
            f"{where} is not readable JSON ({' '.join(str(error).split())[:80]}); {advice}"
        ) from None


def _read_index(content: bytes, where: str, advice: str) -> tuple[dict[str, str], int | None]:
    index = _parse(content, where, advice)
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(homes, dict) or not homes or not all(isinstance(home, str) for home in homes.values()):
        raise BlockError(f"{where} is damaged; {advice}")
    for file in set(homes.values()):
        if not _WEIGHTS_NAME.fullmatch(file):
            raise BlockError(f"{where} names the file {file!r:.80} outside its folder; {advice}")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    # JSON in Python knows infinity.
    return homes, int(total) if isinstance(total, int | float) and 0 <= total < 1 << 62 else None


def _index_of(homes: dict[str, str], total_bytes: int | None) -> _Index:
    tensors = {name: _Stored(stored, homes[stored]) for name, stored in transformers_names(homes).items()}
    return _Index(tensors, is_meta(homes), total_bytes)
