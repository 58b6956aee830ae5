"""Headers that lie: every one is refused before a tensor is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvisionllama.errors import BlockError
from medvisionllama.llm.ranges import LocalFile, read_rows, read_tensor
from medvisionllama.llm.safetensors_file import _DTYPES, safetensors_entries


def _write(path, header, data=bytes(16), *, length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return LocalFile(path)


def _tensor(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", sorted(_DTYPES.values(), key=str))
def test_every_dtype_is_read_as_safetensors_reads_it(path, dtype):
    kept = {
        "a": torch.arange(12).reshape(3, 4).to(dtype),
        "b": torch.tensor(3).to(dtype),
        "c": torch.zeros(0, 2).to(dtype),
    }
    save_file(kept, path, metadata={"format": "pt"})
    source = LocalFile(path)
    entries, expected = safetensors_entries(source), load_file(path)
    assert set(entries) == set(kept)
    for name, entry in entries.items():
        tensor = read_tensor(source, entry)
        assert (tensor.dtype, tensor.shape) == (dtype, expected[name].shape)
        assert tensor.tolist() == expected[name].tolist()
    assert read_rows(source, entries["a"], [2, 0, 2]).tolist() == expected["a"][[2, 0, 2]].tolist()


def test_a_correct_header_is_believed(path):
    header = {
        "a": _tensor(shape=(2,), offsets=(0, 8)),
        "b": _tensor(shape=(1, 2), offsets=(8, 16)),
        "__metadata__": {},
    }
    assert set(safetensors_entries(_write(path, header))) == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": _tensor(offsets=(0, 17))}, "does not fill"),
        ({"a": _tensor(offsets=(16, 0))}, "does not fill"),
        ({"a": _tensor(shape=(5,), offsets=(0, 20))}, "ends at byte"),
        ({"a": _tensor(shape=(3,), offsets=(0, 12))}, "its header describes"),
        ({"a": _tensor(shape=(3,), offsets=(4, 16))}, "begins at byte"),
        (
            {"a": _tensor(shape=(2,), offsets=(0, 8)), "b": _tensor(shape=(3,), offsets=(4, 16))},
            "begins at byte",
        ),
        ({"a": _tensor(offsets=(0, 16)), "b": _tensor(offsets=(0, 16))}, "begins at byte"),
        ({"a": _tensor(shape=(-4,), offsets=(0, 16))}, "impossible"),
        ({"a": _tensor(shape=(-2, -2), offsets=(0, 16))}, "impossible"),
        ({"a": _tensor(shape=(1 << 70, 0), offsets=(0, 16))}, "impossible"),
        ({"a": _tensor(shape=(1 << 61, 1 << 61), offsets=(0, 16))}, "does not fill"),
        ({"a": _tensor(shape=(1,) * 17 + (4,))}, "does not fill"),
        ({"a": _tensor(shape=(4.0,))}, "impossible"),
        ({"a": _tensor(shape=(True, 4))}, "impossible"),
        ({"a": _tensor(offsets=(-16, 0))}, "impossible"),
        ({"a": _tensor(offsets=(0, 16, 32))}, "lacks"),
        ({"a": _tensor() | {"shape": "4"}}, "impossible"),
        ({"a": _tensor() | {"shape": None}}, "impossible"),
        ({"a": _tensor() | {"dtype": 3}}, "has dtype '3'; known are F64"),
        ({"a": _tensor("F4")}, "has dtype 'F4'; known are F64.*unquantised"),
        ({"a": {"dtype": "F32"}}, "lacks"),
        ({"a": None}, "lacks"),
        ({"a": [1]}, "lacks"),
        ([], "not a JSON object"),
        (
            b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            "twice",
        ),
        (b'{"a": {"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "twice"),
        (b"{", "not readable"),
        (b"\xff\xfe", "not readable"),
        (b'{"a": ' + b"[" * 100_000, "not readable"),
        (
            b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
            "not readable|impossible",
        ),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(path, header, reason):
    with pytest.raises(BlockError, match=reason) as refused:
        safetensors_entries(_write(path, header))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 1000])
def test_a_header_longer_than_the_file_is_refused(path, length):
    with pytest.raises(BlockError, match=f"its header would be {length} bytes long"):
        safetensors_entries(_write(path, {"a": _tensor()}, length=length))


def test_a_header_that_is_too_long_is_refused_unread(path):
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(BlockError, match="its header would be 100000001 bytes long"):
        safetensors_entries(LocalFile(path))


@pytest.mark.parametrize("kept", [0, 7])
def test_a_file_without_a_header_is_refused(path, kept):
    path.write_bytes(bytes(kept))
    with pytest.raises(BlockError, match=f"it has {kept} bytes"):
        safetensors_entries(LocalFile(path))


def test_a_pointer_of_git_lfs_is_named(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 16\n")
    with pytest.raises(BlockError, match="git lfs pull"):
        safetensors_entries(LocalFile(path))


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(path):
    source = _write(path, {"a": _tensor()})
    entries = safetensors_entries(source)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BlockError, match="ends at byte"):
        read_tensor(source, entries["a"])
