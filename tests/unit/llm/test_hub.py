"""Blocks from the Hub: what is fetched, what is kept, what is sent to whom."""

import json
import shutil
import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from medvisionllama._files import file_sha256
from medvisionllama.errors import BlockError
from medvisionllama.llm import CATALOG, CatalogEntry, FrozenBlock
from medvisionllama.llm.cache import BlockCache
from medvisionllama.llm.families import family_of
from medvisionllama.llm.sources import open_source
from range_server import serving
from tiny_hub import BLOCK_BYTES, HUB_SETTINGS

LLAMA = family_of("llama")


@pytest.mark.parametrize("name", ["whole", "sharded", "pickled"])
@pytest.mark.parametrize("layers", [(-1,), (0, 2)])
def test_a_block_from_the_hub_equals_the_block_from_the_folder(hub, checkpoints, name, layers):
    fetched = FrozenBlock.from_pretrained(f"org/{name}", layers=layers)
    assert fetched.sha256() == FrozenBlock.from_pretrained(checkpoints / name, layers=layers).sha256()


@pytest.mark.parametrize("name", ["whole", "sharded", "pickled"])
def test_only_the_blocks_bytes_and_the_directories_are_served(hub, name):
    FrozenBlock.from_pretrained(f"org/{name}", layers=(1,))
    files = list((hub.root / "org" / name).glob("*.safetensors")) + list(
        (hub.root / "org" / name).glob("*.bin")
    )
    assert BLOCK_BYTES <= hub.served <= 1.05 * BLOCK_BYTES + 500_000
    assert hub.served < 0.6 * sum(file.stat().st_size for file in files)


def test_touching_tensors_are_asked_for_at_once(hub):
    FrozenBlock.from_pretrained("org/whole", layers=(1,))
    # The first bytes, the layer's nine tensors side by side, the last norm.
    assert len(hub.of("model.safetensors")) <= 4


def test_only_the_shards_that_hold_the_block_are_opened(hub):
    homes = json.loads((hub.root / "org/sharded/model.safetensors.index.json").read_text())["weight_map"]
    FrozenBlock.from_pretrained("org/sharded", layers=(1,))
    wanted = {file for name, file in homes.items() if name.startswith(("model.layers.1.", "model.norm."))}
    assert wanted < set(homes.values())
    assert {asked.file for asked in hub.asked if asked.file.endswith(".safetensors")} == wanted


def test_a_pickles_arrays_are_found_without_reading_the_headers_before_them(hub):
    FrozenBlock.from_pretrained("org/pickled", layers=(1,))
    assert len(hub.of("pytorch_model.bin")) < 8  # there are 39 arrays


def test_what_is_kept_needs_no_server(hub, kept, monkeypatch):
    first = FrozenBlock.from_pretrained("org/sharded").sha256()
    folder = "blocks/hub/org--sharded/main/"
    assert [path.removeprefix(folder) for path in kept() if path.startswith(folder)] == [
        "config.json",
        "layer-003.safetensors",
        "manifest.json",
        "norm.safetensors",
    ]
    asked = len(hub.asked)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert FrozenBlock.from_pretrained("org/sharded").sha256() == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert FrozenBlock.from_pretrained("org/sharded").sha256() == first
    assert len(hub.asked) == asked


