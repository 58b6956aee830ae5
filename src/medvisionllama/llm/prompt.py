"""Class-label guidance: a few words as embedding rows of the language model, to stand before the visual tokens.

The rows are those of the model's embedding matrix, scaled as the model scales them; no positions are added. The
controls ask what about the words matters.
"""

import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from medvisionllama.errors import BlockError
from medvisionllama.llm.controls import moment_matched, stream
from medvisionllama.llm.families import family_of
from medvisionllama.llm.sources import Source, open_source
from medvisionllama.types import PromptControl

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ATTEMPTS = 50
PromptRows = Float[Tensor, "token width"]


def embed_prompt(
    source: str | Path | Source, text: str, *, control: PromptControl = "text", seed: int = 0
) -> PromptRows:
    """Turn words into embedding rows, reading only the rows of their tokens.

    Args:
        source: as for `FrozenBlock.from_pretrained`, or one already open.
        control: `text` as written; `shuffled` the text with its letters in random order, cut or repeated to as many
            tokens: real rows that mean nothing; `random` normal values with the rows' mean and deviation.
        seed: of the control.

    Raises:
        BlockError: nothing to embed or to shuffle, no tokenizer, or embeddings narrower than the layers.

    >>> embed_prompt("smollm2-135m", "left ventricle in cardiac MRI").shape  # doctest: +SKIP
    torch.Size([5, 576])
    """
    if control not in get_args(PromptControl):
        raise BlockError(f"control={control!r} is not known; known: {', '.join(get_args(PromptControl))}")
    opened = open_source(source) if isinstance(source, str | Path) else source
    family = family_of(opened.settings["model_type"])
    config = family.make_config(opened.settings)
    tokenizer = opened.tokenizer()
    ids = _token_ids(tokenizer, text)
    if control == "shuffled":
        ids = _nonsense_ids(tokenizer, text, ids, seed=seed)
    rows = opened.embedding_rows(ids, family)
    if rows.shape[1] != config.hidden_size:
        raise BlockError(
            f"{opened.name}'s embeddings have width {rows.shape[1]}, its layers {config.hidden_size}; it cannot take a prompt"
        )
    if family.scales_embeddings and getattr(config, "scale_embedding", True):
        rows = rows * config.hidden_size**0.5
    if control == "random":
        rows = moment_matched(rows, torch.Generator().manual_seed(stream(seed, text)))
    return rows


def empty_prompt(source: str | Path, text: str) -> PromptRows:
    """Build rows of a prompt's shape on the meta device; nothing is fetched.

    Raises:
        BlockError: nothing to embed, or a tokenizer that is not here.
    """
    opened = open_source(source, offline=True)
    config = family_of(opened.settings["model_type"]).make_config(opened.settings)
    return torch.empty(len(_token_ids(opened.tokenizer(), text)), config.hidden_size, device="meta")


def _token_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text.strip(), add_special_tokens=False).ids
    if not ids:
        raise BlockError(f"the prompt {text!r} has no token; write words, or leave the prompt empty")
    return ids


def _nonsense_ids(tokenizer: "Tokenizer", text: str, ids: list[int], *, seed: int) -> list[int]:
    """As many tokens of the text's letters in random order, and not the text's own."""
    for attempt in range(_ATTEMPTS):
        nonsense = tokenizer.encode(
            shuffled(text.strip(), seed=seed, attempt=attempt), add_special_tokens=False
        ).ids
        found = [nonsense[place % len(nonsense)] for place in range(len(ids))]
        if found != ids:
            return found
    raise BlockError(
        f"the letters of {text!r} in another order are the same tokens; write more words, or take prompt_control=random"
    )


def shuffled(text: str, *, seed: int, attempt: int = 0) -> str:
    """Put a text's letters into random order; blanks stay where they are.

    >>> sorted(shuffled("left atrium", seed=0)) == sorted("left atrium")
    True
    """
    letters = [letter for letter in text if not letter.isspace()]
    drawn_by = f"{seed}/{text}/{attempt}" if attempt else f"{seed}/{text}"
    random.Random(hashlib.sha256(drawn_by.encode()).digest()).shuffle(letters)
    rest = iter(letters)
    return "".join(letter if letter.isspace() else next(rest) for letter in text)
