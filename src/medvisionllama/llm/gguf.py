"""`GgufSource`: a GGUF file as a source, dequantised by the `gguf` package.

Only the bytes of the tensors asked for are read. What llama.cpp stores differently from transformers is undone:
queries and keys of Llama in pairs, Gemma's norms with one added.
"""

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medvisionllama.errors import BlockError
from medvisionllama.llm.families import Family
from medvisionllama.llm.gguf_file import GgufTensor, read_directory
from medvisionllama.llm.gguf_settings import ARCHITECTURES, gguf_settings
from medvisionllama.llm.names import in_pairs, undo_pairs
from medvisionllama.llm.ranges import LocalFile, damaged, read_bytes
from medvisionllama.llm.reader import check_tokens
from medvisionllama.llm.sources import LayerTensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class GgufSource:
    """A GGUF file; its directory is read at once, tensors when asked for."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.path = path
        self._file = LocalFile(path)
        self._metadata, self._tensors = read_directory(self._file)
        if (parts := self._metadata.get("split.count", 0)) not in (0, 1):
            raise BlockError(
                f"{path} is one of {parts} files of a model; join them with llama-gguf-split --merge, and give the whole"
            )
        self._architecture = self._metadata.get("general.architecture")
        if not isinstance(self._architecture, str) or self._architecture not in ARCHITECTURES:
            raise BlockError(
                f"{path} holds a {str(self._architecture)[:40]!r} model; GGUF reading supports: {', '.join(ARCHITECTURES)}"
            )
        if self._metadata.get(f"{self._architecture}.expert_count"):
            raise BlockError(f"{path} describes a mixture of experts; dense models are supported")
        self._check_ends()
        factors: dict[str, list[float]] = {
            str(name): self._dequantised(name).tolist()
            for name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
            if name in self._tensors
        }
        self.settings: dict[str, Any] = gguf_settings(self._metadata, factors, where=str(path))
        embedding = self._tensors.get("token_embd.weight")
        if embedding:
            self.settings.setdefault("vocab_size", embedding.shape[0])

    def layer_tensors(
        self,
        positions: Sequence[int],
        family: Family,
        *,
        dtype: torch.dtype | None = None,
        wanted: Collection[str] | None = None,
    ) -> LayerTensors:
        """Dequantise some layers and the last norm, to float32 unless `dtype` says otherwise.

        Raises:
            BlockError: a tensor is missing, its quantisation unknown, or a layer has biases and its family none.
        """
        layers = []
        for position in positions:
            names = self._layer_names(family, position)
            self._refuse_other_biases(position, names)
            layers.append(
                {name: self._named(f"model.layers.{position}.{name}", dtype) for name in wanted or names}
            )
        return LayerTensors(tuple(layers), {"weight": self._named("model.norm.weight", dtype)})

    def embedding_rows(self, token_ids: Sequence[int], family: Family) -> Tensor:
        """Dequantise the embeddings of some tokens."""
        tensor = self._tensor("token_embd.weight")
        check_tokens(token_ids, tensor.shape[0], str(self.path))
        return self._dequantised("token_embd.weight", token_ids)

    def tokenizer(self) -> "Tokenizer":
        """Build the tokenizer from the metadata."""
        from medvisionllama.llm.gguf_vocabulary import tokenizer_from_metadata

        return tokenizer_from_metadata(self._metadata, where=str(self.path))

    def checkpoint_bytes(self) -> int | None:
        """Size of the file."""
        return self._file.size

    def layer_bytes(self, positions: Sequence[int], family: Family) -> int:
        """Bytes that some layers and the last norm take in the file; no tensor is read."""
        names = [f"model.layers.{p}.{name}" for p in positions for name in self._layer_names(family, p)]
        return sum(self._span(self._stored_name(name))[2] for name in (*names, "model.norm.weight"))

    @cached_property
    def _names(self) -> Any:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        return get_tensor_name_map(architecture, self.settings["num_hidden_layers"])

    def _layer_names(self, family: Family, position: int) -> list[str]:
        with torch.device("meta"):
            layer = family.make_layer(family.make_config(self.settings), position)
        return [name for name, _ in layer.named_parameters()]

    def _refuse_other_biases(self, position: int, names: Sequence[str]) -> None:
        """Without them the layer would compute something else, in silence: metadata do not tell of them."""
        prefix = f"blk.{position}."
        read = {self._stored_name(f"model.layers.{position}.{name}") for name in names}
        others = sorted(
            name
            for name in self._tensors
            if name.startswith(prefix) and name.endswith(".bias") and name not in read
        )
        if others:
            raise BlockError(
                f"{self.path} holds {others[0]}, which {self._architecture} layers here have not; use the checkpoint in safetensors"
            )

    def _named(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Read a tensor by the name that transformers gives it."""
        tensor = self._dequantised(self._stored_name(name))
        if self._architecture == "llama" and in_pairs(name):
            tensor = undo_pairs(tensor, name=name, settings=self.settings)
        if self._architecture in {"gemma2", "gemma3"} and name.endswith("norm.weight"):
            tensor = tensor - 1
        return tensor.to(dtype or tensor.dtype).contiguous()

    def _stored_name(self, name: str) -> str:
        return self._names.get_name(name, try_suffixes=(".weight", ".bias")) or name

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise BlockError(f"{self.path} lacks the tensor {name}; download it again")
        return self._tensors[name]

    def _span(self, name: str) -> tuple[Any, int, int]:
        """Quantisation of a tensor, bytes of a row, bytes of all."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensor = self._tensor(name)
        try:
            kind = GGMLQuantizationType(tensor.kind)
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise BlockError(
                f"{self.path}: {name} has the unknown quantisation {tensor.kind}; use a file of another quantisation, such as Q8_0"
            ) from None
        if math.prod(tensor.shape) == 0 or not tensor.shape or tensor.shape[-1] % per_block:
            raise damaged(self._file, f"{name} of shape {tensor.shape} does not fill blocks of {per_block}")
        row_bytes = tensor.shape[-1] // per_block * block_bytes
        return kind, row_bytes, math.prod(tensor.shape[:-1]) * row_bytes

    def _check_ends(self) -> None:
        """Refuse a file that was cut off, whichever tensors are asked for."""
        from gguf import GGML_QUANT_SIZES

        for name, tensor in self._tensors.items():
            if tensor.kind in GGML_QUANT_SIZES and tensor.start + self._span(name)[2] > self._file.size:
                raise damaged(self._file, f"{name} goes on beyond byte {self._file.size}")

    def _dequantised(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        from gguf import dequantize

        tensor, (kind, row_bytes, total) = self._tensor(name), self._span(name)
        if rows is None:
            content = read_bytes(self._file, tensor.start, tensor.start + total)
        else:
            starts = [tensor.start + row * row_bytes for row in rows]
            content = b"".join(read_bytes(self._file, start, start + row_bytes) for start in starts)
        lines = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
        try:
            values = dequantize(lines, kind)
        except NotImplementedError:
            raise BlockError(
                f"{self.path}: {name} is quantised as {kind.name}, which cannot be undone; use a file of another quantisation, such as Q8_0"
            ) from None
        shape = tensor.shape if rows is None else (len(rows), tensor.shape[-1])
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
