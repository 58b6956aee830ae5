"""Tokenizers: from the files of old and new checkpoints, and from GGUF metadata."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer

from medvisionllama.errors import BlockError
from medvisionllama.llm.folder import FolderPlace
from medvisionllama.llm.gguf_vocabulary import _LLAMA_3, _QWEN_2, tokenizer_from_metadata
from medvisionllama.llm.vocabulary import tokenizer_from

TEXTS = (
    "The left ventricle, the right ventricle and the myocardium in cardiac MRI.",
    "  2023 scans at 1.25 mm: it's the patient's  hippocampus!",
    "Größe der Läsion\n\nvorne",
)


def _trained(pre_tokenizer):
    """A byte-level tokenizer of a few words, as a model's tokenizer.json would describe it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


def _metadata(tokenizer, rule, **more):
    content = json.loads(tokenizer.to_str())["model"]
    words = sorted(content["vocab"], key=content["vocab"].get)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if word == "<|end|>" else 1 for word in words],
    } | more


_SPLITS = {
    "default": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("rule", _SPLITS)
def test_a_byte_level_vocabulary_cuts_text_as_the_models_tokenizer(rule):
    expected = _trained(_SPLITS[rule])
    ours = tokenizer_from_metadata(_metadata(expected, rule), where="x.gguf")
    for text in TEXTS:
        assert ours.encode(text).tokens == expected.encode(text).tokens
        assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("heart<|end|>").tokens[-1] == "<|end|>"


@pytest.mark.parametrize(("rule", "tokens"), [("llama-bpe", ["Ġzebra"]), ("qwen2", ["Ġ", *"zebra"])])
def test_llama_3_takes_a_word_of_its_vocabulary_as_it_is(rule, tokens):
    metadata = _metadata(_trained(_SPLITS[rule]), rule)
    metadata["tokenizer.ggml.tokens"].append("Ġzebra")
    ours = tokenizer_from_metadata(metadata, where="x.gguf")
    assert ours.encode(" zebra").tokens == tokens


def test_rules_differ_in_how_they_cut_numbers():
    tokens = {
        rule: tokenizer_from_metadata(_metadata(_trained(split), rule), where="x.gguf")
        .encode("1234567")
        .tokens
        for rule, split in _SPLITS.items()
    }
    assert tokens["smollm"] == tokens["qwen2"] == list("1234567")


def _sentence_pieces():
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"acehlortv",
        "ar",
        "he",
        "art",
        "heart",
        "▁heart",
        "▁v",
        "▁▁",
    ]
    scores = [0.0] * 259 + [-float(number) for number in range(len(words) - 259)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)],
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentence_pieces_are_merged_best_first():
    ours = tokenizer_from_metadata(_sentence_pieces(), where="x.gguf")
    assert ours.encode("heart").tokens == ["▁heart"]
    assert ours.encode("the heart").tokens == ["▁", "t", "he", "▁heart"]
    assert ours.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert ours.decode(ours.encode("the heart é").ids).strip() == "the heart é"


def test_sentence_pieces_equal_those_of_transformers():
    from transformers.convert_slow_tokenizer import generate_merges

    metadata = _sentence_pieces()
    words, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    numbers = {word: number for number, word in enumerate(words)}
    expected = Tokenizer(
        models.BPE(
            numbers,
            generate_merges(numbers, dict(zip(words, scores, strict=True))),
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    expected.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ours = tokenizer_from_metadata(metadata, where="x.gguf")
    for text in ("heart", "the heart  and the valve", "Herz", ""):
        assert ours.encode(text).ids == expected.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "of kind 'rwkv'; known are gpt2 and llama"),
        ({"tokenizer.ggml.tokens": None}, "has no vocabulary"),
        ({"tokenizer.ggml.pre": "klingon"}, "the rule 'klingon'; known are llama-bpe"),
        ({"tokenizer.ggml.merges": ["x y"]}, "x.gguf makes no tokenizer"),
        ({"tokenizer.ggml.merges": ["xy"]}, "x.gguf makes no tokenizer"),
        ({"tokenizer.ggml.merges": 3}, "x.gguf makes no tokenizer"),
    ],
)
def test_metadata_that_describes_no_vocabulary_is_refused(changes, reason):
    metadata = _metadata(_trained(_SPLITS["default"]), "default") | changes
    with pytest.raises(BlockError, match=reason):
        tokenizer_from_metadata(metadata, where="x.gguf")


@pytest.mark.parametrize("lower", [None, True, False])
def test_vocab_txt_is_read_as_transformers_reads_it(tmp_path, lower):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "The",
        "heart",
        "##beat",
        "h",
        "##eart",
        ",",
        "groß",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    if lower is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    theirs = BertTokenizer(
        vocab={word: number for number, word in enumerate(words)}, do_lower_case=lower is not False
    )
    ours = tokenizer_from(FolderPlace(tmp_path))
    for text in ("The heartbeat, the heart", "[MASK] Groß unknown"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert ours.encode("The").tokens == ["[CLS]", "The" if lower is False else "the", "[SEP]"]


def test_vocab_json_and_merges_txt_are_read_as_transformers_reads_them(tmp_path):
    model = json.loads(_trained(_SPLITS["default"]).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    theirs = GPT2Tokenizer(vocab=model["vocab"], merges=merges)
    for text in TEXTS:
        assert tokenizer_from(FolderPlace(tmp_path)).encode(text).ids == theirs(text)["input_ids"]


def test_padding_and_truncation_are_switched_off(tmp_path):
    tokenizer = _trained(_SPLITS["default"])
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert 2 < len(tokenizer_from(FolderPlace(tmp_path)).encode("cardiac lesions").ids) < 20


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, r"has no tokenizer\.json; write one with transformers"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json makes no tokenizer"),
        ({"vocab.txt": "a\nb\n"}, r"vocab\.txt lacks \[CLS\]"),
        ({"vocab.json": "{}", "merges.txt": "a b\n"}, "makes no tokenizer"),
        ({"vocab.json": "{", "merges.txt": "a b\n"}, "makes no tokenizer"),
        ({"vocab.json": "{}", "merges.txt": "", "config.json": '{"model_type": "biogpt"}'}, "Moses' rules"),
        ({"vocab.txt": b"\xff\n"}, r"vocab\.txt makes no tokenizer"),
        ({"vocab.json": "{}", "merges.txt": b"\xff\n"}, "makes no tokenizer"),
    ],
)
def test_files_that_make_no_tokenizer_are_refused(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BlockError, match=reason):
        tokenizer_from(FolderPlace(tmp_path))
