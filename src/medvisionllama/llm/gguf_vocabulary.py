"""The tokenizer that a GGUF file's metadata describes, built with `tokenizers`.

The file has words and merges; how text is cut up before merging is named only, so the rules are here, copied from
the models' own tokenizer.json.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medvisionllama.errors import BlockError
from medvisionllama.llm.vocabulary import refused_by_tokenizers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_PATTERNS: dict[str, str | None] = {
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    # GPT-2's own pattern is built into `tokenizers`.
    "smollm": None,
    "gpt-2": None,
    "default": None,
}
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, where: str) -> "Tokenizer":
    """Build the tokenizer.

    Raises:
        BlockError: no vocabulary in the file, or one of a kind that is not known here.
    """
    kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(words, list) or not words:
        raise BlockError(f"{where} has no vocabulary; use a source with a tokenizer.json")
    with refused_by_tokenizers(where):
        if kind == "gpt2":
            tokenizer = _byte_level(metadata, words, where)
        elif kind == "llama":
            tokenizer = _sentence_pieces(metadata, words)
        else:
            raise BlockError(f"{where} has a vocabulary of kind {kind!r}; known are gpt2 and llama")
        _add_special(tokenizer, words, metadata.get("tokenizer.ggml.token_type") or [])
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], words: list[str], where: str) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in _PATTERNS:
        raise BlockError(f"{where} cuts text up by the rule {rule!r}; known are {', '.join(_PATTERNS)}")
    pattern = _PATTERNS[rule]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3's tokenizer.json takes what is a word as it is, whether merges lead there or not.
    tokenizer = Tokenizer(BPE(_numbered(words), merges, ignore_merges=pattern == _LLAMA_3))
    steps: list[PreTokenizer] = [ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, Split(Regex(pattern), behavior="isolated"))
    if rule == "smollm":
        steps.insert(0, Digits(individual_digits=True))
    tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.decoder = Decoder()
    return tokenizer


def _sentence_pieces(metadata: Mapping[str, Any], words: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
    from tokenizers.models import BPE
    from tokenizers.normalizers import Normalizer, Prepend
    from tokenizers.normalizers import Replace as Rewrite
    from tokenizers.normalizers import Sequence as Steps

    # Gemma's files spell runs of blanks as blanks, and its scores do not order the merges: its numbers do.
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma:
        words = ["▁" * len(word) if word and not word.strip(" ") else word for word in words]
    numbers = _numbered(words)
    scores = [-float(number) for number in range(len(words))] if gemma else metadata["tokenizer.ggml.scores"]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        BPE(
            numbers,
            _merges(words, numbers, scores),
            unk_token=words[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Normalizer] = [Rewrite(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", not gemma):
        steps.insert(0, Prepend("▁"))
    tokenizer.normalizer = Steps(steps)
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse()])
    return tokenizer


def _merges(words: list[str], numbers: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a word of two others, the best word first: what sentencepiece does at run time."""
    found = []
    for word, score in zip(words, scores, strict=True):
        pairs = [
            (word[:cut], word[cut:])
            for cut in range(1, len(word))
            if word[:cut] in numbers and word[cut:] in numbers
        ]
        pairs.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
        found += [(score, pair) for pair in pairs]
    found.sort(key=lambda item: -item[0])
    return [pair for _, pair in found]


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def _add_special(tokenizer: "Tokenizer", words: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    for word, kind in zip(words, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(word, special=False, normalized=False)])
