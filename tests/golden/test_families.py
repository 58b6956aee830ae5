"""The frozen block of every family: against transformers' whole models, and against the layers written out."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from golden.plain_layers import native_angles, native_mask, plain_layer, plain_norm
from medvisionllama.llm import FrozenBlock, attention
from tiny_models import SETTINGS, base, layer_weights, norm_weights, save_tiny_model

NUM_TOKENS = 24  # three windows of eight
every_model = pytest.mark.parametrize("name", SETTINGS)
every_mode = pytest.mark.parametrize(
    ("rotary", "causal"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["neither", "rotary", "causal", "both"],
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Build each model once: its folder, config, and what its layers hand on for some random words."""

    @cache
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        model = base(save_tiny_model(folder, name))
        words = torch.randint(3, 64, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            output = model(words, output_hidden_states=True)
        return SimpleNamespace(
            folder=folder,
            config=SETTINGS[name],
            family=SETTINGS[name]["model_type"],
            states=output.hidden_states,
            last=output.last_hidden_state,
            weights=[layer_weights(folder, name, layer) for layer in range(3)],
            norm=norm_weights(folder, name),
        )

    return build


def _tokens():
    return torch.randn(2, NUM_TOKENS, 32, generator=torch.Generator().manual_seed(1))


def _plain(model, tokens, layers, *, rotary, causal, final_norm):
    for layer in layers:
        cos, sin = native_angles(model.config, NUM_TOKENS, layer=layer)
        if not rotary and cos is not None:
            # All tokens in one place, where angles are zero; what the family multiplies products by stays.
            cos, sin = cos[:1], sin[:1]
        mask = native_mask(model.config, NUM_TOKENS, layer=layer) if causal else None
        tokens = plain_layer(
            model.family, model.weights[layer], model.config, tokens, layer=layer, cos=cos, sin=sin, mask=mask
        )
    return plain_norm(model.family, model.norm, model.config, tokens) if final_norm else tokens


@every_model
@pytest.mark.parametrize("layer", range(3))
def test_with_rotary_and_causal_a_layer_continues_the_language_model(language_model, name, layer):
    model = language_model(name)
    block = FrozenBlock.from_pretrained(
        model.folder, layers=(layer,), rotary=True, causal=True, final_norm=False
    )
    with torch.no_grad():
        output = block(model.states[layer])
    if layer == 2:  # transformers reports the last layer's output after the norm
        output = plain_norm(model.family, model.norm, model.config, output)
    torch.testing.assert_close(output, model.states[layer + 1], atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("layers", [(2,), (0, 1, 2), (-2, -1)], ids=["last", "all", "last two"])
def test_with_its_norm_the_end_of_the_stack_gives_the_last_hidden_state(language_model, name, layers):
    model = language_model(name)
    block = FrozenBlock.from_pretrained(
        model.folder, layers=layers, rotary=True, causal=True, final_norm=True
    )
    with torch.no_grad():
        output = block(model.states[layers[0]] if layers[0] >= 0 else model.states[1])
    torch.testing.assert_close(output, model.last, atol=1e-5, rtol=0)


@every_model
@every_mode
def test_the_block_and_its_gradient_are_those_of_the_equations(language_model, name, rotary, causal):
    model = language_model(name)
    block = FrozenBlock.from_pretrained(
        model.folder, layers=(0, 1, 2), rotary=rotary, causal=causal, final_norm=True
    )
    weighting = torch.randn(2, NUM_TOKENS, 32, generator=torch.Generator().manual_seed(2))
    outputs, gradients = [], []
    for run in (
        block,
        lambda tokens: _plain(model, tokens, (0, 1, 2), rotary=rotary, causal=causal, final_norm=True),
    ):
        tokens = _tokens().requires_grad_()
        outputs.append(run(tokens))
        (outputs[-1] * weighting).sum().backward()
        gradients.append(tokens.grad)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in block.parameters())


@every_model
@every_mode
@pytest.mark.parametrize("layer", range(3))
def test_each_layer_computes_the_equations_of_its_place(language_model, name, rotary, causal, layer):
    model, tokens = language_model(name), _tokens()
    block = FrozenBlock.from_pretrained(
        model.folder, layers=(layer,), rotary=rotary, causal=causal, final_norm=False
    )
    with torch.no_grad():
        output = block(tokens)
    plain = _plain(model, tokens, (layer,), rotary=rotary, causal=causal, final_norm=False)
    torch.testing.assert_close(output, plain, atol=1e-5, rtol=0)


@every_model
@every_mode
def test_plain_products_compute_what_the_fused_kernel_does(language_model, monkeypatch, name, rotary, causal):
    """Which of the two serves depends on precision and length; here both paths run in float32 on 24 tokens."""
    monkeypatch.setattr(attention, "plain_is_faster", lambda tokens: True)
    monkeypatch.setattr(attention, "_LONG", 8)  # so that scores are computed again in the backward pass
    model, layers = language_model(name), (0, 1, 2)
    block = FrozenBlock.from_pretrained(
        model.folder, layers=layers, rotary=rotary, causal=causal, final_norm=False
    )
    outputs, gradients = [], []
    for run in (
        block,
        lambda tokens: _plain(model, tokens, layers, rotary=rotary, causal=causal, final_norm=False),
    ):
        tokens = _tokens().requires_grad_()
        outputs.append(run(tokens))
        gradients.append(torch.autograd.grad(outputs[-1].square().mean(), tokens)[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-5, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@every_model
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("way", ["autocast", "bfloat16 block"])
def test_in_bfloat16_the_block_stays_close(language_model, name, native, way):
    """Eight bits a step: a few hundredths of the output's size over three layers."""
    model, tokens = language_model(name), _tokens()
    options = {"layers": (0, 1, 2), "rotary": native, "causal": native, "final_norm": True}
    with torch.no_grad():
        exact = FrozenBlock.from_pretrained(model.folder, **options)(tokens)
        if way == "autocast":
            block = FrozenBlock.from_pretrained(model.folder, **options)
            with torch.autocast("cpu", torch.bfloat16):
                output = block(tokens.bfloat16())
        else:
            output = FrozenBlock.from_pretrained(model.folder, dtype=torch.bfloat16, **options)(
                tokens.bfloat16()
            )
            assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    error = (output.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


@every_model
def test_without_rotary_all_tokens_are_in_one_place(language_model, name):
    model, places = language_model(name), torch.zeros(NUM_TOKENS, dtype=torch.long)
    without, at_origin = (
        FrozenBlock.from_pretrained(model.folder, layers=(0, 1), rotary=rotary) for rotary in (False, True)
    )
    with torch.no_grad():
        # What a family multiplies products by for a longer text is no position.
        torch.testing.assert_close(without(_tokens()), at_origin(_tokens(), positions=places))
