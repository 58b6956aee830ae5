"""The attention that `explain` shows is the attention that the layers compute."""

import pytest
import torch

from medvisionllama.llm import FrozenBlock, attention
from medvisionllama.llm.attention_weights import attention_received, attention_weights, watching
from medvisionllama.llm.rotary import grid_positions
from tiny_llama import save_tiny_llama
from tiny_models import SETTINGS, save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = {
    "bare": {},
    "rotary": {"rotary": True},
    "causal": {"causal": True},
    "rotary and causal": {"rotary": True, "causal": True},
    "rotary along the axes": {"rotary": "3d"},
}


def tokens_of(width, number=24):
    return torch.randn(2, number, width, generator=torch.Generator().manual_seed(1))


def seen_in(block, tokens, **places):
    """What the block's layers attend with."""
    seen = []
    with torch.no_grad(), watching(lambda module, attending: seen.append((module, attending))):
        block(tokens, **places)
    return seen


def weights_of(attending):
    """Shares by head `[b, heads, n, n]`."""
    shares = attention_weights(
        attending.query, attending.key, attending.mask, scaling=attending.scaling, softcap=attending.softcap
    )
    batch, heads, length, _ = attending.query.shape
    return shares.reshape(batch, heads, length, length)


@pytest.mark.parametrize("mode", MODES)
def test_attention_times_values_is_what_a_llama_layer_projects(tmp_path, mode):
    save_tiny_llama(tmp_path)
    block = FrozenBlock.from_pretrained(tmp_path, **MODES[mode])
    places = {"positions": grid_positions((2, 3, 4))} if mode == "rotary along the axes" else {}
    mixed = []
    handle = block.layers[-1].self_attn.o_proj.register_forward_pre_hook(
        lambda _module, inputs: mixed.append(inputs[0])
    )
    [(_, attending)] = seen_in(block, tokens_of(block.width), **places)
    handle.remove()
    values = attending.value.repeat_interleave(attending.query.shape[1] // attending.value.shape[1], dim=1)
    expected = (weights_of(attending) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(expected, mixed[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_received_attention_is_that_of_transformers_own_matrix(tmp_path, layer):
    model = save_tiny_llama(tmp_path)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_attentions=True)
    block = FrozenBlock.from_pretrained(tmp_path, layers=(layer,), rotary=True, causal=True)
    [(_, attending)] = seen_in(block, output.hidden_states[layer])
    matrix = output.attentions[layer].mean(dim=1)
    # Row i of a causal matrix shares itself among i + 1 tokens.
    even = torch.tensor([sum(1 / (row + 1) for row in range(column, 11)) for column in range(11)])
    torch.testing.assert_close(attention_received(attending), matrix.sum(dim=1) / even, atol=1e-5, rtol=1e-5)


def test_a_prompt_takes_its_share_and_is_not_in_the_result(tmp_path):
    save_tiny_llama(tmp_path)
    block = FrozenBlock.from_pretrained(tmp_path)
    [(_, attending)] = seen_in(block, tokens_of(block.width, 9))
    received = attention_received(attending, num_before=4)
    expected = weights_of(attending).mean(dim=1)[:, 4:, 4:].mean(dim=1) * 9
    torch.testing.assert_close(received, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("native", [False, True], ids=["bare", "native"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_family_shows_its_attention(tmp_path, name, native):
    save_tiny_model(tmp_path, name)
    block = FrozenBlock.from_pretrained(tmp_path, layers=(0, 1, 2), rotary=native, causal=native)
    seen = seen_in(block, tokens_of(block.width))
    assert [
        next(number for number, layer in enumerate(block.layers) if module in set(layer.modules()))
        for module, _ in seen
    ] == [0, 1, 2]
    for _, attending in seen:
        received = attention_received(attending)
        assert received.shape == (2, 24)
        if attending.mask is None:
            torch.testing.assert_close(received.mean(dim=1), torch.ones(2))
        # Equal queries and keys attend evenly, whatever the mask.
        flat = type(attending)(
            torch.zeros_like(attending.query), attending.key, attending.value, attending.mask, 1.0
        )
        torch.testing.assert_close(attention_received(flat), torch.ones(2, 24))


def test_nobody_looks_when_the_context_has_ended(tmp_path):
    save_tiny_llama(tmp_path)
    block = FrozenBlock.from_pretrained(tmp_path)
    seen = []
    with pytest.raises(RuntimeError), watching(lambda *what: seen.append(what)):
        raise RuntimeError
    block(tokens_of(block.width))
    assert not seen


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_attend_as_shared_ones_do(masked):
    query, key, value = (torch.randn(2, heads, 9, 8) for heads in (6, 2, 2))
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    found = [
        attention.frozen_attention(torch.nn.Identity(), query, *pair, mask, scaling=0.3, is_causal=False)[0]
        for pair in ((key, value), (attention._repeated(key, 6), attention._repeated(value, 6)))
    ]
    torch.testing.assert_close(*found)
