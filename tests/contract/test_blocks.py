"""What the frozen block promises, whatever family of language models its layers come from."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from medvisionllama.checkpoint import trainable
from medvisionllama.errors import BlockError
from medvisionllama.llm import FrozenBlock, feed_forward
from tiny_models import (
    FAMILIES,
    PREFIXES,
    SETTINGS,
    base,
    fresh_model,
    layer_weights,
    norm_weights,
    save_tiny_model,
    tiny_config,
)

every_model = pytest.mark.parametrize("name", SETTINGS)
every_family = pytest.mark.parametrize("name", FAMILIES)
both_modes = pytest.mark.parametrize("native", [False, True], ids=["bare", "native"])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of each tiny model, written once; no test changes what is in it."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            save_tiny_model(folders[name], name)
        return folders[name]

    return get


@pytest.fixture
def changed(saved, tmp_path):
    """Write a copy of a model's checkpoint whose tensors or config.json a function has changed."""

    def write(name, *, tensors=lambda tensors: tensors, settings=lambda settings: settings):
        written = json.loads((saved(name) / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings(written)))
        original = load_file(saved(name) / "model.safetensors")
        save_file(tensors(original), tmp_path / "model.safetensors")
        return tmp_path

    return write


def _tokens(batch=2, number=24, seed=1):
    return torch.randn(batch, number, 32, generator=torch.Generator().manual_seed(seed))


def _block(folder, *, native=False, **options):
    return FrozenBlock.from_pretrained(folder, rotary=native, causal=native, **options)


def _output(block, tokens=None):
    with torch.no_grad():
        return block(_tokens() if tokens is None else tokens)


def _state(block):
    return {key: value.clone() for key, value in block.state_dict().items()}


def _learn(block, steps=2):
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (block(_tokens(seed=step)) * _tokens(seed=9)).mean().backward()
        optimizer.step()


def _one_line(refusal):
    assert "\n" not in str(refusal.value)


# --- Tokens in, tokens out ---


@every_family
@both_modes
def test_the_block_keeps_shape_and_dtype(saved, name, native):
    for dtype in (torch.float32, torch.float64):
        block = _block(saved(name), native=native, dtype=dtype)
        for shape in ((1, 1, 32), (3, 17, 32)):
            output = _output(block, torch.zeros(shape, dtype=dtype))
            assert output.shape == shape
            assert output.dtype == dtype


