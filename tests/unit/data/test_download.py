"""Downloads from a server on this machine: whole, resumed, refused, and what is left on the disk after each."""

import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from medvisionllama.data import http_file
from medvisionllama.data.archives import Limits
from medvisionllama.data.download import download, wanted_of
from medvisionllama.data.index import open_dataset
from medvisionllama.data.msd_tasks import TASKS, find_task
from medvisionllama.data.phantom import write_phantoms
from medvisionllama.errors import DataError
from medvisionllama.progress import Silent
from range_server import RangeServer, serving

NAME = "Task04_Hippocampus"
FILE = f"{NAME}.tar"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar like those of the decathlon, with a twin for each file, as macOS packs them."""
    folder = tmp_path_factory.mktemp("archive")
    root = write_phantoms(folder / NAME, num_cases=6, shape=(32, 32, 32))
    for path in [*root.rglob("*.nii.gz")]:
        path.with_name(f"._{path.name}").write_bytes(b"attributes")
    with tarfile.open(folder / FILE, "w") as tar:
        tar.add(root, NAME)
    return folder / FILE


@pytest.fixture
def served(tmp_path, archive, monkeypatch):
    """A server that has the archive at its mirror's address; the table knows its MD5 sum."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("medvisionllama._http.WAITS_S", (0.0,))
    place = tmp_path / "served/msd/tar" / FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(archive.read_bytes())
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(TASKS, NAME, replace(TASKS[NAME], md5=checksum))
    with serving(tmp_path / "served") as server:
        monkeypatch.setenv("MEDVISIONLLAMA_MSD_MIRROR", f"{server.url}/msd/tar/resolve/main")
        yield server


def place_of(server: RangeServer, name: str = FILE) -> Path:
    return server.root / "msd/tar" / name


def address(server: RangeServer, name: str = FILE) -> str:
    return f"{server.url}/msd/tar/resolve/main/{name}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*")) if out.exists() else []


