"""`medvisionllama llm`: list, show, pull."""

import json

import pytest

from medvisionllama.llm import CATALOG, CatalogEntry, FrozenBlock
from range_server import serving
from tiny_gguf import write_gguf
from tiny_hub import BLOCK_BYTES, HUB_SETTINGS, save_repositories
from tiny_llama import save_tiny_llama


@pytest.fixture
def hub(tmp_path, monkeypatch):
    save_repositories(tmp_path / "served" / "org")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("medvisionllama._http.WAITS_S", (0.0,))
    # So that what the command line sets is taken back.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        CATALOG,
        "tiny",
        CatalogEntry("tiny", "Tiny", "MIT", HUB_SETTINGS, repo="org/whole", bytes_per_parameter=4.0),
    )
    with serving(tmp_path / "served") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_the_catalogue_is_listed_with_what_is_kept(cli, hub):
    before = {row["name"]: row for row in json.loads(cli("llm", "list", "--json").out)}
    assert before["tiny"]["state"] == "can be pulled"
    assert before["llama-3.1-8b"]["state"] == "gated"
    assert before["llama-3.1-8b"]["MB/layer"] == 436.2
    cli("llm", "pull", "tiny")
    assert "cached: 3" in cli("llm", "list").out


def test_show_sets_the_block_against_the_checkpoint(cli):
    facts = json.loads(cli("llm", "show", "llama-3.1-8b", "--layers", "30:32", "--json").out)
    assert facts["layers"] == [30, 31]
    assert facts["parameters"] == 2 * 218_112_000 + 4096
    assert facts["block_bytes"] == 2 * facts["parameters"]
    assert facts["share_of_checkpoint"] == pytest.approx(0.0543, abs=1e-4)
    assert (facts["positions"], facts["mask"], facts["gated"]) == ("rotary", "causal", True)
    shown = cli("llm", "show", "biobert").out
    assert "hidden_size" in shown
    assert "none (the model adds them to its embeddings)" in shown


def test_show_reads_folders_and_gguf_files(cli, tmp_path):
    model = save_tiny_llama(tmp_path / "llama")
    write_gguf(tmp_path / "tiny.gguf", model, "llama", kind="Q8_0")
    facts = [json.loads(cli("llm", "show", tmp_path / name, "--json").out) for name in ("llama", "tiny.gguf")]
    block = FrozenBlock.from_pretrained(tmp_path / "llama")
    matrices = sum(value.numel() for value in block.frozen_tensors().values() if value.ndim == 2)
    norms = sum(value.numel() for value in block.frozen_tensors().values() if value.ndim == 1)
    assert [fact["block_bytes"] for fact in facts] == [
        4 * (matrices + norms),
        matrices // 32 * 34 + 4 * norms,
    ]
    assert [fact["parameters"] for fact in facts] == [matrices + norms] * 2


def test_pull_says_where_the_block_lies_and_its_checksum(cli, hub, tmp_path):
    outcome = cli("llm", "pull", "org/sharded", "--layers", "-1,0")
    assert outcome.code == 0
    folder = tmp_path / "cache/blocks/hub/org--sharded/main"
    expected = FrozenBlock.from_pretrained(hub.root / "org/sharded", layers=(3, 0)).sha256()
    assert outcome.out.splitlines() == [f"layers 3, 0 of org/sharded are in {folder}", f"sha256 {expected}"]
    assert ": done in " in outcome.err
    served = hub.served
    again = cli("llm", "pull", "org/sharded", "--layers=-1,0", "--sha256", expected.upper(), "--offline")
    assert (again.code, again.out, hub.served) == (0, outcome.out, served)
    told = json.loads(cli("llm", "pull", "org/sharded", "--layers=-1,0", "--json", "--offline").out)
    assert told == {"name": "org/sharded", "layers": [3, 0], "folder": str(folder), "sha256": expected}


def test_pull_refuses_another_checksum_and_keeps_nothing(cli, hub, tmp_path):
    cli("llm", "pull", "org/whole", "--layers", "0")
    outcome = cli("llm", "pull", "org/whole", "--layers", "0,1", "--sha256", 64 * "0")
    assert outcome.code == 2
    assert f"expected was {64 * '0'}; it was not kept" in outcome.err
    kept = {path.name for path in (tmp_path / "cache/blocks/hub/org--whole/main").iterdir()}
    assert "layer-000.safetensors" in kept
    assert "layer-001.safetensors" not in kept
    assert cli("llm", "pull", "org/sharded", "--sha256", 64 * "0").code == 2
    assert not (tmp_path / "cache/blocks/hub/org--sharded").exists()


def test_pull_says_what_becomes_of_a_layer_that_was_kept_before(cli, hub):
    assert cli("llm", "pull", "org/whole").code == 0
    outcome = cli("llm", "pull", "org/whole", "--sha256", 64 * "0")
    assert outcome.code == 2
    assert "from before" in outcome.err
    assert cli("llm", "pull", "org/whole", "--sha256", "deadbeef").err.endswith("has 64 digits from 0 to f\n")


def test_an_interrupted_pull_goes_on(cli, hub):
    hub.cut_after = BLOCK_BYTES // 2
    outcome = cli("llm", "pull", "org/whole")
    assert outcome.code == 2
    assert "run the same command again: it goes on where it stopped" in outcome.err
    hub.cut_after = None
    assert cli("llm", "pull", "org/whole").code == 0


@pytest.mark.parametrize("layers", ["", "x", "1:", "2:1", "0,,1", "1.5"])
def test_layers_that_are_none_are_refused(cli, layers):
    outcome = cli("llm", "show", "llama-3.1-8b", f"--layers={layers}")
    assert outcome.code == 2
    assert "names no layer; write -1, or 0,1, or 28:30" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("show", "gpt-9"), "known: smollm2-135m"),
        (("pull", "gpt-9"), "known: smollm2-135m"),
        (("show", "llama-3.1-8b", "--layers", "32"), "the model has layers 0 to 31"),
        (("pull", "org/nothing"), "has no config.json"),
        (("pull", "org/whole", "--offline"), "downloads are off"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(cli, hub, arguments, reason):
    outcome = cli("llm", *arguments)
    assert outcome.code == 2
    assert reason in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_pulling_what_lies_here_is_refused(cli, tmp_path):
    save_tiny_llama(tmp_path / "llama")
    outcome = cli("llm", "pull", tmp_path / "llama")
    assert outcome.code == 2
    assert "is on this machine already" in outcome.err


@pytest.mark.parametrize("verb", ["list", "show", "pull"])
def test_help_teaches_with_an_example(cli, verb):
    assert f"Example: medvisionllama llm {verb}" in cli("llm", verb, "--help").out
