"""Blocks from folders and files: every layout gives the same block, and reads no more than it."""

import json
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvisionllama.errors import BlockError
from medvisionllama.llm import FrozenBlock
from medvisionllama.llm import ranges as ranges_module
from medvisionllama.llm.families import family_of
from medvisionllama.llm.names import llama3_scaling, meta_settings
from medvisionllama.llm.sources import open_source
from tiny_llama import SETTINGS, save_tiny_llama
from tiny_models import save_tiny_model

LLAMA = family_of("llama")
LAYERS = (0, -1)


@pytest.fixture
def folder(tmp_path):
    save_tiny_llama(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def expected(folder):
    return FrozenBlock.from_pretrained(folder, layers=LAYERS).sha256()


def _block(source):
    return FrozenBlock.from_pretrained(source, layers=LAYERS).sha256()


def _state(folder):
    return load_file(folder / "model.safetensors")


def _only(folder, *files):
    """Leave these files alone in the folder."""
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()


# One model in many layouts.


def test_a_single_file_with_its_configuration_beside_it(folder, expected):
    assert _block(folder / "model.safetensors") == expected
    assert FrozenBlock.from_pretrained(folder / "model.safetensors").name == "model.safetensors:2:pretrained"


def test_shards_with_an_index(tmp_path, folder, expected):
    save_tiny_llama(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert _block(tmp_path / "shards") == expected


def test_shards_without_an_index(tmp_path, folder, expected):
    save_tiny_llama(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    assert _block(tmp_path / "shards") == expected


def test_names_without_the_models_own_prefix(folder, expected):
    state = {name.removeprefix("model."): value for name, value in _state(folder).items()}
    save_file(state, folder / "model.safetensors")
    assert _block(folder) == expected


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_of_tensors(folder, expected, archive):
    torch.save(_state(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    (folder / "model.safetensors").unlink()
    assert _block(folder) == _block(folder / "pytorch_model.bin") == expected


def test_pickles_with_an_index(folder, expected):
    state = _state(folder)
    halves = [dict(list(state.items())[:10]), dict(list(state.items())[10:])]
    homes = {}
    for number, half in enumerate(halves, 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(half, folder / name)
        homes |= dict.fromkeys(half, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    (folder / "model.safetensors").unlink()
    assert _block(folder) == expected


def test_safetensors_go_before_pickles(folder, expected):
    (folder / "pytorch_model.bin").write_bytes(b"nonsense")
    assert _block(folder) == expected


_META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def _as_meta(state):
    """Meta's names and row order, as transformers' convert_llama_weights_to_hf.py undoes them."""
    result = {}
    for name, value in state.items():
        meta = name.removeprefix("model.")
        for theirs, ours in _META.items():
            meta = meta.replace(theirs, ours)
        heads = {"wq": 4, "wk": 2}.get(meta.split(".")[-2])
        if heads:
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        result[meta] = value.contiguous()
    return result


_PARAMS = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.5,
    "vocab_size": 64,
}


@pytest.mark.parametrize("settings", ["config.json", "params.json"])
@pytest.mark.parametrize("weights", ["consolidated.00.pth", "consolidated.safetensors"])
def test_metas_own_files(folder, expected, settings, weights):
    state = _as_meta(_state(folder))
    assert not torch.equal(
        state["layers.0.attention.wq.weight"], _state(folder)["model.layers.0.self_attn.q_proj.weight"]
    )
    if settings == "params.json":
        (folder / settings).write_text(json.dumps(_PARAMS))
    torch.save(state, folder / weights) if weights.endswith(".pth") else save_file(state, folder / weights)
    rows = open_source(folder).embedding_rows([3, 1], LLAMA)
    _only(folder, settings, weights)
    assert _block(folder) == expected
    assert torch.equal(open_source(folder).embedding_rows([3, 1], LLAMA), rows)


def test_metas_files_cut_into_parts_are_refused(folder):
    (folder / "model.safetensors").unlink()
    for number in range(2):
        torch.save({}, folder / f"consolidated.{number:02d}.pth")
    with pytest.raises(BlockError, match=r"cut into 2 parts.*Hugging Face's format"):
        _block(folder)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("place", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("name", ["gemma3", "llama", "mistral"])
def test_a_model_for_images_and_text_lends_its_language_model(tmp_path, name, place, wrapped):
    folder = tmp_path / name
    save_tiny_model(folder, name)
    before = _block(folder)
    state = {key.replace("model.", place, 1): value for key, value in _state(folder).items()}
    save_file(state, folder / "model.safetensors")
    if wrapped:
        path = folder / "config.json"
        path.write_text(json.dumps({"model_type": "llava", "text_config": json.loads(path.read_text())}))
    assert _block(folder) == before


def test_norms_of_old_bert_checkpoints_are_renamed(tmp_path):
    save_tiny_model(tmp_path / "bert", "bert")
    before, state = _block(tmp_path / "bert"), _state(tmp_path / "bert")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "bert" / "model.safetensors")
    assert _block(tmp_path / "bert") == before


def test_masks_of_old_checkpoints_are_left_out(tmp_path):
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    before, state = _block(tmp_path / "gpt2"), _state(tmp_path / "gpt2")
    for layer in range(3):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
    save_file(state, tmp_path / "gpt2" / "model.safetensors")
    assert _block(tmp_path / "gpt2") == before
    family = family_of("gpt2")
    held = open_source(tmp_path / "gpt2").layer_tensors((0,), family).layers[0]
    assert "attn.bias" not in held
    held = open_source(tmp_path / "gpt2").layer_tensors((0,), family, wanted={"ln_1.weight"}).layers[0]
    assert set(held) == {"ln_1.weight"}


# What is read.


@pytest.fixture
def reads(monkeypatch):
    """Bytes that were read from files, in a list."""
    counted, read_into = [], ranges_module.LocalFile.read_into

    def counting(self, buffer, start):
        counted.append(len(buffer))
        read_into(self, buffer, start)

    monkeypatch.setattr(ranges_module.LocalFile, "read_into", counting)
    return counted


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_only_the_block_and_the_directory_are_read(tmp_path, reads, name):
    state = save_tiny_llama(
        tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=6
    ).state_dict()
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    size = (tmp_path / name).stat().st_size
    block = FrozenBlock.from_pretrained(tmp_path, layers=(2,))
    needed = sum(tensor.nbytes for tensor in block.frozen_tensors().values())
    # The pickle's directory is read in pieces of a quarter of a megabyte.
    assert needed < sum(reads) < 1.05 * needed + (600_000 if name.endswith(".bin") else 10_000) < size / 2


def test_masks_of_old_checkpoints_are_not_read(tmp_path, reads):
    """As the Hub's gpt2 has them, in float32: a seventh of its layer."""
    save_tiny_model(tmp_path, "gpt2")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 512, 512) for layer in range(3)}
    save_file(_state(tmp_path) | masks, tmp_path / "model.safetensors")
    block = FrozenBlock.from_pretrained(tmp_path)
    assert sum(reads) < 1.05 * sum(tensor.nbytes for tensor in block.frozen_tensors().values()) + 10_000


def test_only_the_rows_asked_for_are_read(folder, reads):
    source = open_source(folder)
    rows = source.embedding_rows([5, 63, 5], LLAMA)
    assert torch.equal(rows, _state(folder)["model.embed_tokens.weight"][[5, 63, 5]])
    assert sum(reads[-3:]) == rows.nbytes
    assert sum(reads) < rows.nbytes + 6000


def test_each_tensor_is_converted_before_the_next_is_read(folder, monkeypatch):
    from medvisionllama.llm import reader

    read, unconverted = reader.read_tensor, []

    def watched(source, entry):
        unconverted[:] = [gone for gone in unconverted if gone() is not None]
        assert not unconverted
        tensor = read(source, entry)
        unconverted.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(reader, "read_tensor", watched)
    tensors = open_source(folder).layer_tensors((0, 1), LLAMA, dtype=torch.bfloat16)
    assert {tensor.dtype for layer in tensors.layers for tensor in layer.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors.norm.values()} == {torch.bfloat16}


def test_sizes_are_known_without_reading_tensors(folder, reads):
    source = open_source(folder)
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 3 * 32)
    assert source.layer_bytes((1,), LLAMA) == block
    assert source.checkpoint_bytes() == (folder / "model.safetensors").stat().st_size
    assert sum(reads) < 10_000


# What is refused.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-model", "not in the catalogue; known: smollm2-135m"),
        ("./org/name", "is no file or folder here"),
        ("a/b/c", "is no file or folder here"),
        ("../name", "is no file or folder here"),
        ("org/../name", "is no file or folder here"),
        ("org/name@../../x", "is no file or folder here"),
        ("/no/such/folder", "is no file or folder here"),
        ("", "is no file or folder here|holds no|no config"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BlockError, match=reason):
        open_source(name)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "scan.nii").write_bytes(b"")
    with pytest.raises(
        BlockError, match=r"is not a checkpoint; give a folder, or a file that ends in \.gguf"
    ):
        open_source(tmp_path / "scan.nii")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BlockError, match=r"holds no weights: neither \.safetensors nor pytorch_model\.bin"):
        _block(folder)


def test_a_quantised_checkpoint_is_refused(folder):
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(BlockError, match="quantised checkpoint; give the unquantised one, or a GGUF file"):
        _block(folder)


def test_numbers_that_are_no_weights_are_not_taken_for_them(folder):
    state = _state(folder)
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones(64, 32, dtype=torch.int8)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BlockError, match=r"int8 numbers; give the unquantised checkpoint"):
        _block(folder)
    assert "mlp.up_proj.weight" not in open_source(folder).layer_tensors((0,), LLAMA).layers[0]


