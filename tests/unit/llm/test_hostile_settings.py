"""Settings that make no model, from wherever: one line, and nothing of an impossible size is built."""

import json

import pytest

from medvisionllama.errors import BlockError
from medvisionllama.llm import FrozenBlock
from medvisionllama.llm.cache import BlockCache
from medvisionllama.llm.describe import show
from medvisionllama.llm.gguf_settings import gguf_settings
from medvisionllama.llm.sources import open_source
from medvisionllama.llm.vocabulary import parse_tokenizer
from tiny_models import save_tiny_model

GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 64,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "bert", "gpt2", "opt", "qwen2"):
        save_tiny_model(folder / name, name)
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "x", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}),
        ("llama", {"hidden_act": "foo"}),
        ("llama", {"hidden_size": 10**19}),
        ("llama", {"hidden_size": True}),
        ("llama", {"intermediate_size": -1}),
        ("llama", {"num_key_value_heads": 0}),
        ("llama", {"head_dim": 10**400}),
        ("llama", {"head_dim": 0}),
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"num_hidden_layers": "3"}),
        ("qwen2", {"num_hidden_layers": 10**8, "layer_types": None}),
        ("bert", {"num_attention_heads": 7}),
        ("gpt2", {"n_head": -1}),
        ("gpt2", {"n_layer": 10**8}),
        ("opt", {"dropout": 7}),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(models, tmp_path, name, changes):
    settings = json.loads((models / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes((models / name / "model.safetensors").read_bytes())
    for weights in ("pretrained", "random"):
        with pytest.raises(BlockError) as refused:
            FrozenBlock.from_pretrained(tmp_path, weights=weights)
        assert "\n" not in str(refused.value)


def test_a_classifiers_labels_are_of_no_interest(models, tmp_path):
    settings = json.loads((models / "llama" / "config.json").read_text()) | {"num_labels": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert FrozenBlock.from_pretrained(tmp_path, weights="random").width == 32


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"llama.embedding_length": float("inf")}, {}),
        ({"llama.block_count": 10**7}, {}),
        ({"llama.attention.head_count_kv": 0}, {}),
        ({"llama.attention.key_length": -1}, {}),
        ({"llama.attention.head_count": 64}, {}),
        ({}, {"rope_freqs.weight": [0.0] * 4}),
        ({}, {"rope_freqs.weight": [[1.0], [2.0]]}),
        ({"llama.rope.freq_base": -5.0}, {"rope_freqs.weight": [1.0] * 4}),
        ({}, {"rope_factors_long.weight": [1.0] * 4}),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": "x"}, {}),
    ],
)
def test_gguf_metadata_that_make_no_model_are_refused(changes, factors):
    assert gguf_settings(GGUF, {}, where="tiny.gguf")["hidden_size"] == 32
    with pytest.raises(BlockError, match=r"tiny\.gguf"):
        gguf_settings(GGUF | changes, factors, where="tiny.gguf")


def test_a_panic_of_the_tokenizers_package_is_one_line():
    model = {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1, "ab": 2}}
    content = json.dumps({"version": "1.0", "added_tokens": [], "model": {**model, "merges": ["a b"]}})
    with pytest.raises(BlockError, match="makes no tokenizer"):
        parse_tokenizer(content.encode(), "tokenizer.json")


@pytest.mark.parametrize("name", ["a--b/c", "a/b--c", "a/b.git", f"a/{'b' * 200}", "~nosuch/x"])
def test_names_that_are_none_are_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BlockError):
        open_source(name)


@pytest.mark.parametrize("dtype", ["save", "nn", "Tensor"])
def test_a_dtype_that_is_none_is_not_looked_up_in_torch(models, tmp_path, dtype):
    settings = json.loads((models / "llama" / "config.json").read_text()) | {"dtype": dtype}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert show(tmp_path)["parameters"] > 0


def test_strange_files_in_the_cache_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    cache = BlockCache("x")
    cache.folder.mkdir(parents=True)
    for name in ("layer-x.safetensors", "layer-007.safetensors"):
        (cache.folder / name).touch()
    (cache.folder / "manifest.json").write_text('{"sha256": []}')
    assert cache.layers() == (7,)
    assert cache.noted("sha256", {}) == {}
    (cache.folder / "manifest.json").write_text("[" * 100_000)
    assert cache.noted("sha256", {}) == {}
