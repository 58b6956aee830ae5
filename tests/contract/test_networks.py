"""What every network of the project promises, whatever its head, insert, mapper and gate."""

import pytest
import torch

from medvisionllama.checkpoint import copy_into, frozen, load_tensors, save_tensors, trainable
from medvisionllama.config import BlockConfig, NetworkConfig, load_config
from medvisionllama.errors import BlockError, ConfigError
from medvisionllama.llm import FrozenBlock
from medvisionllama.networks import MedVisionLlama, vit
from medvisionllama.networks.factory import build_network
from medvisionllama.networks.layers import to_tokens
from tiny_llama import save_tiny_llama

CROP = (16, 16, 8)
STRIDES = ((2, 2, 2), (2, 2, 2), (2, 2, 2))

ARMS = {
    "none": {"insert": "none"},
    "mlp": {"insert": "mlp"},
    "mlp-gated": {"insert": "mlp", "gate": "zero"},
    **{
        f"llm-{mapper}{'-gated' if gate == 'zero' else ''}": {"insert": "llm", "mapper": mapper, "gate": gate}
        for mapper in ("linear", "lora", "linear+lora")
        for gate in ("none", "zero")
    },
    "llm-linear-lora_inside": {"insert": "llm", "lora_rank": 2},
}
every_network = pytest.mark.parametrize(
    ("head", "arm"),
    [(head, arm) for head in ("linear", "upsample", "skip", "context", "half") for arm in ARMS],
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder)
    return folder


def _config(llama, head, *, insert, lora_rank=0, **changes):
    block = BlockConfig(source=str(llama), lora_rank=lora_rank)
    sizes = {"width": 24, "depth": 2, "insert_after": 1, "num_heads": 2}
    patches = {"patch_size": 4} if head in {"linear", "upsample"} else {}
    settings = sizes | patches | {"stem_channels": (4, 6, 8)} | changes
    if head == "half":
        # Nothing at full resolution.
        head, settings = "context", settings | {"stem_channels": (0, 6, 8)}
    if head == "context":
        head, settings = "skip", {"context_channels": (10, 12), "join_convolutions": 2} | settings
    return NetworkConfig(head=head, insert=insert, block=block, **settings)


def _build(config, *, seed=0, crop=CROP, strides=STRIDES):
    torch.manual_seed(seed)
    return build_network(config, num_channels=2, num_outputs=3, crop_size=crop, strides=strides)


