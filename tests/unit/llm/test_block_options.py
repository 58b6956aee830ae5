"""What the block can do beyond its language model: positions along axes, prompts, 8-bit storage, less memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from medvisionllama.config import load_config
from medvisionllama.errors import BlockError, ConfigError
from medvisionllama.llm import FrozenBlock, embed_prompt, feed_forward
from medvisionllama.llm.controls import controlled
from medvisionllama.llm.prompt import shuffled
from medvisionllama.llm.rotary import axial_angles, grid_positions, sequence_angles
from medvisionllama.networks.factory import build_insert
from medvisionllama.networks.inserts import LLMInsert
from tiny_models import SETTINGS, save_tiny_model

WORDS = ("left", "ventricle", "in", "cardiac", "MRI")
GRID = (2, 3, 4)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tokenizer of five words and single letters."""
    save_tiny_model(tmp_path / "llama", "llama")
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = {word: number for number, word in enumerate([*WORDS, *letters])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="in", max_input_chars_per_word=100))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    return tmp_path / "llama"


def _tokens(number=24):
    return torch.randn(2, number, 32, generator=torch.Generator().manual_seed(1))


def _change(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors")


def _insert(folder, **settings):
    overrides = {"network.block.source": str(folder), "network.width": 8, "network.num_heads": 2}
    overrides |= {f"network.block.{name}": value for name, value in settings.items()}
    torch.manual_seed(0)
    config = load_config("small", {**overrides, "network.gate": "none"})
    return build_insert(config.network, grid=GRID)


# Options that exclude each other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_targets": ("q_proj",)}, "lora_targets=.* without lora_rank"),
        ({"lora_rank": 4, "weights": "identity"}, "no layer for LoRA"),
        ({"lora_rank": -1}, "negative"),
        ({"lora_rank": 4, "frozen": False}, "needs no LoRA"),
        ({"storage": "int8", "frozen": False}, "cannot be trained"),
    ],
)
def test_options_that_would_do_nothing_are_refused(folder, options, said):
    with pytest.raises(BlockError, match=said):
        FrozenBlock.from_pretrained(folder, **options)


# Controls


def test_a_control_is_the_same_on_any_number_of_threads():
    # Large enough that PyTorch adds it up in parts.
    values = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)) + 0.1
    number, made = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(controlled(values, "moment_matched", seed=0, name="x"))
    torch.set_num_threads(number)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert float(made[0].mean()) == pytest.approx(float(values.mean()), abs=1e-6)


# Positions along three axes