def refusal(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        download(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Lines(Silent):
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


def test_a_task_is_fetched_unpacked_and_nothing_else_is_left(served, tmp_path):
    out = tmp_path / "out"
    assert download("hippocampus", out) == out / NAME
    assert len(open_dataset(out / NAME).cases) == 6
    assert [path.name for path in out.iterdir()] == [NAME]
    assert not [name for name in left(out) if "._" in name]


def test_what_is_there_is_not_fetched_again(served, tmp_path):
    download("4", tmp_path / "out")
    served.asked.clear()
    lines = Lines()
    download("Task04", tmp_path / "out", progress=lines)
    assert served.asked == []
    assert lines.said == [f"{tmp_path / 'out' / NAME} is there already; nothing to do"]
    # Nor can it be compared with a checksum.
    download("Task04", tmp_path / "out", sha256="0" * 64, progress=lines)
    assert "nothing is left that --sha256 could be compared with" in lines.said[1]


def test_a_folder_in_the_way_is_refused(served, tmp_path):
    (tmp_path / "out" / NAME).mkdir(parents=True)
    assert "is in the way" in refusal("4", tmp_path / "out")
    assert served.asked == []


def test_the_archive_is_kept_on_request_and_used_later(served, tmp_path):
    out = tmp_path / "out"
    download("4", out, keep_archive=True)
    assert sorted(path.name for path in out.iterdir()) == [NAME, FILE]
    (out / NAME).rename(tmp_path / "moved")
    served.asked.clear()
    download("4", out, offline=True)
    assert served.asked == []
    assert sorted(path.name for path in out.iterdir()) == [NAME, FILE]


def test_an_archive_that_lies_there_is_verified_and_never_deleted(served, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / FILE).write_bytes(b"something else")
    assert "expected was" in refusal("4", out)
    assert left(out) == [FILE]


def test_a_download_that_was_cut_goes_on(served, tmp_path):
    out, size = tmp_path / "out", place_of(served).stat().st_size
    served.cut_after = 400_000
    assert "run the same command again: it goes on" in refusal("4", out)
    part = out / f".{NAME}.download/archive.part"
    came = part.stat().st_size
    assert 0 < came <= 400_000
    served.cut_after = None
    served.asked.clear()
    download("4", out)
    assert [(asked.range, asked.status) for asked in served.asked] == [(f"bytes={came}-{size - 1}", 206)]
    assert served.served == size - came
    assert [path.name for path in out.iterdir()] == [NAME]


def test_a_connection_that_breaks_once_is_mended_at_once(served, tmp_path):
    served.hang_up_once_after = 400_000
    download("4", tmp_path / "out")
    assert [asked.status for asked in served.asked] == [200, 206]


@pytest.mark.parametrize("statuses", [[503], [429, 500]])
def test_a_busy_server_is_asked_again(served, tmp_path, statuses, monkeypatch):
    monkeypatch.setattr("medvisionllama._http.WAITS_S", (0.0, 0.0))
    served.statuses["*"] = [*statuses]
    download("4", tmp_path / "out")
    assert [asked.status for asked in served.asked] == [*statuses, 200]


def _cut(served, out):
    served.cut_after = 400_000
    refusal("4", out)
    served.cut_after = None
    served.asked.clear()


def test_a_server_without_ranges_begins_again(served, tmp_path):
    _cut(served, tmp_path / "out")
    served.ignores_ranges = True
    lines = Lines()
    download("4", tmp_path / "out", progress=lines)
    assert [asked.status for asked in served.asked] == [200]
    assert "starting again" in lines.said[0]
    assert len(open_dataset(tmp_path / "out" / NAME).cases) == 6


def test_a_server_that_names_no_version_begins_again(served, tmp_path):
    served.etags = False
    _cut(served, tmp_path / "out")
    download("4", tmp_path / "out")
    assert [(asked.range, asked.status) for asked in served.asked] == [(None, 200)]


@pytest.mark.parametrize("honours", [True, False])
def test_a_file_that_changed_begins_again(served, tmp_path, honours):
    _cut(served, tmp_path / "out")
    os.utime(place_of(served), ns=(1, 1))
    served.honours_if_range = honours
    download("4", tmp_path / "out")
    assert [asked.status for asked in served.asked] == ([200] if honours else [206, 200])
    assert len(open_dataset(tmp_path / "out" / NAME).cases) == 6


def test_a_file_that_became_shorter_begins_again(served, tmp_path, monkeypatch):
    _cut(served, tmp_path / "out")
    place_of(served).write_bytes(b"short")
    served.honours_if_range = False
    assert "expected was" in refusal("4", tmp_path / "out")
    assert [asked.status for asked in served.asked] == [416, 200]
    assert left(tmp_path / "out") == []


def test_a_part_of_another_address_is_not_gone_on_with(served, tmp_path):
    _cut(served, tmp_path / "out")
    (served.root / "other").symlink_to(served.root / "msd")
    download("4", tmp_path / "out", mirror=f"{served.url}/other/tar/resolve/main")
    assert [asked.range for asked in served.asked] == [None]


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"url": 1}', '{"size": "x"}', "\x00"])
def test_a_damaged_note_begins_again(served, tmp_path, note):
    _cut(served, tmp_path / "out")
    (tmp_path / "out" / f".{NAME}.download/archive.json").write_text(note)
    download("4", tmp_path / "out")
    assert [asked.range for asked in served.asked] == [None]


@pytest.mark.parametrize("option", [{}, {"sha256": 64 * "0"}])
def test_another_checksum_is_refused_and_nothing_kept(served, tmp_path, monkeypatch, option):
    monkeypatch.setitem(TASKS, NAME, replace(TASKS[NAME], md5=32 * "0"))
    message = refusal("4", tmp_path / "out", **option)
    assert f"expected was {'0' * 32}" in message
    assert left(tmp_path / "out") == []


def test_a_body_longer_than_announced_is_refused(served, tmp_path):
    _cut(served, tmp_path / "out")
    served.longer = 100_000
    assert "more bytes than it announced" in refusal("4", tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_a_body_of_unknown_length_is_refused(served, tmp_path):
    served.headers["Content-Encoding"] = "gzip"
    assert "does not say how large" in refusal("4", tmp_path / "out")
    assert served.served < 1_000_000
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "is not on 127.0.0.1"), (403, "to everybody"), (418, "answered with status 418")],
)
def test_a_refusing_server_is_one_line(served, tmp_path, status, said):
    served.statuses["*"] = [status]
    assert said in refusal("4", tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_a_refusing_server_does_not_cost_what_came_before(served, tmp_path):
    _cut(served, tmp_path / "out")
    served.statuses["*"] = [404]
    refusal("4", tmp_path / "out")
    served.asked.clear()
    download("4", tmp_path / "out")
    assert served.asked[0].range is not None


def test_a_sign_in_page_is_refused(served, tmp_path, monkeypatch):
    place_of(served).write_bytes(b"<html>sign in</html>")
    message = refusal(address(served), tmp_path / "out")
    assert "no tar, tar.gz or zip archive" in message
    assert left(tmp_path / "out") == []


def test_offline_nothing_is_asked(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = left(tmp_path)
    message = refusal("4", tmp_path / "out")
    assert f"run `medvisionllama data download {NAME} --out {tmp_path / 'out'}` while online" in message
    assert (served.asked, left(tmp_path)) == ([], before)
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_known_before_the_first_byte(served, tmp_path):
    assert "GB are free" in refusal("4", tmp_path / "out", limits=Limits(spare_bytes=10**18))
    assert left(tmp_path / "out") == []


def test_an_archive_that_does_not_fit_when_unpacked_is_kept_for_later(served, tmp_path):
    out = tmp_path / "out"
    assert "nothing was unpacked, free some space" in refusal("4", out, limits=Limits(max_bytes=1000))
    assert f".{NAME}.download/archive.part" in left(out)
    served.asked.clear()
    download("4", out)
    assert served.asked == []


def test_a_hostile_archive_is_refused_and_not_kept(served, tmp_path):
    with tarfile.open(place_of(served), "w") as tar:
        tar.addfile(tarfile.TarInfo("../x"))
    assert "leads out of the folder" in refusal("4", tmp_path / "out", sha256=sha256(place_of(served)))
    assert left(tmp_path / "out") == []


def test_an_archive_without_a_dataset_is_refused_for_a_task(served, tmp_path):
    with tarfile.open(place_of(served), "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    assert "holds no whole dataset" in refusal("4", tmp_path / "out", sha256=sha256(place_of(served)))
    assert left(tmp_path / "out") == []


def test_ones_own_archive_is_fetched_by_its_address(served, tmp_path, archive):
    with tarfile.open(archive) as tar, zipfile.ZipFile(place_of(served, "ours.zip"), "w") as ours:
        for member in tar:
            if member.isfile():
                ours.writestr(member.name.removeprefix(NAME + "/"), tar.extractfile(member).read())
    lines = Lines()
    where = download(f"{address(served, 'ours.zip')}?key=1", tmp_path / "out", progress=lines)
    assert (where, lines.said) == (tmp_path / "out" / "ours", [])
    assert len(open_dataset(where).cases) == 6


def test_ones_own_archive_may_hold_something_else(served, tmp_path):
    with zipfile.ZipFile(place_of(served, "ours.zip"), "w") as ours:
        ours.writestr("series/1.dcm", b"")
    lines = Lines()
    where = download(address(served, "ours.zip"), tmp_path / "out", progress=lines)
    assert "is no dataset as it is: ours.zip holds no dataset" in lines.said[0]
    assert left(where) == ["1.dcm"]


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        ("Task11", {}, "tasks: Task01_BrainTumour, Task02_Heart"),
        ("", {}, "no task of the decathlon"),
        ("https://host/x.rar", {}, "allowed: .tar.gz, .tar, .tgz, .zip"),
        ("https://host/", {}, "must end in the name of an archive"),
        ("https://host/..%2f.tar", {}, "must end in the name of an archive"),
        ("https://host/.tar", {}, "must end in the name of an archive"),
        ("file:///etc/x.tar", {}, "no web address"),
        ("http://[x/x.tar", {}, "no web address"),
        ("http://host/x.tar", {}, "is not encrypted"),
        ("4", {"mirror": "http://me:secret@host"}, "http://host is not encrypted"),
        ("4", {"mirror": "ftp://host"}, "no web address"),
        ("4", {"sha256": "12"}, "no checksum"),
    ],
)
def test_what_cannot_be_fetched_is_refused(tmp_path, what, options, said):
    message = refusal(what, tmp_path / "out", **options)
    assert said in message
    assert "secret" not in message
    assert left(tmp_path) == []


def test_plain_http_is_taken_where_a_sha256_says_what_has_to_come():
    assert wanted_of("http://host/x.tar", sha256=64 * "A").checksum == 64 * "a"


def test_a_redirect_to_plain_http_is_refused(served, tmp_path, monkeypatch):
    # Neither host is this machine by name, as far as the check knows.
    monkeypatch.setattr(http_file, "_LOOPBACK", set())
    monkeypatch.setattr("medvisionllama.data.download.check_address", lambda *_, **__: None)
    assert "http without encryption" in refusal("4", tmp_path / "out")
    download("4", tmp_path / "out", sha256=sha256(place_of(served)))


@pytest.mark.parametrize(
    "name", ["Task04", "04", "4", "task4", "hippocampus", "HIPPOCAMPUS", NAME, NAME.lower()]
)
def test_a_task_has_many_names(name):
    assert find_task(name).name == NAME
    assert find_task("10").name == "Task10_Colon"


def test_the_table_is_the_one_monai_publishes():
    from monai.apps.datasets import DecathlonDataset

    assert {task.name: task.md5 for task in TASKS.values()} == DecathlonDataset.md5
    urls = {name: wanted_of(name).url for name in TASKS}
    assert urls == DecathlonDataset.resource


def _start(served, out):
    code = (
        "from medvisionllama.data import download as d, msd_tasks as m; from dataclasses import replace; import sys;"
        f"m.TASKS['{NAME}'] = replace(m.TASKS['{NAME}'], md5=sys.argv[2]); d.download('4', d.Path(sys.argv[1]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(out), TASKS[NAME].md5], stderr=subprocess.PIPE)


def test_a_killed_download_goes_on(served, tmp_path):
    out = tmp_path / "out"
    part = out / f".{NAME}.download/archive.part"
    served.hang_after = 400_000
    process = _start(served, out)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    served.hang_after = None
    came = part.stat().st_size
    assert 0 < came <= 400_000
    (part.parent / "unpacked").mkdir(exist_ok=True)  # as if it had died later
    served.asked.clear()
    download("4", out)
    assert served.asked[0].range.startswith(f"bytes={came}-")
    assert [path.name for path in out.iterdir()] == [NAME]


def test_two_processes_fetch_it_once(served, tmp_path):
    out = tmp_path / "out"
    processes = [_start(served, out) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == [b"", b"", b""]
    assert [asked.status for asked in served.asked] == [200]
    assert [path.name for path in out.iterdir()] == [NAME]
    assert len(open_dataset(out / NAME).cases) == 6
