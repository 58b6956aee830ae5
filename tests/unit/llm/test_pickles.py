"""PyTorch's own checkpoints: tensors are found without unpickling anything but tensors, and nothing runs."""

import argparse
import pickle
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from medvisionllama.errors import BlockError
from medvisionllama.llm.pickle_file import pickle_entries
from medvisionllama.llm.ranges import Entry, LocalFile, read_rows, read_tensor
from payload import Payload

STATE = {
    "matrix": torch.arange(600.0).reshape(30, 20),
    "half": torch.arange(10).to(torch.bfloat16),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
    "whole": torch.arange(5),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.0),
}
STATE["part"] = STATE["matrix"][3:5]
STATE["column"] = STATE["matrix"][:, 7]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def _read(path):
    source = LocalFile(path)
    entries = pickle_entries(source)
    return {
        name: read_tensor(source, entry) if isinstance(entry, Entry) else entry
        for name, entry in entries.items()
    }


def _assert_same(read):
    assert set(read) == set(STATE)
    for name, value in STATE.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_of_every_kind_are_read(path, archive):
    torch.save(STATE, path, _use_new_zipfile_serialization=archive)
    _assert_same(_read(path))


def test_an_archive_packed_by_another_program_is_read(path, tmp_path):
    torch.save(STATE, tmp_path / "original")
    with zipfile.ZipFile(tmp_path / "original") as original, zipfile.ZipFile(path, "w") as copy:
        for name in original.namelist():
            copy.writestr(name, original.read(name))
    _assert_same(_read(path))


def test_a_compressed_archive_is_refused(path, tmp_path):
    torch.save(STATE, tmp_path / "original")
    with (
        zipfile.ZipFile(tmp_path / "original") as original,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for name in original.namelist():
            copy.writestr(name, original.read(name))
    with pytest.raises(BlockError, match="its arrays are compressed"):
        _read(path)


@pytest.mark.parametrize("wrapped", [{"state_dict": STATE, "epoch": 3}, torch.nn.Module()])
def test_a_state_inside_a_dictionary_is_found_and_a_module_is_not_opened(path, wrapped):
    torch.save(wrapped, path)
    if isinstance(wrapped, dict):
        _assert_same(_read(path))
    else:
        with pytest.raises(BlockError, match="is a pickle that holds more than tensors"):
            _read(path)


def test_rows_are_read_alone(path):
    torch.save(STATE, path)
    source = LocalFile(path)
    entries = pickle_entries(source)
    for name in ("matrix", "turned"):
        assert torch.equal(read_rows(source, entries[name], [2, 0]), STATE[name][[2, 0]])


@pytest.mark.parametrize("content", [3, [], {}, {"a": 1}, {1: torch.ones(2)}])
def test_a_file_without_named_tensors_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(BlockError, match="holds no named tensors"):
        _read(path)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_a_file_that_ends_early_is_refused(path, archive, share):
    torch.save(STATE, path, _use_new_zipfile_serialization=archive)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(BlockError) as refused:
        _read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"<html>nothing here</html>", b"PK\x03\x04" + bytes(100), bytes(5000), b"GGUF"]
)
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(BlockError, match=str(path)):
        _read(path)


def test_an_array_smaller_than_its_tensor_is_refused(path, tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "original")
    with zipfile.ZipFile(tmp_path / "original") as original, zipfile.ZipFile(path, "w") as copy:
        for name in original.namelist():
            content = original.read(name)
            copy.writestr(name, content[:8] if "/data/" in name else content)
    with pytest.raises(BlockError, match="a is larger than its array"):
        _read(path)


def _repacked(path, original, *, extra=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w", compression) as copy:
        for name in source.namelist():
            if not any(name.endswith(other) for other, _ in extra):
                copy.writestr(name, source.read(name))
        for name, content in extra:
            copy.writestr(f"original/{name}", content)


def test_an_archive_that_is_no_checkpoint_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(BlockError, match="without data"):
        _read(path)


@pytest.mark.parametrize("name", ["version", "byteorder"])
def test_a_small_member_that_would_unpack_to_a_large_one_is_refused(path, tmp_path, name):
    torch.save(STATE, tmp_path / "original")
    _repacked(
        path, tmp_path / "original", extra=[(name, bytes(10_000_000))], compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(BlockError, match=f"{name} would be 10000000 bytes long"):
        _read(path)


def test_an_encrypted_archive_is_refused(path):
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(BlockError, match=str(path)):
        _read(path)


def test_a_tensor_larger_than_what_is_stored_of_it_is_refused(path):
    torch.save({"a": torch.zeros(1).expand(10**9, 10**9)}, path)
    with pytest.raises(BlockError, match="of which 1 are stored"):
        _read(path)


def test_a_sparse_tensor_is_refused(path):
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    with pytest.raises(BlockError, match="a is not a plain tensor"):
        _read(path)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_never_runs_and_the_way_out_is_named(path, tmp_path, archive):
    sentinel = tmp_path / "ran"
    torch.save({**STATE, "extra": Payload(sentinel)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(BlockError, match="is a pickle that holds more than tensors"):
        _read(path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)
    assert sentinel.exists()  # so the payload would have run


def test_code_hidden_in_a_second_pickle_never_runs(path, tmp_path):
    sentinel = tmp_path / "ran"
    torch.save(STATE, tmp_path / "original")
    with zipfile.ZipFile(tmp_path / "original") as original, zipfile.ZipFile(path, "w") as copy:
        copy.writestr("original/constants.pkl", pickle.dumps(Payload(sentinel)))
        for name in original.namelist():
            copy.writestr(
                name, pickle.dumps(Payload(sentinel)) if name.endswith("data.pkl") else original.read(name)
            )
    with pytest.raises(BlockError, match=str(path)):
        _read(path)
    assert not sentinel.exists()


def test_the_command_in_the_message_converts_a_file_that_is_trusted(path):
    state = {"a": torch.ones(2, 3).t(), "b": torch.arange(4.0)}
    torch.save({"state_dict": state, "args": argparse.Namespace(rate=0.1)}, path)
    with pytest.raises(BlockError) as refused:
        _read(path)
    command = shlex.split(str(refused.value).partition("convert it: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=path.parent, check=True)
    converted = load_file(path.with_suffix(".safetensors"))
    assert all(torch.equal(converted[name], value) for name, value in state.items())