def test_on_the_diagonal_the_three_axes_turn_as_one_sequence_does(folder):
    rotary = FrozenBlock.from_pretrained(folder, rotary=True).rotary
    line, like = torch.arange(5), torch.zeros(1)
    diagonal = line[:, None].expand(-1, 3)
    for ours, theirs in zip(
        axial_angles(rotary, diagonal, like, None), sequence_angles(rotary, line, like, None), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_each_axis_turns_its_own_third_of_the_frequencies(folder):
    rotary = FrozenBlock.from_pretrained(folder, rotary=True).rotary
    turned = []
    for axis in range(3):
        place = torch.zeros(1, 3, dtype=torch.long)
        place[0, axis] = 1
        turned.append(axial_angles(rotary, place, torch.zeros(1), None)[1][0, 0] != 0)
    assert torch.equal(sum(t.int() for t in turned), torch.ones(8, dtype=torch.int32))
    assert [int(t.sum()) for t in turned] == [4, 2, 2]  # four frequencies, each twice: x takes two


def test_grid_positions_follow_the_tokens_order_after_the_words():
    places = grid_positions(GRID, num_before=2)
    assert places.shape == (2 + 24, 3)
    assert places[:3].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert places[-1].tolist() == [3, 4, 5]
    assert places[3].tolist() == [2, 2, 3]  # z is the fastest


def test_positions_along_axes_change_the_output_and_must_be_told(folder):
    block = FrozenBlock.from_pretrained(folder, rotary="3d")
    plain = FrozenBlock.from_pretrained(folder, rotary=True)
    told = block(_tokens(), positions=grid_positions(GRID))
    assert not torch.allclose(told, plain(_tokens()), atol=1e-3)
    shifted = block(_tokens(), positions=grid_positions(GRID) + 5)
    torch.testing.assert_close(told, shifted, atol=1e-4, rtol=1e-4)  # only distances matter
    with pytest.raises(ValueError, match="needs"):
        block(_tokens())


def test_the_network_tells_the_block_where_its_tokens_lie(folder):
    insert = _insert(folder, rotary="3d")
    assert torch.equal(insert.positions, grid_positions(GRID))
    assert "positions" not in insert.state_dict()
    assert _insert(folder, rotary=True).positions is None


# Prompts


def test_a_prompt_is_the_embedding_rows_of_its_tokens(folder):
    rows = embed_prompt(str(folder), "left ventricle")
    embedding = save_tiny_model(folder.parent / "again", "llama").get_input_embeddings().weight
    torch.testing.assert_close(rows, embedding[:2].detach())


def test_the_controls_keep_the_number_of_tokens_and_lose_the_meaning(folder):
    text = " ".join(WORDS)
    rows = {
        control: embed_prompt(str(folder), text, control=control)
        for control in ("text", "shuffled", "random")
    }
    assert {len(r) for r in rows.values()} == {len(WORDS)}
    assert not torch.allclose(rows["shuffled"], rows["text"])
    assert not torch.allclose(rows["random"], rows["text"])
    torch.testing.assert_close(rows["random"].std(), rows["text"].std())
    assert torch.equal(rows["random"], embed_prompt(str(folder), text, control="random"))
    assert not torch.equal(rows["random"], embed_prompt(str(folder), text, control="random", seed=1))


def test_shuffling_keeps_letters_and_blanks():
    text = "left ventricle"
    assert sorted(shuffled(text, seed=0)) == sorted(text)
    assert shuffled(text, seed=0)[4] == " "
    assert shuffled(text, seed=0) != text


@pytest.mark.parametrize("seed", range(6))
def test_a_short_prompt_is_shuffled_into_another(folder, seed):
    text, nonsense = (
        embed_prompt(folder, "MRI", control=control, seed=seed) for control in ("text", "shuffled")
    )
    assert text.shape == nonsense.shape
    assert not torch.equal(text, nonsense)


@pytest.mark.parametrize("text", ["a", "bb"])
def test_letters_that_have_one_order_alone_are_refused(folder, text):
    with pytest.raises(BlockError, match="prompt_control=random"):
        embed_prompt(folder, text, control="shuffled")


def test_a_prompt_without_a_token_is_refused(folder):
    with pytest.raises(BlockError, match="has no token"):
        embed_prompt(str(folder), "  ")


def test_a_prompt_reaches_the_visual_tokens_and_is_dropped_after_the_block(folder):
    tokens = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))
    without, with_text, nonsense = (
        _insert(folder, **settings)(tokens)
        for settings in (
            {},
            {"prompt": "left ventricle"},
            {"prompt": "left ventricle", "prompt_control": "shuffled"},
        )
    )
    assert without.shape == with_text.shape == tokens.shape
    assert not torch.allclose(without, with_text, atol=1e-5)
    assert not torch.allclose(nonsense, with_text, atol=1e-5)


def test_a_prompt_is_frozen(folder):
    insert = _insert(folder, prompt="left ventricle", rotary="3d")
    assert not insert.prompt.requires_grad
    assert insert.positions.shape == (2 + 24, 3)


# Less memory


def test_int8_storage_is_close_takes_a_quarter_and_passes_gradients_to_the_input(folder):
    full, small = FrozenBlock.from_pretrained(folder), FrozenBlock.from_pretrained(folder, storage="int8")
    assert {t.dtype for n, t in small.frozen_tensors().items() if n.endswith("proj.weight")} == {torch.int8}
    outputs, gradients = [], []
    for block in (full, small):
        x = _tokens().requires_grad_()
        y = block(x)
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    for exact, near in (outputs, gradients):
        assert 0 < (exact - near).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_a_block_kept_in_bfloat16_takes_tokens_of_any_precision(folder, storage):
    exact = FrozenBlock.from_pretrained(folder)
    block = FrozenBlock.from_pretrained(folder, dtype=torch.bfloat16, storage=storage)
    assert block(_tokens()).dtype == torch.float32
    assert torch.equal(block(_tokens()), block(_tokens().bfloat16()).float())
    assert (block(_tokens()) - exact(_tokens())).norm() / exact(_tokens()).norm() < 0.05


def test_kept_in_bfloat16_the_block_is_the_same_under_autocast(folder):
    """Matrices are converted anyway; this layer's norms have weights that bfloat16 holds."""
    for norm in (name for name in load_file(folder / "model.safetensors") if "norm" in name):
        _change(folder, norm, lambda value: value.bfloat16().float())
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(FrozenBlock.from_pretrained(folder, dtype=dtype)(_tokens()))
    assert torch.equal(*outputs)


