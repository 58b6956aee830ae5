"""Token maps: in the right place of the scan, of the right stage, and without a trace in the network."""

import numpy as np
import pytest
import torch
from torch import nn

from medvisionllama.config import load_config
from medvisionllama.data.planning import Normalisation, Plan
from medvisionllama.data.volume import Volume, from_ras
from medvisionllama.inference import activations
from medvisionllama.inference.activations import (
    MapName,
    native_maps,
    recorded,
    stages_of,
    token_maps,
    token_size,
)
from medvisionllama.inference.controls import with_random_block
from medvisionllama.inference.predictor import Member, Predictor
from medvisionllama.llm import attention_weights
from medvisionllama.networks.factory import build_network
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.networks.vit import VisionTransformer
from tiny_llama import save_tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
PATCH = 4
SIZES = {"width": 8, "depth": 2, "insert_after": 1, "num_heads": 2}


class _Brightness(nn.Module):
    """A token for each patch, as long as the patch is bright."""

    stride = (PATCH, PATCH, PATCH)

    def forward(self, image):
        # The last token of an axis may stand for fewer voxels.
        return nn.functional.avg_pool3d(image[:, :1], PATCH, ceil_mode=True), [image]


class _Blank(nn.Module):
    def forward(self, grid, features):
        return torch.zeros(len(grid), 2, *features[0].shape[2:]), []


def identity():
    options = {"num_heads": 1, "mlp_ratio": 1, "dropout": 0, "attention_dropout": 0}
    return VisionTransformer(0, width=1, positions=None, **options)


def plan_of(**changes):
    facts = {
        "channels": ("MRI",),
        "classes": {1: "organ"},
        "merged": False,
        "resize": False,
        "spacing_mm": (2.0, 2.0, 2.0),
        "crop_size": (16, 16, 16),
        "strides": ((2, 2, 2), (2, 2, 2), (1, 1, 1)),
        "flip_axes": (0,),
        "normalisation": (Normalisation(kind="dataset", low=-1e6, high=1e6),),
    }
    return Plan(**facts | changes)


def brightness_member(**changes):
    config = load_config("small", {"train.precision": "fp32"})
    network = TokenSegmenter(_Brightness(), identity(), nn.Identity(), identity(), _Blank())
    return Member(network.eval(), plan_of(**changes), config, torch.device("cpu"))


def blob(order, signs, spacing_mm, place_mm):
    """A scan of about 90 x 80 x 70 mm whose only bright spot, 10 mm wide, is at a place of the patient."""
    extent = np.array([90, 80, 70])[list(order)]
    shape = np.round(extent / spacing_mm).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs @ np.diag(spacing_mm)
    affine[:3, 3] = [-20, 7, 300]
    corner = affine[:3, :3] @ (shape - 1)
    affine[:3, 3] -= np.minimum(corner, 0)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    distance = np.linalg.norm(world - np.array(place_mm)[:, None], axis=0)
    array = np.exp(-((distance / 5) ** 2)).reshape(1, *shape).astype(np.float32)
    return Volume(array, affine), world


@pytest.mark.parametrize(
    ("resize", "edge"), [(False, 16), (True, 32), (True, 30)], ids=["windows", "resized", "last token cut"]
)
@pytest.mark.parametrize(
    ("order", "signs", "spacing_mm"),
    [
        ((0, 1, 2), (1, 1, 1), (2.0, 2.0, 2.0)),
        ((0, 1, 2), (-1, -1, 1), (1.0, 1.3, 5.0)),
        ((2, 0, 1), (1, -1, -1), (4.0, 1.1, 1.7)),
        ((1, 2, 0), (-1, 1, 1), (0.9, 3.0, 1.2)),
    ],
    ids=["as trained", "flipped", "permuted", "both"],
)
def test_a_bright_token_is_found_where_it_lies_in_the_patient(order, signs, spacing_mm, resize, edge):
    place = np.array([36.0, 31.0, 349.0])
    volume, world = blob(order, signs, spacing_mm, place)
    member = brightness_member(resize=resize, crop_size=(edge, edge, edge))
    scan = Predictor([member]).prepare(volume)
    maps = native_maps(member, scan)
    assert list(maps) == [MapName("encoder", "norm"), MapName("decoder", "norm")]
    own = from_ras(maps[MapName("encoder", "norm")], scan.affine)
    assert own.shape == volume.array.shape[1:]
    token_mm = np.array(token_size(member, scan)) * scan.spacing_mm
    highest = world[:, own.argmax()]
    assert (np.abs(highest - place) < 0.75 * token_mm).all()
    # The middle of the map is sharper than its maximum: a shift by half a token would be seen.
    middle = (world * own.ravel()).sum(axis=1) / own.sum()
    assert (np.abs(middle - place) < 0.2 * token_mm).all()


