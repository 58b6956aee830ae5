import json
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import medvisionllama
from medvisionllama._files import (
    append_json,
    as_before,
    atomic_path,
    canonical_hash,
    file_sha256,
    user_cache,
    write_bytes,
    write_json,
    write_text,
)


def fail_while_writing(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError("stopped here")


def test_text_is_read_as_it_is_written_whatever_the_locale_says():
    # A class called L\u00e4sion, or a path with an umlaut, would be another where the locale is Latin-1.
    source = Path(medvisionllama.__file__).parent
    calls = [
        f"{path.relative_to(source)}: {call}"
        for path in source.rglob("*.py")
        for call in re.findall(r"\.read_text\([^)]*\)", path.read_text(encoding="utf-8"))
    ]
    assert len(calls) > 10
    assert [call for call in calls if "encoding=" not in call] == []


def test_a_finished_file_has_its_content_and_no_partial_file_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_no_file_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="stopped here"):
        fail_while_writing(tmp_path / "file.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="stopped here"):
        fail_while_writing(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_files_are_as_before_unless_what_is_done_to_them_is_kept(tmp_path, monkeypatch, links, fails):
    def refuse(*_, **__):
        raise PermissionError

    if not links:
        # As where disks have no links, and give nobody rights to what is another's.
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "utime", refuse)
        monkeypatch.setattr(os, "chmod", refuse)
    changed, removed, _, new = paths = [tmp_path / name for name in "abcd"]
    for path in paths[:3]:
        path.write_text("old")
    with suppress(ZeroDivisionError), as_before(paths) as undo:
        write_text(changed, "new")
        removed.unlink()
        write_text(new, "new")
        if fails:
            raise ZeroDivisionError
        undo.pop_all()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    old = {path.name: "old" for path in paths[:3]}
    assert found == (old if fails else {"a": "new", "c": "old", "d": "new"})


def fail_without(path: Path) -> None:
    with as_before([path]):
        path.unlink()
        raise ZeroDivisionError


def test_what_cannot_be_put_back_stays_beside_its_place(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    mask = tmp_path / "mask"
    mask.write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        fail_without(mask)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".before-")
    assert left.read_text() == "old"


def test_the_file_does_not_exist_until_it_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"


@pytest.mark.parametrize("name", ["scan.nii.gz", "array.npy"])
def test_the_temporary_name_keeps_the_suffixes_and_is_hidden(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.name.endswith(name)
        assert temporary.name.startswith(".")


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_get_the_permissions_of_the_umask(tmp_path, mask, expected):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == expected


def test_writing_from_many_threads_leaves_umask_and_permissions_alone(tmp_path, monkeypatch):
    before = os.umask(0o077)
    change = os.umask

    def change_slowly(mask: int) -> int:
        result = change(mask)
        time.sleep(0.002)
        return result

    monkeypatch.setattr(os, "umask", change_slowly)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: write_text(tmp_path / f"{number}.txt", ""), range(32)))
    finally:
        after = change(before)
    assert after == 0o077
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_json_is_read_back_as_written(tmp_path):
    value = {"b": [1, 2.5, None], "a": "naïve"}
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text()) == value


def test_the_canonical_hash_ignores_key_order_and_nothing_else():
    assert canonical_hash({"a": 1, "b": [2, 3]}) == canonical_hash({"b": [2, 3], "a": 1})
    assert canonical_hash({"a": 1, "b": [2, 3]}) != canonical_hash({"a": 1, "b": [3, 2]})


def test_the_canonical_hash_is_the_sha256_of_compact_sorted_json():
    # printf '{"a":1,"b":2}' | sha256sum
    expected = "43258cff783fe7036d8a43033f830adfc60ec037382473548ac742b888292777"
    assert canonical_hash({"b": 2, "a": 1}) == expected


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == expected


def test_the_cache_is_where_the_environment_says_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    assert user_cache() == tmp_path / "cache"
    assert stat.S_IMODE(user_cache().stat().st_mode) == 0o700


def test_the_cache_follows_the_desktop_when_the_environment_is_silent(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDVISIONLLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "medvisionllama"


def test_what_is_flushed_may_be_written_to_as_windows_demands(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    modes, sync = [], os.fsync

    def noted(handle):
        modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_json(tmp_path / "a.json", {})
    append_json(tmp_path / "a.jsonl", {})
    assert len(modes) == 2
    assert os.O_RDONLY not in modes
