"""The tokenizer that belongs to a checkpoint, from the files beside its weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medvisionllama.errors import BlockError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from medvisionllama.llm.sources import SmallFiles


def tokenizer_from(place: "SmallFiles") -> "Tokenizer":
    """Build the tokenizer, without padding or truncation.

    tokenizer.json is enough; of older checkpoints, BERT's vocab.txt and GPT-2's vocab.json with merges.txt.

    Raises:
        BlockError: none of these files is there, or it cannot be used.
    """
    content = place.content("tokenizer.json")
    if content is not None:
        return parse_tokenizer(content, f"{place.name}/tokenizer.json")
    words = place.content("vocab.txt")
    if words is not None:
        return _word_pieces(place, words)
    pairs, merges = place.content("vocab.json"), place.content("merges.txt")
    if pairs is not None and merges is not None:
        if _is_moses(place):
            raise BlockError(
                f"{place.name} splits words by Moses' rules (BioGPT), which are not supported; leave the prompt empty, or use another model"
            )
        return _byte_level(place, pairs, merges)
    raise BlockError(
        f"{place.name} has no tokenizer.json; write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def parse_tokenizer(content: bytes, where: str) -> "Tokenizer":
    """Read a tokenizer.json.

    Raises:
        BlockError: it is none.
    """
    from tokenizers import Tokenizer

    with refused_by_tokenizers(where):
        tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextmanager
def refused_by_tokenizers(where: str) -> Iterator[None]:
    """Turn what `tokenizers` raises for content that makes no sense into one line."""
    try:
        yield
    except (BlockError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of its Rust code is no Exception
        raise BlockError(
            f"{where} makes no tokenizer ({' '.join(str(error).split())[:80]}); download it again"
        ) from None


def _word_pieces(place: "SmallFiles", words: bytes) -> "Tokenizer":
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as Decoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    with refused_by_tokenizers(f"{place.name}/vocab.txt"):
        vocabulary = {word: number for number, word in enumerate(words.decode().splitlines())}
    if not {"[CLS]", "[SEP]", "[UNK]"} <= set(vocabulary):
        raise BlockError(f"{place.name}/vocab.txt lacks [CLS], [SEP] or [UNK]; download it again")
    # As transformers' BertTokenizer: lower case unless tokenizer_config.json says otherwise.
    lower = bool(_settings(place).get("do_lower_case", True))
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = Decoder()
    tokenizer.add_special_tokens(
        [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word in vocabulary]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _byte_level(place: "SmallFiles", pairs: bytes, merges: bytes) -> "Tokenizer":
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    where = f"{place.name}/vocab.json with merges.txt"
    with refused_by_tokenizers(where):
        lines = [line for line in merges.decode().splitlines() if line and not line.startswith("#version")]
        tokenizer = Tokenizer(BPE(json.loads(pairs), [tuple(line.split(" ")) for line in lines]))  # type: ignore[misc]
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    return tokenizer


def _is_moses(place: "SmallFiles") -> bool:
    """BioGPT's words are split by Moses' rules, which `tokenizers` does not have."""
    config = place.content("config.json") or b"{}"
    return b'"biogpt"' in config


def _settings(place: "SmallFiles") -> dict[str, Any]:
    content = place.content("tokenizer_config.json")
    try:
        settings = json.loads(content or b"{}")
    except ValueError:
        settings = {}
    return settings if isinstance(settings, dict) else {}