def test_a_token_is_as_long_as_the_grid_says():
    volume, _ = blob((0, 1, 2), (1, 1, 1), (1.0, 2.0, 4.0), (30, 30, 330))
    member = brightness_member()
    scan = Predictor([member]).prepare(volume)
    np.testing.assert_allclose(np.array(token_size(member, scan)) * scan.spacing_mm, 8.0, rtol=0.02)


def test_windows_are_blended_and_a_constant_scan_gives_a_constant_map():
    member = brightness_member()
    volume = Volume(np.full((1, 45, 40, 35), 3.0, np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    maps = native_maps(member, Predictor([member]).prepare(volume))
    np.testing.assert_allclose(maps[MapName("decoder", "norm")], 3.0, rtol=1e-5)


def test_maps_do_not_depend_on_the_slabs_they_are_made_in(monkeypatch):
    member = brightness_member()
    array = np.random.default_rng(0).random((1, 23, 20, 18)).astype(np.float32)
    scan = Predictor([member]).prepare(Volume(array, np.diag([2.0, 2.0, 2.5, 1.0])))
    name = MapName("decoder", "norm")
    whole = native_maps(member, scan)[name]
    monkeypatch.setattr(activations, "slab_thickness", lambda *_: 5)
    shares = []
    pieces = native_maps(member, scan, on_share=shares.append)[name]
    assert len(shares) > 3
    assert shares[-1] == 1
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    return folder


def member_of(llama, **changes):
    settings = {"network.head": "linear", "network.patch_size": PATCH, "train.precision": "fp32"}
    settings |= {f"network.{key}": value for key, value in SIZES.items()}
    settings |= {"network.block.source": str(llama)} | changes
    config = load_config("small", settings)
    torch.manual_seed(0)
    network = build_network(config.network, **plan_of().network_shapes, seed=0)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(
                parameter, std=0.5
            )  # gates and updates that start at zero would hide what is behind
    return Member(network.eval(), plan_of(), config, torch.device("cpu"))


def window():
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(3))


def names_of(member):
    with torch.no_grad():
        return [tuple(name) for name in token_maps(member.network, window())]


def test_every_stage_has_its_maps_in_the_order_of_the_data_flow(llama):
    assert names_of(member_of(llama)) == [
        ("encoder", "norm"),
        ("encoder", "attention"),
        ("vd1", "norm"),
        ("block", "norm"),
        ("block", "attention"),
        ("vd2", "norm"),
        ("decoder", "norm"),
        ("decoder", "attention"),
    ]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"network.insert": "none"}, {"vd1", "block", "vd2", "mlp"}),
        ({"network.insert": "mlp"}, {"vd1", "block", "vd2"}),
        ({"network.block.weights": "identity"}, {"block", "mlp"}),
    ],
)
def test_stages_that_do_not_exist_are_left_out(llama, changes, missing):
    found = {stage for stage, _ in names_of(member_of(llama, **changes))}
    assert found == {"encoder", "vd1", "block", "vd2", "mlp", "decoder"} - missing


def test_an_encoder_without_transformer_blocks_has_no_attention(llama):
    names = names_of(member_of(llama, **{"network.insert_after": 0}))
    assert ("encoder", "norm") in names
    assert ("encoder", "attention") not in names


