"""The steps of docs/adding-a-family.md, followed for a family that is not in the table."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from medvisionllama.errors import BlockError
from medvisionllama.llm import FrozenBlock, families

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = Olmo2ForCausalLM(Olmo2Config(**settings, **heads, initializer_range=0.1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    return model


def _row():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return eval(code, {"Family": families.Family, "Norm": families.Norm})


def test_the_pages_row_makes_its_familys_block_equal_to_the_whole_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, _row()))
    tokens = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        output = FrozenBlock.from_pretrained(tmp_path, rotary=True, causal=True)(states[-2])
    torch.testing.assert_close(output, states[-1], atol=1e-5, rtol=1e-5)


def test_the_short_form_that_the_page_names_is_the_same_row_with_more_names_of_tensors():
    short, row = families._decoder("olmo2", "Olmo2"), _row()
    names = ("layer_prefixes", "norm_prefixes", "embedding_names")
    assert replace(short, **{name: getattr(row, name) for name in names}) == row
    for name in names:
        known = getattr(short, name)
        # In the page's order, with those beside an encoder of images between them.
        assert (known[0], known[-1]) == getattr(row, name)


def test_without_the_row_the_family_is_refused(model, tmp_path):
    with pytest.raises(BlockError, match="'olmo2' is not supported"):
        FrozenBlock.from_pretrained(tmp_path)