@every_family
@both_modes
def test_one_scan_of_a_batch_does_not_touch_another(saved, name, native):
    block, tokens = _block(saved(name), layers=(0, 1, 2), native=native), _tokens(batch=3)
    together = _output(block, tokens)
    apart = torch.cat([_output(block, tokens[case : case + 1]) for case in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


@every_model
@both_modes
def test_nothing_is_dropped_even_while_training(saved, name, native):
    """Every dropout of the tiny models is 0.1."""
    block = _block(saved(name), layers=(0, 1, 2), native=native)
    evaluated = _output(block.eval())
    block.train()
    assert torch.equal(_output(block), evaluated)
    assert torch.equal(block(_tokens().requires_grad_()), evaluated)


@every_model
def test_bare_the_block_knows_no_order(saved, name):
    block, tokens = _block(saved(name), layers=(0, 1, 2)), _tokens()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        _output(block, tokens[:, order]), _output(block, tokens)[:, order], atol=1e-5, rtol=0
    )


@every_model
def test_native_the_block_knows_order_unless_it_is_bert(saved, name):
    block, tokens = _block(saved(name), layers=(0, 1, 2), native=True), _tokens()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    same = torch.allclose(_output(block, tokens[:, order]), _output(block, tokens)[:, order], atol=1e-3)
    assert same == (name in {"bert", "roberta"})


@every_model
@pytest.mark.parametrize("causal", [False, True])
def test_only_a_causal_decoder_hides_what_comes_later(saved, name, causal):
    block = FrozenBlock.from_pretrained(saved(name), causal=causal)
    later = _tokens()
    later[:, -1] += 1
    before, after = _output(block)[:, 0], _output(block, later)[:, 0]
    encoders = {"gemma3-encoder", "bert", "roberta", "modernbert", "modernbert-biases"}
    assert torch.equal(before, after) == (causal and name not in encoders)


@pytest.mark.parametrize(("name", "native"), [("llama", False), *((name, True) for name in FAMILIES)])
def test_compiled_in_one_graph_the_block_gives_the_same(saved, name, native):
    block = _block(saved(name), layers=(1,), native=native)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    outputs, gradients = [], []
    for run in (compiled, block):
        tokens = _tokens().requires_grad_()
        outputs.append(run(tokens))
        gradients.append(torch.autograd.grad((outputs[-1] * _tokens(seed=9)).sum(), tokens)[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


@every_model
@both_modes
def test_forwards_and_backwards_leave_the_block_as_it_was(saved, name, native):
    block = _block(saved(name), native=native)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    before, state, output = block.sha256(), _state(block), _output(block)
    for number in (5, 24, 40):  # one kind of rotary angles depends on the longest sequence seen
        block.train()
        block(_tokens(number=number).requires_grad_()).sum().backward()
    assert block.sha256() == before
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    assert torch.equal(_output(block), output)


@every_family
def test_a_long_sequence_in_pieces_gives_the_same(saved, name, monkeypatch):
    outputs, gradients, sizes = [], [], []
    for numbers in (1 << 22, 32 * 10):  # of 48 tokens, five pieces
        monkeypatch.setattr(feed_forward, "_PIECE", numbers)
        block = _block(saved(name), layers=(0, 1), native=True, lora_rank=2)
        seen = []
        for module in block.layers.modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_pre_hook(lambda _, given, to=seen: to.append(given[0].numel() // 32))
        tokens = _tokens().requires_grad_()
        outputs.append(block(tokens))
        gradients.append(torch.autograd.grad((outputs[-1] * _tokens(seed=9)).sum(), tokens)[0])
        sizes.append(seen)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)
    assert 8 not in sizes[0]
    assert (8 in sizes[1]) == (
        name not in {"opt", "biogpt", "bert", "roberta"}
    )  # the fifth piece has eight tokens


@every_family
def test_gradient_checkpointing_changes_neither_output_nor_gradient(saved, name):
    outputs, gradients = [], []
    for checkpointing in (False, True):
        block = _block(saved(name), layers=(0, 1), native=True, gradient_checkpointing=checkpointing).train()
        tokens = _tokens().requires_grad_()
        outputs.append(block(tokens))
        gradients.append(torch.autograd.grad((outputs[-1] * _tokens(seed=9)).sum(), tokens)[0])
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


# --- Where the tensors come from ---


@every_family
def test_shards_give_the_block_of_the_single_file(saved, tmp_path, name):
    save_tiny_model(tmp_path, name, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert _block(tmp_path).sha256() == _block(saved(name)).sha256()


@every_family
def test_layers_are_counted_from_either_end(saved, name):
    last, same, first = (_block(saved(name), layers=(layer,)) for layer in (-1, 2, 0))
    assert last.sha256() == same.sha256() != first.sha256()
    assert torch.equal(_output(last), _output(same))
    for layers in ((3,), (-4,), (0, 5), ()):
        with pytest.raises(BlockError, match="layer") as refusal:
            _block(saved(name), layers=layers)
        _one_line(refusal)


@every_family
def test_layers_stand_in_the_order_they_were_asked_for(saved, name):
    block = _block(saved(name), layers=(2, 0), final_norm=False)
    second, first = (_block(saved(name), layers=(layer,), final_norm=False) for layer in (0, 2))
    torch.testing.assert_close(_output(block), _output(second, _output(first)), atol=1e-6, rtol=0)


@every_model
def test_every_tensor_of_the_layer_is_in_the_block(saved, name):
    block = _block(saved(name), layers=(1,))
    stored = {key: value for key, value in block.frozen_tensors().items() if key.startswith("layers.0.")}
    wanted = {f"layers.0.{key}": value for key, value in layer_weights(saved(name), name, 1).items()}
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[key], wanted[key]) for key in wanted)
    assert len(block.frozen_tensors()) == len(wanted) + len(norm_weights(saved(name), name))


@every_family
def test_a_missing_tensor_is_refused(saved, changed, name):
    prefix, norm = PREFIXES[SETTINGS[name]["model_type"]]
    prefix = prefix.format(2)
    for key in layer_weights(saved(name), name, 2):
        folder = changed(
            name, tensors=lambda all_, key=key: {k: v for k, v in all_.items() if k != prefix + key}
        )
        with pytest.raises(BlockError, match=key.replace(".", r"\.")) as refusal:
            _block(folder)
        _one_line(refusal)
    if norm_weights(saved(name), name):
        folder = changed(name, tensors=lambda all_: {k: v for k, v in all_.items() if not k.startswith(norm)})
        with pytest.raises(BlockError) as refusal:
            _block(folder)
        _one_line(refusal)


@every_family
def test_a_tensor_of_the_wrong_shape_is_refused(saved, changed, name):
    prefix = PREFIXES[SETTINGS[name]["model_type"]][0].format(2)
    for key in layer_weights(saved(name), name, 2):
        folder = changed(
            name, tensors=lambda all_, key=prefix + key: all_ | {key: all_[key][..., :-1].contiguous()}
        )
        with pytest.raises(BlockError, match=key.replace(".", r"\.")) as refusal:
            _block(folder)
        _one_line(refusal)


@every_model
def test_the_config_json_that_publishers_wrote_gives_the_same_block(saved, changed, name):
    """This transformers writes newer names than the config.json of most checkpoints holds."""
    extras = {
        "architectures": ["X"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0",
        "_name_or_path": "",
    }
    folder = changed(name, settings=lambda _: SETTINGS[name] | extras)
    blocks = [_block(folder, layers=(0, 1, 2), native=True) for folder in (saved(name), folder)]
    assert torch.equal(_output(blocks[0]), _output(blocks[1]))


@every_model
def test_a_checkpoint_of_the_model_without_its_head_gives_the_same_block(saved, tmp_path, name):
    """As gpt2's and ModernBERT's are on the Hub: names without the prefix of the model with a head."""
    base(save_tiny_model(tmp_path / "head", name)).save_pretrained(tmp_path / "bare")
    assert _block(tmp_path / "bare").sha256() == _block(saved(name)).sha256()


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_norms_called_gamma_and_beta_give_the_same_block(saved, changed, name):
    """As in the checkpoint of bert-base-uncased."""

    def rename(key):
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    folder = changed(name, tensors=lambda tensors: {rename(key): value for key, value in tensors.items()})
    assert _block(folder).sha256() == _block(saved(name)).sha256()


def test_gpt2s_stored_masks_are_not_tensors_of_the_block(saved, changed):
    """The Hub's gpt2 still keeps the causal mask of each layer as `attn.bias`."""
    mask = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(3)}
    assert (
        _block(changed("gpt2", tensors=lambda all_: all_ | mask)).sha256() == _block(saved("gpt2")).sha256()
    )


@every_family
def test_a_bfloat16_checkpoint_is_read_as_asked(changed, name):
    folder = changed(name, tensors=lambda all_: {key: value.bfloat16() for key, value in all_.items()})
    block, half = _block(folder, dtype=torch.float32), _block(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in block.frozen_tensors().values()} == {torch.float32}
    assert {value.dtype for value in half.frozen_tensors().values()} == {torch.bfloat16}
    exact = layer_weights(folder, name, 2)
    for stored in (block.frozen_tensors(), half.frozen_tensors()):
        assert all(torch.equal(stored[f"layers.0.{key}"].bfloat16(), value) for key, value in exact.items())


# --- Low-rank updates ---


@every_model
def test_a_low_rank_update_starts_at_nothing_and_then_learns(saved, name):
    plain, block = _block(saved(name)), _block(saved(name), lora_rank=2)
    trainable = {key for key, parameter in block.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in key for key in trainable)
    assert torch.equal(_output(plain), _output(block))
    assert block.sha256() == plain.sha256()
    _learn(block.train())
    assert block.sha256() == plain.sha256()
    assert not torch.allclose(_output(plain), _output(block), atol=1e-6)


@every_family
@pytest.mark.parametrize("targets", [("lm_head",), ("input_layernorm",), ("q_proj_", "k")])
def test_a_low_rank_update_of_what_the_family_lacks_is_refused(saved, name, targets):
    with pytest.raises(BlockError, match="LoRA") as refusal:
        _block(saved(name), lora_rank=2, lora_targets=targets)
    _one_line(refusal)


# --- Controls: what stands in for the pretrained tensors ---

every_control = pytest.mark.parametrize("weights", ["random", "moment_matched", "permuted"])


@every_family
@every_control
def test_a_control_is_the_same_module_with_other_tensors(saved, name, weights):
    pretrained = _block(saved(name), layers=(0, 1))
    control, again, other = (
        _block(saved(name), layers=(0, 1), weights=weights, seed=seed) for seed in (0, 0, 1)
    )
    assert type(control) is type(pretrained)
    shapes = {key: value.shape for key, value in pretrained.state_dict().items()}
    assert {key: value.shape for key, value in control.state_dict().items()} == shapes
    assert [type(module) for module in control.modules()] == [type(m) for m in pretrained.modules()]
    assert control.sha256() == again.sha256()
    assert len({control.sha256(), other.sha256(), pretrained.sha256()}) == 3
    assert not torch.allclose(_output(control), _output(pretrained), atol=1e-3)
    assert not any(parameter.requires_grad for parameter in control.parameters())
    matrices = [key for key, value in control.frozen_tensors().items() if value.ndim > 1]
    assert not torch.equal(control.frozen_tensors()[matrices[0]], other.frozen_tensors()[matrices[0]])


@every_model
def test_moment_matched_tensors_keep_mean_and_spread_and_nothing_else(saved, name):
    pretrained = _block(saved(name), layers=(0, 2)).frozen_tensors()
    control = _block(saved(name), layers=(0, 2), weights="moment_matched").frozen_tensors()
    for key, original in pretrained.items():
        drawn, spread = control[key].double(), original.double().std()
        assert (drawn.mean() - original.double().mean()).abs() < 1e-6 * spread + 1e-7, key
        assert (drawn.std() / spread - 1).abs() < 1e-5, key
        # Neither the values nor their order survive.
        assert not torch.allclose(drawn.flatten().sort().values, original.double().flatten().sort().values)
        if original.numel() >= 1024:
            together = torch.stack([drawn.flatten(), original.double().flatten()])
            assert torch.corrcoef(together)[0, 1].abs() < 0.15, key


@every_model
def test_permuted_tensors_keep_their_values_and_no_order(saved, name):
    pretrained = _block(saved(name), layers=(0, 2)).frozen_tensors()
    control = _block(saved(name), layers=(0, 2), weights="permuted").frozen_tensors()
    for key, original in pretrained.items():
        assert torch.equal(control[key].flatten().sort().values, original.flatten().sort().values), key
        assert not torch.equal(control[key], original), key
        if original.ndim > 1:  # across rows and columns, not rows as a whole
            assert (control[key].sort(-1).values != original.sort(-1).values).any(-1).all(), key

    def order(key):
        source, drawn = pretrained[key].flatten(), control[key].flatten()
        return source.argsort()[torch.searchsorted(source.sort().values, drawn)]

    matrix = next(key for key in pretrained if key.startswith("layers.0.") and pretrained[key].ndim > 1)
    assert not torch.equal(order(matrix), order(matrix.replace("layers.0.", "layers.1.")))


@every_model
def test_the_identity_control_returns_its_tokens(saved, name):
    for options in ({}, {"layers": (0, 1, 2), "native": True}):
        block = _block(saved(name), weights="identity", **options)
        assert torch.equal(_output(block), _tokens())
        assert not any(parameter.requires_grad for parameter in block.parameters())


@every_model
def test_random_tensors_need_no_checkpoint_and_follow_the_familys_initialiser(tmp_path, name):
    config = tiny_config(name)
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = fresh_model(config)
    layer, norm = PREFIXES[SETTINGS[name]["model_type"]]
    for position in (0, 2):
        drawn = _block(tmp_path, layers=(position,), weights="random").frozen_tensors()
        prefixes = {"layers.0.": layer.format(position), "norm.": norm}
        expected = {
            ours + key.removeprefix(theirs): value
            for ours, theirs in prefixes.items()
            for key, value in model.state_dict().items()
            if theirs and key.startswith(theirs)
        }
        assert drawn.keys() == expected.keys()
        for key, value in expected.items():
            if value.ndim == 1:
                assert torch.equal(drawn[key], value), key
                continue
            assert (drawn[key].std() / value.std() - 1).abs() < 5 / (2 * value.numel()) ** 0.5, key
            assert drawn[key].mean().abs() < 5 * value.std() / value.numel() ** 0.5, key
            # The longest tails tell a normal distribution from a truncated one.
            assert 0.7 < drawn[key].abs().max() / value.abs().max() < 1.4, key


@every_model
def test_unfrozen_the_whole_block_learns(saved, name):
    frozen, block = _block(saved(name)), _block(saved(name), frozen=False)
    assert all(parameter.requires_grad for parameter in block.parameters())
    assert torch.equal(_output(block), _output(frozen))
    before = _state(block)
    _learn(block.train())
    still = {key for key, value in block.named_parameters() if torch.equal(value, before[key])}
    # Softmax does not see what is added to every score of a token: the bias of the keys.
    assert not {key for key in still if not key.endswith(("k_proj.bias", "key.bias"))}


def test_another_frozen_block_is_not_loaded_in_a_block_s_place(saved):
    trained = FrozenBlock.from_pretrained(saved("llama"), lora_rank=2)
    with torch.no_grad():
        for weights in trainable(trained).values():
            weights.add_(0.1)
    control = FrozenBlock.from_pretrained(saved("llama"), weights="random", lora_rank=2)
    before = control.sha256()
    with pytest.raises(BlockError, match=r"hold another frozen block than .*:random"):
        control.load_state_dict(trained.state_dict())
    assert control.sha256() == before
    # Nor is what a copy has that is not trained by itself another block, as a teacher has it.
    again = FrozenBlock.from_pretrained(saved("llama"), lora_rank=2).requires_grad_(False)
    again.load_state_dict(trained.state_dict())
    assert torch.equal(_output(again), _output(trained))


def test_a_block_comes_to_another_process_whole(saved, monkeypatch):
    block = FrozenBlock.from_pretrained(saved("llama"), lora_rank=2)
    sent = pickle.dumps(block)
    monkeypatch.delitem(AttentionInterface._global_mapping, block.config._attn_implementation)
    assert torch.equal(_output(pickle.loads(sent)), _output(block))
    with pytest.raises(BlockError, match="hold another frozen block"):
        pickle.loads(sent).load_state_dict(
            {"layers.0.input_layernorm.weight": torch.zeros(block.width)}, strict=False
        )
