"""GGUF files, against transformers' own reading of the same files."""

import math

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

from medvisionllama.errors import BlockError
from medvisionllama.llm import FrozenBlock
from medvisionllama.llm.families import family_of
from medvisionllama.llm.gguf import GgufSource
from medvisionllama.llm.names import llama3_scaling
from medvisionllama.llm.sources import open_source
from tiny_gguf import write_gguf
from tiny_models import save_tiny_model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture
def written(tmp_path):
    """`written(architecture, kind)`: the file, and the model it was made from."""

    def write(architecture, kind="F32", **metadata):
        # Blocks of 32 values: widths are multiples of it, so that no kind is too wide for a row.
        model = save_tiny_model(tmp_path / architecture, architecture)
        path = tmp_path / f"{architecture}-{kind}.gguf"
        write_gguf(path, model, architecture, kind=kind, **metadata)
        return path, model

    return write


def _assert_layers_equal(ours, theirs, **tolerance):
    for position, layer in enumerate(ours.layers):
        expected = theirs.model.layers[position].state_dict()
        assert set(layer) == set(expected)
        for name, tensor in layer.items():
            torch.testing.assert_close(tensor, expected[name].float(), msg=f"{position} {name}", **tolerance)
    torch.testing.assert_close(ours.norm["weight"], theirs.model.norm.weight.float(), **tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float_file_gives_back_the_model_it_was_made_from(written, architecture):
    path, model = written(architecture)
    source = GgufSource(path)
    ours = source.layer_tensors((0, 1, 2), family_of(source.settings["model_type"]))
    # Adding and subtracting one costs Gemma's norms a bit.
    _assert_layers_equal(ours, model, rtol=0, atol=2e-7 if architecture.startswith("gemma") else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_every_quantisation_is_undone_as_transformers_undoes_it(written, architecture, kind):
    path, _ = written(architecture, kind)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    source = GgufSource(path)
    family = family_of(source.settings["model_type"])
    _assert_layers_equal(source.layer_tensors((0, 1, 2), family), theirs, rtol=0, atol=2e-7)
    rows = source.embedding_rows([63, 0, 5], family)
    torch.testing.assert_close(rows, theirs.model.embed_tokens.weight[[63, 0, 5]], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_settings_are_those_of_the_model(written, architecture):
    path, model = written(architecture, rope__freq_base=100.0)
    settings, config = GgufSource(path).settings, model.config
    for name in (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ):
        assert settings[name] == getattr(config, name), name
    assert settings["rms_norm_eps"] == pytest.approx(config.rms_norm_eps)
    assert settings["rope_theta"] == 100.0
    assert settings["head_dim"] == (getattr(config, "head_dim", None) or 8)


def test_softcaps_and_windows_are_read(written):
    path, _ = written(
        "gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=7.0, attention__sliding_window=8
    )
    settings = GgufSource(path).settings
    assert (settings["attn_logit_softcapping"], settings["final_logit_softcapping"]) == (5.0, 7.0)
    assert settings["sliding_window"] == 8
    assert settings["query_pre_attn_scalar"] == settings["head_dim"] == 16


def test_a_window_of_zero_is_none(written):
    path, _ = written("phi3", attention__sliding_window=0)
    assert "sliding_window" not in GgufSource(path).settings
    assert len(FrozenBlock.from_pretrained(path, causal=True).layers) == 1


def test_experts_are_refused(written):
    path, _ = written("llama", expert_count=8)
    with pytest.raises(BlockError, match="mixture of experts"):
        GgufSource(path)


@pytest.mark.parametrize("architecture", ["", "llama"], ids=["a later part", "the first part"])
def test_a_part_of_a_model_is_refused(tmp_path, architecture):
    writer = GGUFWriter(tmp_path / "x-00001-of-00002.gguf", architecture)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BlockError, match="is one of 2 files of a model; join them"):
        GgufSource(tmp_path / "x-00001-of-00002.gguf")


def test_a_block_from_gguf_equals_the_block_from_safetensors(written):
    path, _ = written("qwen3")
    for rotary in (False, True):
        ours = FrozenBlock.from_pretrained(path, layers=(0, 2), rotary=rotary)
        assert ours.name == "qwen3-F32.gguf:0,2:pretrained"
        assert ours.sha256() == FrozenBlock.from_pretrained(path.parent / "qwen3", layers=(0, 2)).sha256()


def test_biases_that_the_metadata_do_not_tell_of_are_not_passed_over(tmp_path):
    path = tmp_path / "llama.gguf"
    # With biases of attention and MLP.
    model = save_tiny_model(tmp_path / "llama31", "llama31", rope_scaling=None)
    write_gguf(path, model, "llama", rope__freq_base=100.0)
    with pytest.raises(BlockError, match=r"holds blk\.0\..*bias"):
        FrozenBlock.from_pretrained(path, layers=(0,))


def test_only_the_tensors_asked_for_are_read(written, monkeypatch):
    from medvisionllama.llm import gguf

    path, _ = written("llama", "Q8_0")
    source, read, counted = GgufSource(path), gguf.read_bytes, []

    def counting(file, start, end):
        counted.append(end - start)
        return read(file, start, end)

    monkeypatch.setattr(gguf, "read_bytes", counting)
    family = family_of("llama")
    source.layer_tensors((1,), family)
    assert sum(counted) == source.layer_bytes((1,), family)
    counted.clear()
    source.embedding_rows([3, 4], family)
    assert counted == [34, 34]


def test_llama_3_scaling_is_recognised_by_its_factors(tmp_path):
    path = tmp_path / "llama.gguf"
    model = save_tiny_model(tmp_path / "llama", "llama", head_dim=32)
    write_gguf(path, model, "llama", rope__freq_base=500_000.0)
    factors = _factors(8.0)
    assert min(factors) == 1.0
    assert max(factors) == 8.0
    assert any(1 < factor < 8 for factor in factors)
    _add_tensor(path, "rope_freqs.weight", factors)
    assert GgufSource(path).settings["rope_scaling"] == llama3_scaling(8.0)
    _add_tensor(path, "rope_freqs.weight", [*factors[:-1], 9.0])
    with pytest.raises(BlockError, match="scales rotary positions in an unknown way"):
        GgufSource(path)


def _factors(factor):
    """From transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 131_072,
    }
    frequencies = [
        LlamaRotaryEmbedding(LlamaConfig(**plain, **more)).inv_freq
        for more in ({}, {"rope_scaling": llama3_scaling(factor)})
    ]
    return [round(ratio, 6) for ratio in (frequencies[0] / frequencies[1]).tolist()]


def _add_tensor(path, name, values):
    """Write a file anew with one more tensor."""
    import numpy as np
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    tensors[name] = np.array(values, np.float32)
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    writer = GGUFWriter(path, "llama")
    for key, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for key, value in tensors.items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _empty(path, architecture, **values):
    writer = GGUFWriter(path, architecture)
    for name, value in values.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"{architecture}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_architecture_that_is_not_known_is_named_with_those_that_are(tmp_path):
    _empty(tmp_path / "x.gguf", "mamba")
    with pytest.raises(BlockError, match="'mamba' model; GGUF reading supports: llama, qwen2"):
        open_source(tmp_path / "x.gguf")


def test_metadata_that_is_missing_is_named(tmp_path):
    _empty(tmp_path / "x.gguf", "llama", embedding_length=32)
    with pytest.raises(BlockError, match=r"lacks llama\.feed_forward_length"):
        open_source(tmp_path / "x.gguf")


def test_metadata_that_differs_between_layers_is_refused(tmp_path):
    _empty(tmp_path / "x.gguf", "llama", embedding_length=32, feed_forward_length=[64, 32])
    with pytest.raises(BlockError, match=r"llama\.feed_forward_length is .* not one number"):
        open_source(tmp_path / "x.gguf")


@pytest.mark.parametrize("number", [999, 31])
def test_a_quantisation_that_is_not_known_is_refused(written, number):
    path, _ = written("llama", "Q8_0")
    content = bytearray(path.read_bytes())
    name = b"blk.2.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    assert int.from_bytes(content[place : place + 4], "little") == 8
    content[place : place + 4] = number.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(
        BlockError, match=r"blk\.2\.attn_q\.weight .*quantis.*use a file of another quantisation"
    ):
        FrozenBlock.from_pretrained(path)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.05, 0.2, 0.9, 0.999])
def test_a_file_that_ends_early_is_refused(written, share):
    path, _ = written("llama")
    content = path.read_bytes()
    path.write_bytes(content[: math.floor(share * len(content))])
    with pytest.raises(BlockError, match="damaged or truncated") as refused:
        FrozenBlock.from_pretrained(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("place", [4, 8, 16, 24])
def test_lengths_that_cannot_be_are_refused_at_once(written, place):
    path, _ = written("llama")
    content = bytearray(path.read_bytes())
    content[place : place + 8] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(BlockError, match="damaged or truncated"):
        open_source(path)


def test_a_list_of_impossible_length_is_refused_at_once(tmp_path):
    path = tmp_path / "x.gguf"
    key = b"tokenizer.ggml.tokens"
    for inner in (8, 4):
        path.write_bytes(
            b"GGUF"
            + (3).to_bytes(4, "little")
            + (0).to_bytes(8, "little")
            + (1).to_bytes(8, "little")
            + len(key).to_bytes(8, "little")
            + key
            + (9).to_bytes(4, "little")
            + inner.to_bytes(4, "little")
            + (1 << 60).to_bytes(8, "little")
        )
        with pytest.raises(BlockError, match="damaged or truncated"):
            open_source(path)