@pytest.mark.parametrize("token", [-1, 64])
def test_a_token_beyond_the_embedding_is_refused(folder, token):
    with pytest.raises(BlockError, match=f"token {token} is not among the 64"):
        open_source(folder).embedding_rows([0, token], LLAMA)


def test_a_checkpoint_without_embedding_is_refused(folder):
    state = {name: value for name, value in _state(folder).items() if "embed" not in name}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BlockError, match=r"holds no model\.embed_tokens\.weight"):
        open_source(folder).embedding_rows([0], LLAMA)


# Meta's params.json.


def test_params_of_the_published_llamas_give_their_published_sizes():
    common = {
        "n_layers": 1,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "vocab_size": 128256,
    }
    small = meta_settings(
        common | {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32, "n_kv_heads": 8},
        where="x",
    )
    large = meta_settings(
        common
        | {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8},
        where="x",
    )
    assert (small["intermediate_size"], small["head_dim"]) == (8192, 64)
    assert (large["intermediate_size"], large["head_dim"]) == (14336, 128)
    assert (small["rope_scaling"], large["rope_scaling"]) == (llama3_scaling(32.0), llama3_scaling(8.0))
    assert small["vocab_size"] == 128256
    second = meta_settings(
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1},
        where="x",
    )
    assert (second["intermediate_size"], second["num_key_value_heads"], second["rope_theta"]) == (
        11008,
        32,
        10_000.0,
    )
    assert "rope_scaling" not in second
    assert "vocab_size" not in second
    mistral = meta_settings(
        {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8},
        where="x",
    )
    assert (mistral["intermediate_size"], mistral["head_dim"]) == (14336, 128)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"dim": 32}, "is not Meta's params.json"),
        ({"dim": "x", "n_heads": 4}, "is not Meta's params.json"),
        (_PARAMS | {"n_heads": 0}, "is not Meta's params.json"),
        (_PARAMS | {"moe": {"num_experts": 8}}, "mixture of experts"),
    ],
)
def test_params_that_make_no_sense_are_refused(params, reason):
    with pytest.raises(BlockError, match=reason):
        meta_settings(params, where="params.json")


def test_rows_that_the_heads_cannot_share_are_refused(folder):
    save_file(_as_meta(_state(folder)), folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 3}))
    with pytest.raises(BlockError, match=r"32 rows, which 3 heads cannot share"):
        open_source(folder).layer_tensors((0,), LLAMA)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, medvisionllama.llm; print(sorted({'requests', 'gguf', 'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_settings_are_those_of_the_folder(folder):
    settings = open_source(folder).settings
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