@pytest.mark.parametrize("name", ["whole", "sharded", "pickled"])
def test_what_another_program_has_downloaded_is_read_where_it_lies(
    hub, checkpoints, downloaded, monkeypatch, name
):
    downloaded(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    block = FrozenBlock.from_pretrained(f"org/{name}", layers=(1,))
    assert block.sha256() == FrozenBlock.from_pretrained(checkpoints / name, layers=(1,)).sha256()
    assert hub.asked == []


def test_what_another_program_has_downloaded_in_part_is_fetched(hub, downloaded):
    next(downloaded("sharded").glob("model-*.safetensors")).unlink()
    FrozenBlock.from_pretrained("org/sharded", layers=(1,))
    assert hub.asked
    (downloaded("whole") / "model.safetensors").unlink()
    FrozenBlock.from_pretrained("org/whole", layers=(1,))
    assert hub.of("model.safetensors")


def test_a_tokenizer_that_another_program_left_out_is_fetched(hub, checkpoints, downloaded, monkeypatch):
    words = Tokenizer(WordLevel({"left": 0, "<unk>": 1}, unk_token="<unk>"))
    words.save(str(hub.root / "org" / "whole" / "tokenizer.json"))
    (downloaded("whole") / "tokenizer.json").unlink(missing_ok=True)
    with monkeypatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(BlockError, match="tokenizer"):
            open_source("org/whole").tokenizer()
    assert open_source("org/whole").tokenizer().get_vocab() == words.get_vocab()
    assert {asked.file for asked in hub.asked} == {"tokenizer.json"}


def test_rows_that_were_being_replaced_when_all_ended_are_not_called_damaged(hub, monkeypatch):
    open_source("org/whole").embedding_rows([5], LLAMA)
    note = BlockCache.note

    def ended(self, **facts):
        if "rows.safetensors" in facts.get("sha256", {}):
            raise KeyboardInterrupt
        note(self, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(BlockCache, "note", ended)
        with pytest.raises(KeyboardInterrupt):
            open_source("org/whole").embedding_rows([6], LLAMA)
    assert len(open_source("org/whole").embedding_rows([5, 6, 7], LLAMA)) == 3


def test_the_manifest_has_the_checksum_of_every_file_and_the_origin(hub, tmp_path):
    hub.headers["X-Repo-Commit"] = "a" * 40
    FrozenBlock.from_pretrained("org/sharded")
    folder = tmp_path / "cache/blocks/hub/org--sharded/main"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == {
        file: file_sha256(folder / file)
        for file in ("config.json", "norm.safetensors", "layer-003.safetensors")
    }
    assert (manifest["repository"], manifest["commit"]) == ("org/sharded", "a" * 40)


def test_later_layers_come_from_the_commit_of_the_first(hub):
    hub.headers["X-Repo-Commit"] = "a" * 40
    FrozenBlock.from_pretrained("org/sharded", layers=(0,))
    hub.headers["X-Repo-Commit"] = "b" * 40
    before = len(hub.asked)
    FrozenBlock.from_pretrained("org/sharded", layers=(1,))
    assert {asked.revision for asked in hub.asked[before:]} == {"a" * 40}


def test_a_revision_is_asked_for_and_kept_apart(hub, kept):
    block = FrozenBlock.from_pretrained("org/whole@v1.0")
    assert {asked.revision for asked in hub.asked} == {"v1.0"}
    assert block.name == "org/whole@v1.0:3:pretrained"
    assert "blocks/hub/org--whole/v1.0/layer-003.safetensors" in kept()


def test_rows_of_the_embedding_are_fetched_one_by_one_and_kept(hub, checkpoints, monkeypatch):
    source = open_source("org/whole")
    rows = source.embedding_rows([5, 3, 5], LLAMA)
    assert torch.equal(rows, open_source(checkpoints / "whole").embedding_rows([5, 3, 5], LLAMA))
    assert rows.dtype == torch.float32
    asked = len(hub.asked)
    open_source("org/whole").embedding_rows([3], LLAMA)
    assert len(hub.asked) == asked
    grown = open_source("org/whole").embedding_rows([63, 3], LLAMA)
    assert torch.equal(grown[1], rows[1])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        BlockError, match="the embeddings of these words are not in the cache and downloads are off"
    ):
        open_source("org/whole").embedding_rows([7], LLAMA)


def test_a_token_beyond_the_embedding_is_refused(hub):
    with pytest.raises(BlockError, match="token 64 is not among the 64"):
        open_source("org/whole").embedding_rows([64], LLAMA)


def test_the_tokenizer_is_fetched_once(hub):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"heart": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(hub.root / "org/whole/tokenizer.json")
    )
    for _ in range(2):
        assert open_source("org/whole").tokenizer().encode("heart").ids == [0]
    assert len(hub.of("tokenizer.json")) == 1


def test_a_catalogue_entry_on_the_hub_needs_no_network_for_random_weights(hub, kept, monkeypatch):
    monkeypatch.setitem(CATALOG, "tiny", CatalogEntry("tiny", "", "", HUB_SETTINGS, repo="org/whole"))
    FrozenBlock.from_pretrained("tiny", weights="random")
    assert (hub.asked, kept()) == ([], [])
    block = FrozenBlock.from_pretrained("tiny")
    assert block.name == "tiny:3:pretrained"
    assert block.sha256() == FrozenBlock.from_pretrained("org/whole").sha256()


def test_the_token_is_sent_to_the_endpoint(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    FrozenBlock.from_pretrained("org/whole")
    assert {asked.authorization for asked in hub.asked} == {"Bearer hf_secret"}


def test_a_saved_login_is_used(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_saved")
    FrozenBlock.from_pretrained("org/whole")
    assert {asked.authorization for asked in hub.asked} == {"Bearer hf_saved"}


def test_the_token_does_not_follow_a_redirect_to_another_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    expected = FrozenBlock.from_pretrained(hub.root / "org/whole").sha256()
    with serving(hub.root) as elsewhere:
        hub.redirect_to = elsewhere.url
        assert FrozenBlock.from_pretrained("org/whole").sha256() == expected
        assert elsewhere.served > BLOCK_BYTES
        assert {asked.authorization for asked in elsewhere.asked} == {None}
    assert {asked.authorization for asked in hub.asked} == {"Bearer hf_secret"}


def test_a_plain_server_without_versions_is_enough(hub):
    hub.etags = False
    expected = FrozenBlock.from_pretrained(hub.root / "org/sharded").sha256()
    assert FrozenBlock.from_pretrained("org/sharded").sha256() == expected
    assert {asked.if_range for asked in hub.asked} == {None}


def test_two_at_a_time_fetch_once(hub):
    blocks = []
    threads = [
        threading.Thread(target=lambda: blocks.append(FrozenBlock.from_pretrained("org/whole").sha256()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(blocks) == 3
    assert len(set(blocks)) == 1
    assert hub.served < 2 * BLOCK_BYTES


def test_an_old_checkpoint_that_is_one_stream_is_fetched_whole(hub, checkpoints):
    state = torch.load(checkpoints / "pickled/pytorch_model.bin", weights_only=True)
    torch.save(state, hub.root / "org/pickled/pytorch_model.bin", _use_new_zipfile_serialization=False)
    block = FrozenBlock.from_pretrained("org/pickled")
    assert block.sha256() == FrozenBlock.from_pretrained(checkpoints / "pickled").sha256()


def test_a_local_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    shutil.copytree(hub.root / "org", tmp_path / "org")
    monkeypatch.chdir(tmp_path)
    FrozenBlock.from_pretrained("org/whole")
    assert hub.asked == []
