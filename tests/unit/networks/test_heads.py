import pytest
import torch
import torch.nn.functional as F

from medvisionllama.config import NetworkConfig, load_config
from medvisionllama.networks.factory import build_network

STRIDES = ((2, 2, 1), (2, 2, 2), (2, 2, 2))


def build(**changes):
    settings = {"stem_channels": (4, 6, 8), "context_channels": (10, 12), "tokens": False}
    torch.manual_seed(0)
    config = NetworkConfig(**(settings | changes))
    return build_network(config, num_channels=1, num_outputs=3, crop_size=(32, 16, 16), strides=STRIDES)


@pytest.fixture
def image():
    return torch.randn(2, 1, 32, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [{}, {"tokens": True, "width": 24, "depth": 2, "insert": "none"}])
def test_full_resolution_starts_at_the_logits_of_stride_2(image, tokens):
    network = build(refine=True, insert_after=1, **tokens).train()
    logits, (coarse, _) = network.forward_all(image)
    assert coarse.shape == (2, 3, 16, 8, 16)
    assert torch.equal(logits, F.interpolate(coarse, logits.shape[2:]))
    network.eval()
    assert torch.equal(network(image), logits)


def test_full_resolution_adds_what_it_learns(image):
    network = build(refine=True).train()
    network(image).square().mean().backward()
    assert network.head.out.weight.grad.abs().sum() > 0
    with torch.no_grad():
        network.head.out.weight += 1.0
        logits, (coarse, _) = network.forward_all(image)
    # Within a cell of stride 2 voxels differ now, by what the finest features say.
    fine = logits - F.interpolate(coarse, logits.shape[2:])
    assert fine[..., 0::2, :, :].sub(fine[..., 1::2, :, :]).abs().max() > 0.1


def test_weights_have_the_same_names_and_shapes_without(image):
    plain, refining = build(), build(refine=True)
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in refining.state_dict().items()
    }
    refining.load_state_dict(plain.state_dict())
    plain.eval(), refining.eval()
    features = refining.embed(image)[1]
    with torch.no_grad():
        difference = refining(image) - plain(image)
        half = F.interpolate(refining.head.out_half(_half(refining, features)), image.shape[2:])
    torch.testing.assert_close(difference, half, rtol=0, atol=1e-5)


def _half(network, features):
    """What the head joins at stride 2."""
    seen = []
    handle = network.head.join_half.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    network.head(None, features)
    handle.remove()
    return seen[0]


def test_without_work_at_full_resolution_there_is_nothing_to_refine(image):
    changes = {"stem_channels": (0, 6, 8)}
    assert torch.equal(build(**changes).eval()(image), build(refine=True, **changes).eval()(image))


@pytest.mark.parametrize("preset", ["small", "large"])
def test_presets_refine_and_older_configurations_do_not(preset):
    assert load_config(preset).network.refine
    assert not NetworkConfig().refine
