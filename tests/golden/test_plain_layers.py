"""The layers written out in `plain_layers` against transformers' whole models, so that they can judge the block."""

import pytest
import torch

from golden.plain_layers import native_angles, native_mask, plain_layer, plain_norm
from tiny_models import SETTINGS, base, layer_weights, norm_weights, save_tiny_model

NUM_TOKENS = 24  # three windows of eight


@pytest.mark.parametrize("name", SETTINGS)
def test_layer_by_layer_the_plain_equations_follow_the_language_model(tmp_path, name):
    model, config = save_tiny_model(tmp_path, name), SETTINGS[name]
    words = torch.randint(3, 64, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = base(model)(words, output_hidden_states=True)
    states = output.hidden_states
    for layer in range(3):
        cos, sin = native_angles(config, NUM_TOKENS, layer=layer)
        plain = plain_layer(
            config["model_type"],
            layer_weights(tmp_path, name, layer),
            config,
            states[layer],
            layer=layer,
            cos=cos,
            sin=sin,
            mask=native_mask(config, NUM_TOKENS, layer=layer),
        )
        if layer == 2:  # transformers reports the last layer's output after the norm
            plain = plain_norm(config["model_type"], norm_weights(tmp_path, name), config, plain)
            torch.testing.assert_close(plain, output.last_hidden_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(plain, states[layer + 1], atol=1e-5, rtol=0, msg=f"{name} layer {layer}")


def test_every_tensor_of_a_layer_takes_part(tmp_path):
    """A tensor that the equations do not read would pass every comparison above."""
    for name, config in SETTINGS.items():
        save_tiny_model(tmp_path / name, name)
        for layer in (0, 1):
            weights = {
                key: value.requires_grad_()
                for key, value in layer_weights(tmp_path / name, name, layer).items()
            }
            cos, sin = native_angles(config, 9, layer=layer)
            tokens = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
            output = plain_layer(config["model_type"], weights, config, tokens, layer=layer, cos=cos, sin=sin)
            torch.autograd.grad(output.square().sum(), list(weights.values()))


@pytest.mark.parametrize("name", ["llama31", "mistral", "qwen2", "gemma2", "gemma3", "phi3", "modernbert"])
def test_windows_scaling_and_positions_matter_in_these_models(tmp_path, name):
    """A comparison in which the window or the angles made no difference would say nothing about them."""
    save_tiny_model(tmp_path, name)
    config, layer = SETTINGS[name], 1 if name in {"qwen2", "modernbert"} else 0
    weights, tokens = layer_weights(tmp_path, name, layer), torch.randn(1, NUM_TOKENS, 32)
    cos, sin = native_angles(config, NUM_TOKENS, layer=layer)
    mask = native_mask(config, NUM_TOKENS, layer=layer)

    def run(**native):
        with torch.no_grad():
            return plain_layer(config["model_type"], weights, config, tokens, layer=layer, **native)

    native = run(cos=cos, sin=sin, mask=mask)
    assert not torch.allclose(native, run(mask=mask), atol=1e-2)
    assert not torch.allclose(native, run(cos=cos, sin=sin), atol=1e-2)
    if name == "llama31":
        plain = native_angles(config | {"rope_scaling": None}, NUM_TOKENS, layer=layer)
        assert not torch.allclose(native, run(cos=plain[0], sin=plain[1], mask=mask), atol=1e-2)
    else:
        causal = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
        assert not torch.equal(mask, causal)
