import pytest
import torch

from medvisionllama.config import NetworkConfig, load_config
from medvisionllama.networks.factory import build_network

STRIDES = ((2, 2, 1), (2, 2, 2), (2, 2, 2))


def build(*, strides=STRIDES, **changes):
    settings = {"stem_channels": (4, 6, 8), "context_channels": (10, 12), "tokens": False}
    torch.manual_seed(0)
    config = NetworkConfig(**(settings | changes))
    return build_network(config, num_channels=1, num_outputs=3, crop_size=(32, 16, 16), strides=strides)


@pytest.fixture
def image():
    return torch.randn(2, 1, 32, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [{}, {"tokens": True, "width": 24, "depth": 2, "insert": "none"}])
def test_full_resolution_starts_with_nothing_to_say(image, tokens):
    network = build(refine=True, insert_after=1, **tokens).eval()
    logits, half = watch(network, image)
    assert logits.abs().max() > 0.1
    torch.testing.assert_close(logits, network.head.out_coarse(half))


def test_full_resolution_adds_what_it_learns(image):
    network = build(refine=True).train()
    network(image).square().mean().backward()
    assert network.head.out.weight.grad.abs().sum() > 0
    with torch.no_grad():
        network.head.out.weight += 1.0
        logits, half = watch(network, image)
    fine = logits - network.head.out_coarse(half)
    # Within a cell of stride 2 voxels differ by what the finest features say.
    assert fine[..., 0::2, :, :].sub(fine[..., 1::2, :, :]).abs().max() > 0.1


def test_slices_that_are_near_are_looked_across_though_they_are_halved_no_further():
    network = build(strides=((2, 2, 1), (2, 2, 2), (2, 2, 1)))
    stem, head = network.embed, network.head
    kernels = [block.conv.kernel_size for block in (stem.fine, *stem.middle, *stem.coarse)]
    assert kernels == [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    kernels = [block.conv.kernel_size for block in (head.join_full, head.join_half, head.join_quarter)]
    assert kernels == [(3, 3, 1), (3, 3, 3), (3, 3, 3)]


def test_voxels_see_the_next_cell_of_stride_2_and_none_further():
    head = build(refine=True).head
    half = torch.zeros(1, 6, 16, 8, 16, requires_grad=True)
    for voxel, cells in [((8, 8), {3, 4}), ((9, 9), {4, 5})]:
        logits = head.out_coarse(half)
        assert logits.shape == (1, 3, 32, 16, 16)
        (seen,) = torch.autograd.grad(logits[0, :, *voxel, 5].sum(), half)
        places = seen[0].abs().sum(0).nonzero()
        assert set(places[:, 0].tolist()) == set(places[:, 1].tolist()) == cells
        # Slices that stride 2 leaves alone stay by themselves.
        assert set(places[:, 2].tolist()) == {5}


def test_coarser_logits_are_supervised_as_without(image):
    plain, refining = build().train(), build(refine=True).train()
    refining.load_state_dict(plain.state_dict(), strict=False)
    for coarse, refined in zip(plain.forward_all(image)[1], refining.forward_all(image)[1], strict=True):
        assert torch.equal(coarse, refined)


def watch(network, image):
    """Logits, and what the head joins at stride 2."""
    seen = []
    handle = network.head.join_half.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    logits = network(image)
    handle.remove()
    return logits, seen[0]


def test_without_work_at_full_resolution_there_is_nothing_to_refine(image):
    changes = {"stem_channels": (0, 6, 8)}
    assert torch.equal(build(**changes).eval()(image), build(refine=True, **changes).eval()(image))


@pytest.mark.parametrize("preset", ["small", "large"])
def test_presets_refine_and_choose_their_joins_and_older_configurations_do_not(preset):
    network = load_config(preset).network
    assert (network.refine, network.join_convolutions) == (True, None)
    older = NetworkConfig()
    assert (older.refine, older.join_convolutions) == (False, 1)
    # As every run's config.yaml says, also that of a head which has no joins.
    assert NetworkConfig(head="linear", join_convolutions=1).join_convolutions == 1


@pytest.mark.parametrize(
    ("strides", "number"), [(STRIDES, 1), (((2, 2, 2),) * 3, 2), (((2, 2, 1), (2, 2, 1), (2, 2, 1)), 1)]
)
def test_even_voxels_are_joined_by_two_convolutions_and_thick_slices_by_one(strides, number):
    named, by_default = (
        build(strides=strides, join_convolutions=given).state_dict() for given in (number, None)
    )
    assert {key: value.shape for key, value in by_default.items()} == {
        key: value.shape for key, value in named.items()
    }
    other = build(strides=strides, join_convolutions=3 - number).state_dict()
    assert other.keys() != by_default.keys()


def test_one_convolution_joins_as_it_did_before_there_could_be_more():
    weights = {name for name in build().head.state_dict() if name.startswith("join_") and "conv" in name}
    assert weights == {"join_quarter.conv.weight", "join_half.conv.weight", "join_full.conv.weight"}
    twice = {name for name in build(join_convolutions=2).head.state_dict() if "join_half" in name}
    assert {name for name in twice if "conv" in name} == {
        "join_half.0.conv.weight",
        "join_half.1.conv.weight",
    }