def test_the_setting_reaches_the_block(folder):
    block = _insert(folder, dtype="bfloat16").block
    assert {value.dtype for value in block.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("dtype", "num_pieces"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_weights_that_autocast_converts_are_converted_once(folder, monkeypatch, dtype, num_pieces):
    monkeypatch.setattr(feed_forward, "_PIECE", 32 * 16)
    block, calls = FrozenBlock.from_pretrained(folder, dtype=dtype), []
    block.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        block(_tokens())  # 48 tokens
    assert len(calls) == num_pieces


def test_lora_trains_on_top_of_int8_storage(folder):
    block = FrozenBlock.from_pretrained(folder, storage="int8", lora_rank=2)
    before = block.sha256()
    block(_tokens()).sum().backward()
    updates = [p for n, p in block.named_parameters() if ".lora_B" in n]
    assert updates
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in updates)
    assert block.sha256() == before


def test_gradient_checkpointing_changes_nothing_but_what_is_kept(folder):
    results = []
    for keeps in (True, False):
        block = FrozenBlock.from_pretrained(
            folder, layers=(0, 1, 2), gradient_checkpointing=not keeps
        ).train()
        x, saved = _tokens().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, to=saved: to.append(t.numel()) or t, lambda t: t
        ):
            y = block(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, sum(saved)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[1][2] < results[0][2] / 2


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"storage": "int8"}])
def test_an_unfrozen_block_excludes_what_needs_a_frozen_one(folder, settings):
    with pytest.raises(BlockError, match="not both"):
        FrozenBlock.from_pretrained(folder, frozen=False, **settings)
    with pytest.raises(ConfigError, match="frozen"):
        load_config("small", {f"network.block.{n}": v for n, v in {"frozen": False, **settings}.items()})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rotary": "3D"}, "rotary='3D' is not known"),
        ({"rotary": 1}, "rotary=1 is not known"),
        ({"storage": "int4"}, "storage='int4' is not known"),
        ({"weights": "shuffled"}, "weights='shuffled' is not known"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' cannot"),
        ({"dtype": torch.int8}, "cannot hold a block"),
        ({"layers": "-1"}, "give numbers"),
        ({"lora_rank": -1}, "is negative"),
        ({"storage": "int8", "dtype": torch.float16}, "overflow float16"),
    ],
)
def test_a_slip_of_the_pen_is_refused_and_not_another_experiment(folder, options, reason):
    with pytest.raises(BlockError, match=reason):
        FrozenBlock.from_pretrained(folder, **options)


def test_one_layer_and_one_target_need_no_list(folder):
    block = FrozenBlock.from_pretrained(folder, layers=-1, lora_rank=2, lora_targets="q_proj")
    assert {name.split(".lora_")[0] for name, p in block.named_parameters() if p.requires_grad} == {
        "layers.0.self_attn.q_proj"
    }


def test_lora_leaves_the_random_numbers_of_everything_else_alone(folder):
    drawn = []
    for rank in (0, 2):
        torch.manual_seed(0)
        FrozenBlock.from_pretrained(folder, lora_rank=rank)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    first, second, other = (
        FrozenBlock.from_pretrained(folder, lora_rank=2, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("shape", [(12, 32), (2, 12, 31), (1, 2, 12, 32)])
def test_tokens_of_another_shape_are_refused(folder, shape):
    with pytest.raises(ValueError, match=r"needs \[b, n, 32\]"):
        FrozenBlock.from_pretrained(folder)(torch.zeros(shape))


def test_a_prompt_control_that_does_not_exist_is_refused(folder):
    with pytest.raises(BlockError, match="control='nonsense' is not known"):
        embed_prompt(folder, "left ventricle", control="nonsense")


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_control": "shuffled"},
        {"prompt_control": "random", "prompt": " "},
        {"weights": "identity", "lora_rank": 2},
        {"weights": "identity", "storage": "int8"},
        {"weights": "identity", "prompt": "heart"},
        {"weights": "identity", "frozen": False},
        {"frozen": False, "dtype": "bfloat16"},
    ],
)
def test_settings_without_the_effect_they_name_are_refused(settings):
    with pytest.raises(ConfigError, match=r"network\.block"):
        load_config("small", {f"network.block.{name}": value for name, value in settings.items()})


def test_the_insert_works_around_every_family(tmp_path):
    for name in SETTINGS:
        save_tiny_model(tmp_path / name, name)
        block = FrozenBlock.from_pretrained(tmp_path / name)
        insert = LLMInsert(8, block, mapper="linear", rank=2, gated=True, seed=0, grid=GRID)
        tokens = torch.randn(1, 24, 8)
        assert torch.equal(insert(tokens), tokens)  # the gate starts at zero
