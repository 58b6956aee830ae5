"""Parameters and operations against counts by hand, and against networks that exist."""

import json
import socket
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode

from medvisionllama.config import PRESETS, BlockConfig, NetworkConfig, load_config
from medvisionllama.errors import BlockError, ConfigError
from medvisionllama.llm import CATALOG, attention
from medvisionllama.networks import vit
from medvisionllama.networks.factory import build_meta_network, build_network, network_sizes
from medvisionllama.networks.sizes import sizes_of
from tiny_models import SETTINGS

STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
SHAPES = {"num_channels": 1, "num_outputs": 2, "crop_size": (8, 8, 8), "strides": STRIDES}
W, HIDDEN, PATCH, N = 8, 32, 4, 8
PLAIN = {"head": "linear", "patch_size": PATCH, "width": W, "num_heads": 2, "depth": 1, "insert_after": 0}


def plain(**changes):
    return NetworkConfig(**PLAIN | {"insert": "none"} | changes)


@pytest.fixture
def folder(tmp_path):
    """Write a model's config.json, and nothing else."""

    def write(name="llama", **changes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SETTINGS[name] | changes))
        return tmp_path / name

    return write


def _with_block(folder, *, network=None, **settings):
    block = BlockConfig(source=str(folder), weights="random", **settings)
    return plain(insert="llm", block=block, **(network or {}))


def _counted(network):
    """Trainable and frozen parameters of a network that exists."""
    counts = {True: 0, False: 0}
    for parameter in network.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]


# By hand


def test_a_plain_transformer_has_the_parameters_and_operations_counted_by_hand():
    sizes = network_sizes(plain(), **SHAPES)
    embed, head = W * PATCH**3, W * 2 * PATCH**3
    attention, mlp, norms = (3 * W * W + 3 * W) + (W * W + W), 2 * W * HIDDEN + HIDDEN + W, 2 * 2 * W
    assert sizes.tokens == N
    assert sizes.trainable == (embed + W) + N * W + attention + mlp + norms + (head + 2)
    assert (sizes.frozen, sizes.total) == (0, sizes.trainable)
    products = embed + 4 * W * W + 2 * W * HIDDEN + head
    assert sizes.flops_forward == 2 * N * products + 4 * N * N * W
    assert sizes.gflops == sizes.flops_forward / 1e9


def test_attention_grows_with_the_square_of_the_tokens():
    once = network_sizes(plain(depth=3), **SHAPES).flops_forward
    twice = network_sizes(plain(depth=3), **SHAPES | {"crop_size": (16, 8, 8)}).flops_forward
    assert twice - 2 * once == 3 * 4 * W * ((2 * N) ** 2 - 2 * N**2)


@pytest.mark.parametrize("gate", ["none", "zero"])
def test_the_mlp_insert_costs_its_two_matrices_its_norm_and_its_gate(gate):
    without = network_sizes(plain(), **SHAPES)
    sizes = network_sizes(plain(insert="mlp", insert_mlp_ratio=2.5, gate=gate), **SHAPES)
    inside = (2 * W * 20 + 20 + W) + 2 * W + (W if gate == "zero" else 0)
    assert (sizes.insert_trainable, sizes.insert_frozen, sizes.insert_flops) == (
        inside,
        0,
        2 * N * 2 * W * 20,
    )
    assert sizes.trainable - without.trainable == sizes.insert_trainable
    assert sizes.flops_forward - without.flops_forward == sizes.insert_flops


def test_the_mlp_insert_is_as_wide_as_every_other_unless_told():
    default = network_sizes(plain(insert="mlp", mlp_ratio=3.0), **SHAPES)
    assert default == network_sizes(plain(insert="mlp", mlp_ratio=3.0, insert_mlp_ratio=3.0), **SHAPES)
    wide = network_sizes(plain(insert="mlp", mlp_ratio=3.0, insert_mlp_ratio=4.0), **SHAPES)
    assert wide.trainable - default.trainable == W * (2 * W + 1)


def test_the_papers_block_is_218_million_parameters_and_its_feed_forward_is_counted_in_all_pieces():
    shapes = SHAPES | {"crop_size": (128, 128, 128)}
    sizes = network_sizes(load_config("paper", ["network.block.lora_rank=0"]).network, **shapes)
    width, n = 4096, 16**3
    matrices = 2 * width * width + 2 * width * 1024 + 3 * width * 14_336
    assert sizes.tokens == n
    assert sizes.insert_frozen == matrices + 3 * width
    mappers = 2 * (width * 64 + 4 * (width + 64))
    assert sizes.insert_trainable == mappers + width + 64
    assert sizes.insert_flops == 2 * n * (matrices + mappers) + 4 * n * n * width


