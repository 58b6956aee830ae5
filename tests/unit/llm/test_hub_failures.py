"""Downloads that go wrong: one line that says what to do, a clean cache, and never two versions in one block."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch

from medvisionllama.errors import BlockError
from medvisionllama.llm import FrozenBlock
from medvisionllama.llm.http import RemoteFile
from medvisionllama.llm.sources import open_source
from payload import Payload
from range_server import serving
from tiny_hub import BLOCK_BYTES

CONFIG_ONLY = ["config.json", "manifest.json"]


def _refused(identifier, match, **arguments):
    with pytest.raises(BlockError, match=match) as refused:
        FrozenBlock.from_pretrained(identifier, **arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def _files(kept):
    """Files in the cache, but for the configuration, which was fetched before and is whole."""
    return [name for path in kept() if "." in (name := path.rpartition("/")[2]) and name not in CONFIG_ONLY]


def test_a_server_that_ignores_ranges_is_left_at_once(hub, kept):
    hub.ignores_ranges = True
    # Larger than what the sockets between server and client can hold.
    with (hub.root / "org/whole/model.safetensors").open("ab") as file:
        file.truncate(64_000_000)
    _refused("org/whole", "ignores the byte ranges.*give its folder")
    assert hub.served < 16_000_000
    assert _files(kept) == []


def test_a_truncated_shard_is_known_before_it_is_fetched(hub, kept):
    file = hub.root / "org/whole/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    _refused("org/whole", "damaged or truncated.*its header describes|ends at byte")
    assert hub.served < 100_000
    assert _files(kept) == []


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leads_elsewhere_is_refused(hub, kept, place):
    _rewrite_index(hub, lambda homes: dict.fromkeys(homes, place))
    _refused("org/sharded", "outside its folder")
    assert {asked.file for asked in hub.asked} <= {"config.json", "model.safetensors.index.json"}
    assert _files(kept) == []


def test_an_index_that_names_an_absent_file_is_refused(hub, kept):
    _rewrite_index(hub, lambda homes: dict.fromkeys(homes, "gone.safetensors"))
    _refused("org/sharded", r"gone\.safetensors is named by the checkpoint's index but absent")
    assert _files(kept) == []


def test_an_index_that_names_the_wrong_file_is_refused(hub, kept):
    _rewrite_index(hub, lambda homes: dict.fromkeys(homes, sorted(set(homes.values()))[0]))
    _refused("org/sharded", "which the checkpoint's index says it holds")
    assert _files(kept) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"weight_map": 3}', b"\xff\xfe"])
def test_an_index_that_is_none_is_refused(hub, kept, content):
    (hub.root / "org/sharded/model.safetensors.index.json").write_bytes(content)
    _refused("org/sharded", r"index\.json is (damaged|not readable)")
    assert _files(kept) == []


def test_a_hostile_header_is_refused(hub, kept):
    (hub.root / "org/whole/model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + bytes(200_000))
    _refused("org/whole", "its header would be")
    assert hub.served < 100_000
    assert _files(kept) == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do(hub, kept, status):
    hub.statuses["*"] = [status]
    said = _refused(
        "org/whole", f"status {status}.*accept its licence on {hub.url}/org/whole and set HF_TOKEN"
    )
    assert "Bearer" not in said
    assert kept() == []


def test_a_repository_that_does_not_exist_is_refused(hub, kept):
    _refused("org/nothing", r"org/nothing.*no config\.json.*check the name and the revision")
    assert kept() == []


def test_a_repository_without_weights_is_refused(hub, kept):
    (hub.root / "org/whole/model.safetensors").unlink()
    _refused("org/whole", "holds no weights")
    assert _files(kept) == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"hidden_size": 3}', b"<html>"])
def test_a_configuration_that_is_none_is_not_kept(hub, kept, content):
    (hub.root / "org/whole/config.json").write_bytes(content)
    _refused("org/whole", r"config\.json")
    assert kept() == []


def test_a_refused_connection_is_one_line(hub, kept, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    _refused("org/whole", "the connection to 127.0.0.1:9 failed.*run the same command again")
    assert kept() == []


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://", "http://[::1", "http://a..b"])
def test_an_endpoint_that_is_none_is_one_line(hub, kept, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    _refused("org/whole", "check HF_ENDPOINT|connection")
    assert kept() == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nothing_is_asked(hub, kept, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    _refused("org/whole", "downloads are off; run `medvisionllama llm pull org/whole` while online")
    monkeypatch.delenv(name)
    open_source("org/whole")
    monkeypatch.setenv(name, "1")
    asked = len(hub.asked)
    _refused("org/whole", "run `medvisionllama llm pull org/whole --layers 3` while online")
    assert len(hub.asked) == asked
    assert _files(kept) == []


@pytest.mark.parametrize("statuses", [[503], [500, 429], [502, 504]])
def test_a_busy_server_is_asked_again(hub, statuses):
    hub.statuses["model.safetensors"] = statuses
    assert FrozenBlock.from_pretrained("org/whole").width == 128


def test_a_server_that_stays_busy_is_given_up(hub, kept):
    hub.statuses["model.safetensors"] = [503] * 3
    _refused("org/whole", "status 503")
    assert len(hub.of("model.safetensors")) == 3
    assert _files(kept) == []


def test_a_connection_that_breaks_once_is_taken_up_again(hub, checkpoints):
    hub.hang_up_once_after = 300_000
    block = FrozenBlock.from_pretrained("org/whole")
    assert block.sha256() == FrozenBlock.from_pretrained(checkpoints / "whole").sha256()
    assert hub.served < 1.2 * BLOCK_BYTES + 200_000


def _interrupt(hub, kept, identifier="org/whole"):
    """Break every connection in the middle of the layer; return how much of it was kept."""
    hub.cut_after = 300_000
    _refused(identifier, "connection to .* failed.*run the same command again: it goes on where it stopped")
    hub.cut_after = None
    parts = [path for path in kept() if path.endswith(".part")]
    assert parts
    return hub.served


def test_an_interrupted_download_goes_on_where_it_stopped(hub, kept, checkpoints):
    before = _interrupt(hub, kept)
    block = FrozenBlock.from_pretrained("org/whole")
    assert block.sha256() == FrozenBlock.from_pretrained(checkpoints / "whole").sha256()
    # All but the directory came once.
    assert hub.served < BLOCK_BYTES + 3 * 66_000
    assert hub.served - before < BLOCK_BYTES - 120_000
    assert not [path for path in kept() if "part" in path]


def test_a_killed_download_goes_on_where_it_stopped(hub, kept, monkeypatch):
    from medvisionllama.llm.http import RemoteFile

    copy = RemoteFile._copy

    def killed(self, place, end, take):
        def take_one(piece):
            take(piece[:1000])
            raise KeyboardInterrupt

        copy(self, place, end, take_one)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFile, "_copy", killed)
        with pytest.raises(KeyboardInterrupt):
            FrozenBlock.from_pretrained("org/whole")
    assert [path for path in kept() if path.endswith(".part")]
    before = len(hub.asked)
    FrozenBlock.from_pretrained("org/whole")
    starts = [asked.range.split("=")[1].split("-")[0] for asked in hub.asked[before:] if asked.range]
    assert any(int(start) % 1000 and int(start) > 0 for start in starts)


@pytest.mark.parametrize("tagged", [True, False])
def test_a_resumed_download_never_joins_two_versions(hub, kept, tagged):
    hub.etags = tagged
    _interrupt(hub, kept)
    _other_version(hub)
    block = FrozenBlock.from_pretrained("org/whole")
    assert block.sha256() == FrozenBlock.from_pretrained(hub.root / "org/whole").sha256()
    assert not [path for path in kept() if "part" in path]


@pytest.mark.parametrize("honoured", [True, False])
def test_a_file_that_changes_between_directory_and_tensors_is_refused(hub, kept, honoured):
    from medvisionllama.llm.http import RemoteFile

    hub.honours_if_range = honoured
    prefetch = RemoteFile.prefetch

    def changed(self, ranges):
        hub.etag_suffix = "-new"
        prefetch(self, ranges)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFile, "prefetch", changed)
        _refused("org/whole", "changed while it was being read; nothing was kept, run the same command again")
    assert _files(kept) == []


def test_a_range_that_was_not_asked_for_is_refused(hub, kept):
    hub.shift = 8
    _refused("org/whole", "sent bytes 8 to")
    assert _files(kept) == []


def test_a_block_that_does_not_fit_is_not_kept_and_a_mended_one_is_fetched(hub, kept):
    from safetensors.torch import load_file, save_file

    path = hub.root / "org/whole/model.safetensors"
    tensors, name = load_file(path), "model.layers.3.self_attn.q_proj.weight"
    for wrong in (tensors | {name: torch.ones(7, 7)}, {n: t for n, t in tensors.items() if n != name}):
        save_file(wrong, path, metadata={"format": "pt"})
        _refused("org/whole", "q_proj.*(has shape|lacks)|lacks self_attn.q_proj")
        assert _files(kept) == []
    save_file(tensors, path, metadata={"format": "pt"})
    assert FrozenBlock.from_pretrained("org/whole").width == 128


def test_more_bytes_than_were_asked_for_are_refused(hub, kept, monkeypatch):
    from medvisionllama.llm import http

    monkeypatch.setattr(http, "_FIRST", 1000)
    # Larger than what the sockets between server and client can hold.
    hub.longer = 64_000_000
    _refused("org/whole", "more bytes than it announced")
    assert hub.served < 16_000_000
    assert _files(kept) == []


@pytest.mark.parametrize("size", [10**20, "9" * 5000])
def test_a_size_that_is_none_is_refused(hub, kept, size):
    hub.claimed_size = size
    _refused("org/whole", "ignores the byte ranges")
    assert _files(kept) == []


@pytest.mark.parametrize("token", ["ab\ncd", "tok€en"])
def test_a_token_that_is_none_is_refused_and_not_shown(hub, kept, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    said = _refused("org/whole", "HF_TOKEN holds")
    assert token[:2] not in said.replace("token", "")
    assert hub.asked == []


def test_a_password_in_the_address_is_not_shown(hub, kept, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:s3cret@127.0.0.1:9")
    assert "s3cret" not in _refused("org/whole", "the connection to 127.0.0.1:9 failed")


def test_revisions_of_similar_names_are_kept_apart(hub):
    for number, revision in enumerate(("x/y", "x--y"), start=1):
        FrozenBlock.from_pretrained(f"org/whole@{revision}")
        assert len(hub.of("config.json")) == number


@pytest.mark.parametrize("place", ["http://[bad", "http://a..b"])
def test_a_redirect_to_nowhere_is_one_line(hub, kept, place):
    hub.redirect_to = place
    _refused("org/whole", "check HF_ENDPOINT|connection")
    assert kept() == []


def test_a_compressed_range_is_refused(hub, kept):
    FrozenBlock.from_pretrained("org/whole", layers=(0,))
    before = _files(kept)
    hub.headers["Content-Encoding"] = "gzip"
    _refused("org/whole", "sent a compressed range", layers=(1,))
    assert _files(kept) == before


def test_a_kept_file_that_was_changed_is_named(hub, tmp_path):
    FrozenBlock.from_pretrained("org/whole")
    path = tmp_path / "cache/blocks/hub/org--whole/main/layer-003.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    _refused("org/whole", rf"{path} is damaged.*delete {path.parent} and fetch")


def test_a_redirect_without_end_is_refused(hub, kept):
    hub.redirect_to = hub.url
    _refused("org/whole", "redirects")
    assert kept() == []


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_from_the_hub_is_refused_and_never_run(hub, kept, tmp_path, archive):
    sentinel, path = tmp_path / "ran", hub.root / "org/pickled/pytorch_model.bin"
    torch.save({"a": Payload(sentinel)}, path, _use_new_zipfile_serialization=archive)
    _refused("org/pickled", "is a pickle that holds more than tensors.*python -c .*weights_only=False")
    assert not sentinel.exists()
    assert _files(kept) == []
    torch.load(path, weights_only=False)
    assert sentinel.exists()  # so the payload would have run


def test_a_plain_pickle_from_the_hub_is_refused_and_never_run(hub, kept, tmp_path):
    sentinel = tmp_path / "ran"
    (hub.root / "org/pickled/pytorch_model.bin").write_bytes(pickle.dumps(Payload(sentinel)))
    _refused("org/pickled", "pickle|damaged")
    assert not sentinel.exists()
    assert _files(kept) == []


def test_a_failed_fetch_leaves_what_was_kept_before(hub, kept):
    FrozenBlock.from_pretrained("org/whole", layers=(0,))
    before = kept()
    hub.shift = 8
    _refused("org/whole", "sent bytes", layers=(1,))
    assert kept() == before
    hub.shift = 0
    assert FrozenBlock.from_pretrained("org/whole", layers=(0, 1)).width == 128


def test_a_redirected_token_is_not_sent_even_when_the_other_host_refuses(hub, kept, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(hub.root) as elsewhere:
        elsewhere.statuses["*"] = [403]
        hub.redirect_to = elsewhere.url
        said = _refused("org/whole", "gated, private or absent")
        assert [asked.authorization for asked in elsewhere.asked] == [None]
    assert "hf_secret" not in said
    assert kept() == []


def _rewrite_index(hub, change):
    path = hub.root / "org/sharded/model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


def _other_version(hub):
    from safetensors.torch import load_file, save_file

    path = hub.root / "org/whole/model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.fixture
def remote():
    """A file whose parts lie here; nothing is asked of a server."""
    return RemoteFile(SimpleNamespace(repo="org/x", host="nowhere"), "model.safetensors")


def test_a_part_that_somebody_made_longer_begins_again(remote, tmp_path, monkeypatch):
    part, places = tmp_path / "x.part", []
    part.write_bytes(bytes(20))
    monkeypatch.setattr(remote, "_copy", lambda place, end, take: places.append(place()) or take(b"a" * 10))
    remote._bring(part, 100, 110, lambda here: None)
    assert places == [100]
    assert part.read_bytes() == b"a" * 10


def test_two_who_bring_one_part_where_nothing_is_locked_write_one_file(remote, tmp_path, monkeypatch):
    part, content = tmp_path / "x.part", bytes(range(100))

    def copy(place, end, take):
        take(content[place() : place() + 30])
        # The other one is there too, and as fast.
        if len(nested) < 1:
            nested.append(True)
            remote._bring(part, 0, 100, lambda here: None)
        while place() < end:
            take(content[place() : place() + 30])

    nested: list[bool] = []
    monkeypatch.setattr(remote, "_copy", copy)
    remote._bring(part, 0, 100, lambda here: None)
    assert part.read_bytes() == content


def test_a_part_that_somebody_cut_short_is_no_tensor(remote, tmp_path):
    part = tmp_path / "x.part"
    part.write_bytes(b"abc")
    remote._parts.append(((0, 10), part))
    buffer = bytearray(3)
    remote.read_into(memoryview(buffer), 0)
    assert buffer == b"abc"
    with pytest.raises(BlockError, match="changed while it was being read"):
        remote.read_into(memoryview(bytearray(10)), 0)
