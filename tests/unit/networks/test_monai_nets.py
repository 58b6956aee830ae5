"""MONAI's networks in our shell: the same numbers as without it, on crops and scans of any shape."""

import re

import pytest
import torch
import torch.nn.functional as F

from medvisionllama.config import load_config
from medvisionllama.config.presets import RIVALS
from medvisionllama.devices import fast_layout
from medvisionllama.errors import ConfigError
from medvisionllama.networks import monai_nets
from medvisionllama.networks.factory import build_network, network_sizes
from medvisionllama.networks.monai_nets import PUBLISHED_CHANNELS, build_rival, dynunet_strides

CUBIC = [(2, 2, 2)] * 3
SLIM = {"unetr": 2, "swin_unetr": 12, "dynunet": 4, "segresnet": 8, "unet++": 4, "unet": 4}
pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, crop=(32, 32, 16), strides=CUBIC, num_channels=2, **more):
    torch.manual_seed(0)
    return build_rival(
        name,
        num_channels=num_channels,
        num_outputs=3,
        crop_size=crop,
        strides=strides,
        base_channels=SLIM[name],
        **more,
    )


@pytest.mark.parametrize("name", RIVALS)
def test_every_weight_of_a_rival_is_trained(name):
    network = fast_layout(make(name, crop=(32, 40, 16)))
    logits, auxiliary = network.train().forward_all(torch.randn(1, 2, 32, 40, 16))
    assert logits.shape == (1, 3, 32, 40, 16)
    (logits.square().mean() + sum(extra.square().mean() for extra in auxiliary)).backward()
    assert [key for key, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", ["unet", "segresnet", "dynunet"])
def test_shell_pads_and_crops_and_does_nothing_else(name):
    network = make(name, crop=(24, 16, 16)).eval()
    image = torch.randn(1, 2, 21, 16, 16)
    with torch.no_grad():
        ours = network(image)
        unit = network.head.unit[0]
        theirs = network.head.network(F.pad(image, (0, 0, 0, 0, 0, -21 % unit)))
    assert ours.shape == (1, 3, 21, 16, 16)
    torch.testing.assert_close(ours, theirs[:, :, :21], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("segresnet", 1, (16 * 16 * 32, 16 * 16 * 32, 16 * 32, 32, 1)),
        ("segresnet", 2, (2 * 16 * 16 * 32, 16 * 16 * 32, 16 * 32, 32, 1)),
        ("unet++", 1, (16 * 16 * 32, 1, 16 * 32, 32, 1)),
        ("unet++", 2, (2 * 16 * 16 * 32, 1, 2 * 16 * 32, 2 * 32, 2)),
    ],
)
def test_a_rival_is_given_the_scan_in_its_own_layout(name, channels, strides, given):
    network = make(name, crop=(16, 16, 32), num_channels=channels)
    seen = []
    network.head.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    # Unlike `contiguous`, a copy into an empty one also restrides an image of one channel.
    image = torch.empty(1, channels, 16, 16, 32, memory_format=given).copy_(
        torch.randn(1, channels, 16, 16, 32)
    )
    with torch.no_grad():
        network.train()(image)
        network.eval()(image)
    assert seen == [strides, strides]


@pytest.mark.parametrize(
    ("shape", "coarser"),
    [((32, 32, 16), [(16, 16, 8), (8, 8, 4)]), ((29, 32, 10), [(15, 16, 5), (8, 8, 3)])],
)
def test_dynunet_is_supervised_at_coarser_strides_while_training_only(shape, coarser):
    network = make("dynunet")
    image = torch.randn(1, 2, *shape)
    logits, auxiliary = network.train().forward_all(image)
    assert logits.shape[2:] == shape
    assert [extra.shape[2:] for extra in auxiliary] == coarser
    assert network.eval().forward_all(image)[1] == []


@pytest.mark.parametrize(
    ("crop", "planned", "stages"),
    [
        # What nnU-Net 2 plans for MSD Task04 at the same patch, and for ACDC at a patch near it.
        ((40, 56, 40), CUBIC, [(2, 2, 2)] * 3),
        ((112, 112, 10), [(2, 2, 1), (2, 2, 1), (2, 2, 2)], [(2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1)]),
        ((128, 128, 128), CUBIC, [(2, 2, 2)] * 5),
        # An odd axis is halved on, padded; one that is left alone is not, below twelve voxels.
        ((64, 72, 28), [(2, 2, 1), (2, 2, 2), (2, 2, 2)], [(2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1)]),
        ((64, 32, 16), CUBIC, CUBIC),
        ((96, 32, 16), CUBIC, [*CUBIC, (2, 1, 1)]),
    ],
)
def test_dynunet_is_as_deep_as_nnunet_would_make_it(crop, planned, stages):
    assert dynunet_strides(crop, planned) == stages