def _image(crop=CROP, batch=2):
    return torch.randn(batch, 2, *crop, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _open(network):
    """Give what starts at zero (gates, low-rank updates, biases) a value, as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(network).values():
        if not parameter.any():
            parameter.normal_(std=0.5, generator=generator)
    return network


def _backward(network):
    network.train()
    logits, auxiliary = network.forward_all(_image())
    sum(output.square().mean() for output in (logits, *auxiliary)).backward()


@every_network
def test_logits_have_the_images_shape(llama, head, arm):
    network = _build(_config(llama, head, **ARMS[arm])).eval()
    with torch.no_grad():
        assert network(_image()).shape == (2, 3, *CROP)


@pytest.mark.parametrize("first", [(3, 2, 1), (4, 1, 2)])
def test_logits_come_from_stride_two_whatever_that_is(llama, first):
    crop, strides = (24, 16, 8), (first, (2, 2, 2), (1, 2, 2))
    network = _build(_config(llama, "half", insert="none"), crop=crop, strides=strides).eval()
    with torch.no_grad():
        assert network(_image(crop)).shape == (2, 3, *crop)


@every_network
def test_gradients_reach_every_trainable_weight_and_nothing_frozen(llama, head, arm):
    network = _open(_build(_config(llama, head, **ARMS[arm])))
    _backward(network)
    largest = max(parameter.grad.abs().max() for parameter in trainable(network).values())
    for name, parameter in trainable(network).items():
        assert parameter.grad.abs().max() > 1e-7 * largest, f"no gradient reaches {name}"
    assert all(parameter.grad is None for parameter in frozen(network).values())
    assert bool(frozen(network)) == (ARMS[arm]["insert"] == "llm")


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.endswith("-gated")])
def test_behind_a_closed_gate_only_the_gate_learns_at_first(llama, arm):
    """Its gradient opens it in the first step; then the rest of the insert learns (the test above)."""
    network = _build(_config(llama, "skip", **ARMS[arm]))
    _backward(network)
    moved = {name for name, parameter in trainable(network.insert).items() if parameter.grad.any()}
    assert moved == {"gate"}
    assert all(parameter.grad.any() for parameter in trainable(network.encoder).values())


@every_network
def test_saved_weights_make_a_fresh_network_the_same(llama, tmp_path, head, arm):
    config = _config(llama, head, dropout=0.2, **ARMS[arm])
    network, fresh = _open(_build(config, seed=0)).eval(), _build(config, seed=1).eval()
    where = tmp_path / "weights.safetensors"
    save_tensors(where, trainable(network), {})
    with torch.no_grad():
        assert not torch.equal(fresh(_image()), network(_image()))
        copy_into(fresh, load_tensors(where)[0], where=where)
        assert torch.equal(fresh(_image()), network(_image()))


@every_network
def test_evaluation_is_deterministic_and_training_drops_out(llama, head, arm):
    network = _open(_build(_config(llama, head, dropout=0.2, attention_dropout=0.2, **ARMS[arm])))
    with torch.no_grad():
        assert torch.equal(network.eval()(_image()), network(_image()))
        assert not torch.equal(network.train()(_image()), network(_image()))


@pytest.mark.parametrize("head", ["linear", "upsample", "skip"])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.endswith("-gated")])
def test_a_zero_gate_gives_exactly_the_baseline(llama, head, arm):
    baseline = _build(_config(llama, head, insert="none")).eval()
    gated = _build(_config(llama, head, **ARMS[arm]), seed=1).eval()
    missing = gated.load_state_dict(baseline.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("insert.") for name in missing.missing_keys)
    with torch.no_grad():
        assert torch.equal(gated(_image()), baseline(_image()))
        gated.insert.gate += 0.1
        assert not torch.equal(gated(_image()), baseline(_image()))


@pytest.mark.parametrize("arm", ["none", "mlp", "llm-linear"])
def test_thick_slices_are_halved_less_often(llama, arm):
    strides = ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    network = _build(_config(llama, "skip", **ARMS[arm]), crop=(16, 24, 4), strides=strides)
    assert network.encoder[0].grid == (2, 3, 2)
    logits, auxiliary = network.train().forward_all(_image((16, 24, 4)))
    assert logits.shape == (2, 3, 16, 24, 4)
    assert [output.shape[2:] for output in auxiliary] == [(8, 12, 4), (2, 3, 2)]
    logits.square().mean().backward()


def test_only_the_skip_head_supervises_coarser_logits_and_only_in_training(llama):
    for head, expected in (("linear", 0), ("upsample", 0), ("skip", 2)):
        network = _build(_config(llama, head, insert="none"))
        assert len(network.train().forward_all(_image())[1]) == expected
        assert not network.eval().forward_all(_image())[1]


@pytest.mark.parametrize("patch_size", [2, 6, 8])
def test_patch_heads_fill_patches_of_any_size(llama, patch_size):
    crop = (2 * patch_size, patch_size, 3 * patch_size)
    for head in ("linear", "upsample"):
        config = _config(llama, head, insert="none", patch_size=patch_size)
        with torch.no_grad():
            assert _build(config, crop=crop)(_image(crop)).shape == (2, 3, *crop)


@pytest.mark.parametrize("head", ["linear", "upsample", "skip"])
@pytest.mark.parametrize("crop", [(18, 16, 8), (16, 16, 6)])
def test_a_crop_that_tokens_do_not_tile_is_refused(llama, head, crop):
    with pytest.raises(ConfigError, match="not a multiple of the token stride"):
        _build(_config(llama, head, insert="none"), crop=crop)


def test_without_tokens_stem_and_head_stand_alone(llama):
    network = _build(_config(llama, "skip", insert="llm", tokens=False))
    _backward(network)
    assert all(parameter.grad.any() for parameter in network.parameters())
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"embed", "head"}


def test_in_the_reference_order_the_block_sees_patches_without_positions(llama):
    changes = {"insert": "llm", "insert_after": 0, "positions": "after_insert"}
    network = _build(_config(llama, "linear", **changes)).eval()
    seen = []
    network.insert.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(_image())
        # Convolutions of two layouts may round apart, so the image comes in the network's own here too.
        image = _image().to(memory_format=network.memory_format)
        assert torch.equal(seen[0], to_tokens(network.embed(image)[0]))
    assert not list(network.encoder.parameters())
    assert network.decoder[0].grid == (4, 4, 2)
    assert len(network.decoder) == 1 + 2


def test_positions_tell_equal_patches_apart(llama):
    network = _build(_config(llama, "linear", insert="llm")).eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, 2, *CROP))
    assert not torch.allclose(logits[..., :4, :4, :4], logits[..., 12:, 12:, 4:])


@pytest.mark.parametrize("arm", ["none", "llm-linear"])
def test_in_bf16_plain_and_fused_attention_agree(llama, monkeypatch, arm):
    network = _open(_build(_config(llama, "skip", **ARMS[arm]))).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = network(_image()).float()
        monkeypatch.setattr(vit, "plain_is_faster", lambda tokens: False)
        fused = network(_image()).float()
    torch.testing.assert_close(plain, fused, atol=0.03 * plain.std(), rtol=0.03)
    assert not torch.equal(plain, fused), "both ways must have been gone"


def test_attention_weights_sum_to_one_on_both_paths():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 30, 8, generator=generator).bfloat16() for _ in range(2))
    ones = torch.ones(1, 2, 30, 8)
    for dtype in (torch.bfloat16, torch.float32):
        mixed = vit.attend(query.to(dtype), key.to(dtype), ones.to(dtype)).float()
        torch.testing.assert_close(mixed, ones, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 4}, "insert_after=8 is not from 0 to depth=4"),
        ({"mapper": "lora+linear"}, "known: linear, "),
    ],
)
def test_medvisionllama_refuses_what_would_be_another_network(llama, options, said):
    with pytest.raises(ValueError, match=said):
        MedVisionLlama(image_size=CROP, block=FrozenBlock.from_pretrained(llama), patch_size=4, **options)


def test_medvisionllama_is_the_factorys_published_network(llama):
    block = FrozenBlock.from_pretrained(llama)
    sizes = {"depth": 2, "insert_after": 1, "patch_size": 4, "width": 24, "num_heads": 2}
    model = MedVisionLlama(image_size=CROP, num_channels=2, num_outputs=3, block=block, **sizes)
    config = _config(llama, "linear", insert="llm", mapper="linear+lora", dropout=0.2)
    network = _build(config)
    network.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert model.eval()(_image()).shape == (2, 3, *CROP)
        assert torch.equal(model(_image()), network.eval()(_image()))


def test_medvisionllamas_own_block_has_lora_as_published(llama, monkeypatch):
    made = FrozenBlock.from_pretrained
    # The catalogue's, in a small one's place.
    monkeypatch.setattr(FrozenBlock, "from_pretrained", lambda **options: made(llama, **options))
    model = MedVisionLlama(image_size=CROP, patch_size=4, depth=2, insert_after=1, mapper_rank=3)
    ranks = {min(weight.shape) for name, weight in trainable(model).items() if "insert.block." in name}
    assert ranks == {3}
    assert load_config("paper").network.block.lora_rank == load_config("paper").network.mapper_rank


def test_no_weight_of_a_control_changes_where_another_block_is_refused(llama):
    sizes = {"depth": 2, "insert_after": 1, "patch_size": 4, "width": 24, "num_heads": 2}
    torch.manual_seed(1)
    trained = MedVisionLlama(image_size=CROP, block=FrozenBlock.from_pretrained(llama), **sizes)
    control = MedVisionLlama(
        image_size=CROP, block=FrozenBlock.from_pretrained(llama, weights="random"), **sizes
    )
    before = {name: value.clone() for name, value in control.state_dict().items()}
    with pytest.raises(BlockError, match="hold another frozen block"):
        control.load_state_dict(trained.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in control.state_dict().items())


def test_medvisionllama_refuses_an_image_of_another_size(llama):
    sizes = {"depth": 2, "insert_after": 1, "patch_size": 4, "width": 24, "num_heads": 2}
    model = MedVisionLlama(image_size=(8, 12, 16), block=FrozenBlock.from_pretrained(llama), **sizes)
    assert model.eval()(torch.zeros(1, 1, 8, 12, 16)).shape == (1, 1, 8, 12, 16)
    # As many tokens, in another order; and more than the patches take.
    for shape in ((16, 12, 8), (9, 12, 16)):
        with pytest.raises(ValueError, match=r"the network needs \[b, c, 8, 12, 16\]"):
            model(torch.zeros(1, 1, *shape))


@pytest.mark.parametrize("size", [(30, 32, 32), (32, 32, 4)])
def test_medvisionllama_refuses_an_image_size_that_patches_do_not_tile(llama, size):
    with pytest.raises(ValueError, match=r"image_size=.* is not a multiple of patch_size=8"):
        MedVisionLlama(image_size=size, block=FrozenBlock.from_pretrained(llama))
