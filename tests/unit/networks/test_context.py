import math

import pytest
import torch

from medvisionllama.config import NetworkConfig
from medvisionllama.errors import ConfigError
from medvisionllama.networks.context import ContextDown, ContextUp, has_context
from medvisionllama.networks.factory import build_network

STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2))


def build(crop=(32, 16, 16), strides=STRIDES, **changes):
    settings = {
        "stem_channels": (4, 6, 8),
        "context_channels": (10, 12),
        "width": 24,
        "depth": 2,
        "insert_after": 1,
        "insert": "none",
    }
    torch.manual_seed(0)
    config = NetworkConfig(**(settings | changes))
    return build_network(config, num_channels=1, num_outputs=3, crop_size=crop, strides=strides)


def test_training_starts_at_the_network_without_tokens():
    network, image = build().eval(), torch.randn(1, 1, 32, 16, 16)
    with torch.no_grad():
        before = network(image)
        for parameter in network.encoder.parameters():
            parameter.normal_()
        assert torch.equal(network(image), before)
        network.head.add_tokens.weight.normal_()
        assert not torch.allclose(network(image), before, atol=1e-3)


def test_context_and_stem_alone_have_no_transformer():
    network = build(tokens=False)
    assert not any("encoder" in name or "add_tokens" in name for name, _ in network.named_parameters())
    network.train()
    logits, auxiliary = network.forward_all(torch.randn(2, 1, 32, 16, 16))
    assert logits.shape == (2, 3, 32, 16, 16)
    assert [tuple(output.shape[2:]) for output in auxiliary] == [(16, 8, 8), (4, 2, 2)]


def test_it_sees_further_than_the_stem():
    crop = (128, 16, 16)
    image = torch.zeros(1, 1, *crop, requires_grad=True)
    reach = {}
    for name, channels in {"stem": None, "context": (10, 12)}.items():
        network = build(crop, tokens=False, context_channels=channels).eval()
        # Instance norms see all of the crop; without them only convolutions carry anything across it.
        for module in network.modules():
            if isinstance(module, torch.nn.InstanceNorm3d):
                module.forward = lambda x: x
        (seen,) = torch.autograd.grad(network(image)[0, :, 64].sum(), image)
        reach[name] = int(seen.abs().sum(dim=(0, 1, 3, 4)).nonzero().max()) - 64
    assert reach["context"] > 2 * reach["stem"]


@pytest.mark.parametrize("grid", [(9, 4, 3), (14, 14, 5), (8, 1, 2), (2, 1, 1)])
def test_any_grid_comes_back_as_long_as_it_was(grid):
    x, y, z = grid
    upper, lower = ContextDown(4, (6, 8), stride=(2, 2, 1), grid=grid)(torch.randn(2, 4, 2 * x, 2 * y, z))
    assert upper.shape == (2, 6, *grid)
    assert lower.shape == (2, 8, *(-(-size // 2) if size >= 8 else size for size in grid))
    assert ContextUp((6, 8), grid=grid)(upper, lower).shape == upper.shape


@pytest.mark.parametrize(
    ("crop", "grid", "stride"),
    [((128, 72, 16), (8, 5, 2), (16, 16, 8)), ((32, 16, 16), (4, 2, 2), (8, 8, 8))],
    ids=["halved", "too few to halve"],
)
def test_tokens_lie_at_the_bottom(crop, grid, stride):
    network = build(crop)
    seen = []
    network.insert.register_forward_hook(lambda _module, _inputs, tokens: seen.append(tokens.shape[1]))
    logits = network(torch.randn(1, 1, *crop))
    assert logits.shape[2:] == crop
    assert seen == [math.prod(grid)]
    assert network.embed.stride == stride
    assert network.encoder[0].grid == grid


def test_a_single_token_has_no_context():
    assert not has_context((1, 1, 1))
    assert has_context((2, 1, 1))
    network = build((8, 8, 8)).train()
    assert network.forward_all(torch.randn(2, 1, 8, 8, 8))[0].shape == (2, 3, 8, 8, 8)


def test_without_it_the_network_is_the_one_of_before():
    names = [name for name, _ in build(context_channels=None, tokens=False).named_parameters()]
    assert not any("context" in name or "from_tokens" in name or "out_tokens" in name for name in names)


def test_a_stem_that_ends_with_one_cell_is_refused():
    with pytest.raises(ConfigError, match=r"leave one cell of the crop \(16, 16, 16\).*data.crop_size"):
        build((16, 16, 16), ((4, 4, 4), (4, 4, 4), (1, 1, 1)))