def test_dynunet_looks_at_every_slice_from_where_they_are_near():
    strides = [(2, 2, 1), (2, 2, 1), (2, 2, 2)]
    crop = (112, 112, 10)
    network = build_rival(
        "dynunet", num_channels=1, num_outputs=4, crop_size=crop, strides=strides, base_channels=4
    )
    inner = network.head.network
    stages = [inner.input_block, *inner.downsamples, inner.bottleneck]
    kernels = [stage.conv1.conv.kernel_size for stage in stages]
    assert kernels == [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    # A kernel of one voxel with a stride of two would pass over every second slice.
    up = [stage.conv_block.conv1.conv.kernel_size for stage in inner.upsamples]
    assert up == kernels[:-1][::-1], "and on the way up each stage looks as far as on the way down"
    for stage in stages:
        conv = stage.conv1.conv
        assert all(size >= step for size, step in zip(conv.kernel_size, conv.stride, strict=True))


def test_dynunets_layout_goes_by_its_kernels():
    for even in (CUBIC, [(2, 2, 2), (2, 2, 2), (2, 2, 1)]):
        assert make("dynunet", strides=even).memory_format == torch.channels_last_3d
    thick = make("dynunet", strides=[(2, 2, 1), (2, 2, 2), (2, 2, 2)])
    assert thick.memory_format == torch.contiguous_format


def test_published_dynunet_has_nnunets_channels():
    network = build_rival("dynunet", num_channels=1, num_outputs=3, crop_size=(128, 128, 128), strides=CUBIC)
    widths = [block.conv1.conv.out_channels for block in network.head.network.downsamples]
    assert [PUBLISHED_CHANNELS["dynunet"], *widths, network.head.network.bottleneck.conv1.conv.out_channels] == [
        32, 64, 128, 256, 320, 320,
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "edge"), [("swin_unetr", 32), ("unet", 16)])
def test_crop_too_small_for_a_rival_is_refused_with_its_stride(name, edge):
    with pytest.raises(ConfigError, match=f"one voxel at the deepest stage of {name} .stride {edge}"):
        make(name, crop=(edge, edge, edge))


def test_preset_of_a_rival_builds_it_and_counts_it():
    config = load_config("unet", {"network.base_channels": 4})
    shapes = {"num_channels": 1, "num_outputs": 3, "crop_size": (32, 32, 16), "strides": CUBIC}
    network = build_network(config.network, **shapes)
    sizes = network_sizes(config.network, **shapes)
    assert sizes.trainable == sum(weight.numel() for weight in network.parameters())
    assert (sizes.tokens, sizes.insert_trainable, sizes.frozen) == (0, 0, 0)
    assert sizes.flops_forward > 0


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        ("small", {"network.architecture": "unet"}, "take it with --preset unet"),
        ("unet", {"network.insert": "llm"}, "no tokens and no insert"),
        ("small", {"network.base_channels": 16}, "no effect with architecture=tokens"),
        ("swin_unetr", {"network.base_channels": 16}, "no multiple of 12"),
        ("segresnet", {"network.base_channels": 12}, "no multiple of 8"),
        ("unet", {"train.shard_block": True}, "no effect without a frozen block"),
    ],
)
def test_settings_that_would_mislabel_a_rival_are_refused(preset, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(preset, settings)


def test_a_rival_within_any_preset_is_had_by_what_the_refusal_says():
    rival = {"network.architecture": "unet"}
    with pytest.raises(ConfigError) as refused:
        load_config("paper", rival)
    told = re.findall(r"(network\.\w+)=(\w+)", str(refused.value))
    assert load_config("paper", {**rival, **dict(told)}).network.architecture == "unet"


def test_a_network_with_batch_norms_is_refused_since_a_run_does_not_save_what_they_saw(monkeypatch):
    def build(*_):
        return torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.BatchNorm3d(3)), (1, 1, 1)

    monkeypatch.setitem(monai_nets._BUILDERS, "unet", build)
    shapes = {"num_channels": 1, "num_outputs": 3, "crop_size": (8, 8, 8), "strides": CUBIC}
    with pytest.raises(ConfigError, match=r"network\.1 keeps running statistics \(BatchNorm3d\)"):
        build_network(load_config("unet").network, **shapes)