def test_words_of_a_prompt_are_frozen_rows_and_pass_through_the_block(folder):
    source = folder()
    tokenizer = Tokenizer(models.WordLevel({"left": 0, "ventricle": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    without = network_sizes(_with_block(source), **SHAPES)
    prompted = network_sizes(_with_block(source, prompt="left ventricle "), **SHAPES)
    assert prompted.insert_frozen - without.insert_frozen == 2 * 32
    matrices = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    pairs = (N + 2) ** 2 - N**2
    assert prompted.insert_flops - without.insert_flops == 2 * 2 * matrices + 4 * pairs * 32


def test_without_tokens_nothing_but_stem_and_head_is_left():
    sizes = network_sizes(NetworkConfig(tokens=False), **SHAPES)
    inside = (sizes.insert_trainable, sizes.insert_frozen, sizes.insert_flops)
    assert (sizes.tokens, inside) == (0, (0, 0, 0))
    full = network_sizes(NetworkConfig(insert="none"), **SHAPES)
    assert 0 < sizes.trainable < full.trainable
    assert 0 < sizes.flops_forward < full.flops_forward


# Against networks that exist


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"network.insert": "mlp"},
        {"network.insert": "none"},
        {"network.mapper": "lora"},
        {"network.block.lora_rank": 4},
        {"network.block.frozen": False},
        {"network.block.storage": "int8"},
        {"network.block.layers": [0, -1]},
        {"network.block.final_norm": False},
        {"network.block.weights": "identity"},
        {"network.block.dtype": "bfloat16"},
        {"network.head": "upsample"},
    ],
    ids=str,
)
def test_the_small_preset_has_the_parameters_of_the_network_that_is_built(settings):
    config = load_config("small", {"network.block.weights": "random", **settings}).network
    shapes = SHAPES | {"crop_size": (16, 16, 16)}
    sizes = network_sizes(config, **shapes)
    assert (sizes.trainable, sizes.frozen) == _counted(build_network(config, **shapes))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_family_is_counted_as_if_it_ran(folder, monkeypatch, name, causal):
    """A counter sees products alone, so the network that runs has to compute its attention by them."""
    config = _with_block(folder(name), causal=causal, network={"mapper": "lora"})
    shapes = SHAPES | {"crop_size": (16, 16, 8)}
    sizes = network_sizes(config, **shapes)
    assert sizes.tokens > (SETTINGS[name].get("sliding_window") or 0), "windows should hide something"
    network = build_network(config, **shapes).eval()
    monkeypatch.setattr(vit, "plain_is_faster", lambda _: True)
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda query, key, value, **rest: attention._plain(
            query, key, value, rest["attn_mask"], rest["scale"], rest["is_causal"], None
        ),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, *shapes["crop_size"]))
    assert sizes.flops_forward == counter.get_total_flops()
    assert (sizes.trainable, sizes.frozen) == _counted(network)


@pytest.mark.parametrize("rotary", [True, "3d"])
def test_rotary_positions_cost_nothing(folder, rotary):
    source = folder("phi3-longrope")
    assert network_sizes(_with_block(source, rotary=rotary), **SHAPES) == network_sizes(
        _with_block(source), **SHAPES
    )


# Without weights, memory or network


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    """Nothing in any cache, and no way out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "huggingface"))

    def refuse(*_, **__):
        pytest.fail("the sizes of a network need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", CATALOG)
def test_every_model_of_the_catalogue_is_counted_offline(name):
    config = load_config("small", {"network.block.source": name}).network
    sizes = network_sizes(config, **SHAPES)
    settings = CATALOG[name].settings
    width, hidden = settings["hidden_size"], settings["intermediate_size"]
    heads = settings["num_attention_heads"]
    keys = settings.get("num_key_value_heads", heads) * settings.get("head_dim", width // heads)
    queries = heads * settings.get("head_dim", width // heads)
    # Families without a gate have two matrices in their feed-forward network.
    matrices = 2 * width * (queries + keys) + (2 if "hidden_act" in settings else 3) * width * hidden
    assert matrices < sizes.insert_frozen < 1.003 * matrices
    assert sizes.insert_trainable == (192 * width + width) + (width * 192 + 192) + 192
    assert (
        sizes.insert_flops == 2 * sizes.tokens * (matrices + 2 * 192 * width) + 4 * queries * sizes.tokens**2
    )


@pytest.mark.usefixtures("_offline")
def test_a_prompt_whose_tokenizer_is_not_here_is_refused_and_not_fetched(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    config = load_config("small", {"network.block.prompt": "left atrium"}).network
    with pytest.raises(BlockError, match=r"not in the cache"):
        network_sizes(config, **SHAPES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_meta_network_holds_no_number_and_draws_none(preset):
    before = torch.random.get_rng_state()
    shapes = SHAPES | {"crop_size": (64, 32, 16)}
    network = build_meta_network(load_config(preset).network, **shapes)
    assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_network_outside_the_meta_device_is_not_counted_wrongly():
    network = build_network(plain(), **SHAPES)
    with pytest.raises(AssertionError, match="fused attention"):
        sizes_of(network, num_channels=1, crop_size=(8, 8, 8))


def test_a_meta_network_keeps_the_blocks_precision(folder):
    network = build_meta_network(_with_block(folder(), dtype="bfloat16"), **SHAPES)
    assert {tensor.dtype for tensor in network.insert.block.parameters()} == {torch.bfloat16}


def test_evaluation_is_counted_and_the_network_left_in_its_mode():
    network = build_meta_network(NetworkConfig(insert="none"), **SHAPES).eval()
    evaluated = sizes_of(network, num_channels=1, crop_size=(8, 8, 8))
    assert not network.training
    assert sizes_of(network.train(), num_channels=1, crop_size=(8, 8, 8)) == evaluated
    assert network.training
    assert network.encoder.training
    assert not network.encoder._forward_pre_hooks


def test_a_crop_that_patches_do_not_tile_is_refused():
    with pytest.raises(ConfigError, match="not a multiple"):
        network_sizes(plain(), **SHAPES | {"crop_size": (8, 8, 6)})
