"""Controls are as large as what they stand for, counted on the networks that their settings build."""

import pytest
import torch

from medvisionllama.config import load_config
from medvisionllama.errors import ConfigError
from medvisionllama.networks.factory import match_depth, match_mlp, network_sizes
from medvisionllama.networks.layers import MLP
from medvisionllama.networks.matching import measure, ratio_for
from medvisionllama.networks.sizes import Sizes

STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
SHAPES = {"num_channels": 1, "num_outputs": 3, "crop_size": (32, 40, 32), "strides": STRIDES}
NETWORKS = {
    "small": {},
    "small, two layers with LoRA": {"network.block.layers": [-2, -1], "network.block.lora_rank": 4},
    "plain ViT": {
        "network.head": "linear",
        "network.width": 24,
        "network.depth": 4,
        "network.num_heads": 2,
        "network.insert_after": 2,
        "network.gate": "none",
        "network.mapper": "lora",
        "network.block.weights": "identity",
    },
}
CRITERIA = ("trainable", "total", "flops")
every_target = pytest.mark.parametrize("name", NETWORKS)
every_criterion = pytest.mark.parametrize("by", CRITERIA)


def _network(name="small", **changes):
    return load_config("small", NETWORKS[name] | changes).network


def _built(name, settings):
    return network_sizes(_network(name, **settings), **SHAPES)


def test_each_criterion_reads_its_own_number():
    sizes = Sizes(
        4, trainable=3, frozen=10, flops_forward=7, insert_trainable=1, insert_frozen=10, insert_flops=2
    )
    assert [measure(sizes, by) for by in CRITERIA] == [3, 13, 7]


@every_target
@every_criterion
def test_a_matched_mlp_is_within_one_percent(name, by):
    target = network_sizes(_network(name), **SHAPES)
    match = match_mlp(_network(name), target, by=by, **SHAPES)
    built = _built(name, match.settings)
    assert built == match.sizes
    assert match.settings.keys() == {"network.insert", "network.insert_mlp_ratio"}
    assert match.ratio == measure(built, by) / measure(target, by) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("width", [98, 196, 392])
def test_widths_whose_reciprocal_rounds_down_can_be_matched(width):
    network = _network(**{"network.width": width, "network.num_heads": 2})
    match = match_mlp(network, network_sizes(network, **SHAPES), by="trainable", **SHAPES)
    assert match.ratio == pytest.approx(1, abs=0.01)


@every_target
@every_criterion
def test_no_other_width_of_the_mlp_comes_nearer(name, by):
    config = _network(name)
    target = network_sizes(config, **SHAPES)
    match = match_mlp(config, target, by=by, **SHAPES)
    hidden = MLP(config.width, ratio=match.settings["network.insert_mlp_ratio"]).up.out_features
    for other in (hidden - 1, hidden + 1):
        near = match.settings | {"network.insert_mlp_ratio": ratio_for(config.width, other)}
        assert abs(measure(_built(name, near), by) / measure(target, by) - 1) > abs(match.ratio - 1)


@every_target
@every_criterion
def test_a_matched_depth_is_within_half_a_block_or_one_block_deeper(name, by):
    config = _network(name)
    target = network_sizes(config, **SHAPES)
    match = match_depth(config, target, by=by, **SHAPES)
    built = _built(name, match.settings)
    assert built == match.sizes
    assert match.ratio == measure(built, by) / measure(target, by)
    depth = match.settings["network.depth"]
    block = measure(built, by) - measure(_built(name, match.settings | {"network.depth": depth - 1}), by)
    assert depth > config.depth
    distance = abs(measure(built, by) - measure(target, by))
    assert distance <= (block if depth == config.depth + 1 else block / 2)


def test_the_depth_by_total_parameters_is_the_one_counted_by_hand():
    config = _network()
    target = network_sizes(config, **SHAPES)
    block = (3 * 192 * 192 + 3 * 192) + (192 * 192 + 192) + (2 * 192 * 768 + 768 + 192) + 4 * 192
    wanted = (target.insert_trainable + target.insert_frozen) / block
    match = match_depth(config, target, by="total", **SHAPES)
    assert match.settings == {"network.insert": "none", "network.depth": 6 + round(wanted)}


def test_a_gate_counts_among_the_mlps_parameters():
    target = network_sizes(_network(), **SHAPES)
    beside = {"none": 192 + 2 * 192, "zero": 192 + 2 * 192 + 192}
    for gate, parameters in beside.items():
        config = _network(**{"network.gate": gate})
        match = match_mlp(config, target, by="trainable", **SHAPES)
        hidden = int(match.settings["network.insert_mlp_ratio"] * 192)
        assert match.sizes.insert_trainable == hidden * (2 * 192 + 1) + parameters
        assert abs(match.sizes.insert_trainable - target.insert_trainable) <= 192


def test_a_target_may_be_of_another_network():
    target = network_sizes(_network(**{"network.block.source": "llama-3.1-8b"}), **SHAPES)
    match = match_mlp(_network(), target, by="total", **SHAPES)
    assert match.ratio == pytest.approx(1, abs=1e-4)
    assert match.sizes.total > 218_000_000


def test_the_width_by_operations_is_the_one_counted_by_hand():
    target = network_sizes(_network(), **SHAPES)
    match = match_mlp(_network(), target, by="flops", **SHAPES)
    # A hidden channel costs each token a multiply and an add with each of 192 values, on its way in and out.
    hidden = round(target.insert_flops / (target.tokens * 2 * 2 * 192))
    assert match.settings["network.insert_mlp_ratio"] == ratio_for(192, hidden)
    assert match.sizes.insert_flops == hidden * target.tokens * 2 * 2 * 192


@every_criterion
@pytest.mark.parametrize("match", [match_mlp, match_depth])
def test_a_target_no_larger_than_the_network_without_an_insert_is_refused(match, by):
    config = _network()
    target = network_sizes(_network(**{"network.insert": "none"}), **SHAPES)
    with pytest.raises(ConfigError, match=f"{measure(target, by):,}"):
        match(config, target, by=by, **SHAPES)


@pytest.mark.parametrize("match", [match_mlp, match_depth])
def test_a_network_without_tokens_has_no_place_for_a_control(match):
    target = network_sizes(_network(), **SHAPES)
    with pytest.raises(ConfigError, match=r"network\.tokens=false"):
        match(_network(**{"network.tokens": False}), target, by="total", **SHAPES)


def test_a_ratio_names_its_width_exactly():
    for width in (1, 3, 24, 64, 192, 768):
        for hidden in (*range(1, 400), 9_999, 1_690_853):
            with torch.device("meta"):
                assert MLP(width, ratio=ratio_for(width, hidden)).up.out_features == hidden