def test_norms_are_those_of_the_network_s_own_tokens(llama):
    member = member_of(llama)
    network, insert = member.network, member.network.insert
    with torch.no_grad():
        maps = token_maps(network, window())
        tokens = network.encoder(network.embed(window())[0].flatten(2).transpose(1, 2))
        wide = insert.vd1(tokens)
        expected = {
            "encoder": tokens,
            "vd1": wide,
            "vd2": insert.vd2(insert.block(wide) + wide),
            "decoder": network.decoder(insert(tokens)),
        }
        insert.block.norm = None
        expected["block"] = insert.block(wide)
    for stage, vectors in expected.items():
        found = maps[MapName(stage, "norm")]
        assert found.shape == (1, 4, 4, 4)
        torch.testing.assert_close(found.flatten(1), vectors.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_attention_times_values_is_what_our_own_layers_give(llama):
    member = member_of(llama)
    layer = member.network.encoder[-1]
    seen = []
    handle = layer.attention.register_forward_hook(
        lambda _module, inputs, output: seen.append((inputs[0], output))
    )
    with torch.no_grad():
        maps = token_maps(member.network, window())
        [(tokens, output)] = seen
        handle.remove()
        query, key, value = layer.attention.by_head(layer.attention.qkv(tokens))
        shares = attention_weights.attention_weights(query, key, None, scaling=4**-0.5, softcap=None)
        mixed = layer.attention.out((shares @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, output, atol=1e-6, rtol=1e-5)
    received = shares.mean(dim=1).mean(dim=1) * 64
    torch.testing.assert_close(
        maps[MapName("encoder", "attention")].flatten(1), received, atol=1e-5, rtol=1e-5
    )


def test_a_prompt_is_on_no_map(llama):
    member = member_of(llama)
    words = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    member.network.insert.prompt = nn.Parameter(words, requires_grad=False)
    with torch.no_grad():
        maps = token_maps(member.network, window())
    assert {tuple(values.shape) for values in maps.values()} == {(1, 4, 4, 4)}
    insert = member.network.insert
    with torch.no_grad():
        wide = insert.vd1(
            member.network.encoder(member.network.embed(window())[0].flatten(2).transpose(1, 2))
        )
        through = insert.block.layers[-1](
            torch.cat([words[None], wide], dim=1),
            attention_mask=None,
            is_causal=False,
            position_embeddings=(torch.ones(1, 1, 8), torch.zeros(1, 1, 8)),
        )
    expected = through[:, 5:].norm(dim=-1)
    torch.testing.assert_close(maps[MapName("block", "norm")].flatten(1), expected, atol=1e-5, rtol=1e-5)


def hooks_in(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_predictions_are_the_same_to_the_bit_and_no_hook_is_left(llama):
    member = member_of(llama)
    volume = Volume(np.random.default_rng(0).normal(size=(1, 20, 18, 16)).astype(np.float32), np.eye(4) * 2)
    predictor = Predictor([member])
    before = predictor.predict(volume, probabilities=True).probabilities
    with torch.no_grad():
        plain = member.network(window())
        with recorded(member.network):
            watched = member.network(window())
            assert hooks_in(member.network) > 0
    assert torch.equal(plain, watched)
    native_maps(member, predictor.prepare(volume))
    assert hooks_in(member.network) == 0
    assert not attention_weights.watched()
    np.testing.assert_array_equal(predictor.predict(volume, probabilities=True).probabilities, before)


def test_hooks_are_gone_after_an_error_too(llama):
    member = member_of(llama)
    with pytest.raises(RuntimeError):
        token_maps(member.network, torch.zeros(1, 7, 16, 16, 16))
    assert hooks_in(member.network) == 0
    assert not attention_weights.watched()


@pytest.mark.parametrize("changes", [{}, {"network.block.lora_rank": 2}, {"network.block.frozen": False}])
def test_a_random_block_changes_what_comes_after_it_and_nothing_before(llama, changes):
    member = member_of(llama, **changes)
    before = member.network.insert.block.sha256()
    control = with_random_block(member)
    with torch.no_grad():
        trained, random = (token_maps(one.network, window()) for one in (member, control))
    assert list(trained) == list(random)
    for name in trained:
        same = torch.equal(trained[name], random[name])
        assert same == (name.stage in {"encoder", "vd1"}), name
    assert member.network.insert.block.sha256() == before
    assert control.network.insert.vd1 is member.network.insert.vd1


def test_a_random_block_keeps_the_trained_update(llama):
    member = member_of(llama, **{"network.block.lora_rank": 2})
    ours, theirs = (
        dict(one.network.insert.block.named_parameters()) for one in (member, with_random_block(member))
    )
    updates = [name for name in ours if ".lora_" in name]
    assert updates
    assert all(torch.equal(ours[name], theirs[name]) for name in updates)


def test_a_run_around_a_random_block_meets_another_one(llama):
    member = member_of(llama, **{"network.block.weights": "random"})
    control = with_random_block(member)
    assert control.network.insert.block.sha256() != member.network.insert.block.sha256()


@pytest.mark.parametrize(
    "changes", [{"network.insert": "mlp"}, {"network.insert": "none"}, {"network.block.weights": "identity"}]
)
def test_without_a_block_there_is_no_random_one(llama, changes):
    assert with_random_block(member_of(llama, **changes)) is None


def test_stages_name_modules_of_the_network_itself(llama):
    network = member_of(llama).network
    modules = set(network.modules())
    assert all(module in modules for module in stages_of(network).values())
