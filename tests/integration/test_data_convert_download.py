"""`medvisionllama data convert` and `data download`, as they are typed."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

import medvisionllama
from medvisionllama.data.index import open_dataset
from medvisionllama.errors import ConfigError
from range_server import serving

NAME = "Task09_Spleen"


@pytest.fixture
def mirror(tmp_path, phantoms, monkeypatch):
    """A mirror of the decathlon with one task; the command line's own changes to the environment are taken back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("medvisionllama._http.WAITS_S", ())
    place = tmp_path / "served/msd/tar"
    place.mkdir(parents=True)
    with tarfile.open(place / f"{NAME}.tar", "w") as tar:
        tar.add(phantoms, NAME)
    with serving(tmp_path / "served") as server:
        yield server


def address(server) -> str:
    return f"{server.url}/msd/tar/resolve/main"


def checksum(server) -> str:
    return hashlib.sha256((server.root / f"msd/tar/{NAME}.tar").read_bytes()).hexdigest()


def test_a_task_is_downloaded_from_a_mirror(cli, mirror, tmp_path):
    options = ("--mirror", address(mirror), "--sha256", checksum(mirror), "--out", tmp_path / "out")
    outcome = cli("data", "download", "Task09", *options)
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'out' / NAME}\n")
    assert f"fetching {NAME}.tar: done" in outcome.err
    assert len(open_dataset(tmp_path / "out" / NAME).cases) == 8
    again = cli("data", "download", "Task09", *options, "--json")
    assert json.loads(again.out) == {"folder": str(tmp_path / "out" / NAME)}
    assert "is there already; nothing to do" in again.err
    assert len(mirror.asked) == 1


def test_an_archive_is_downloaded_by_its_address(cli, mirror, tmp_path):
    outcome = cli("data", "download", f"{address(mirror)}/{NAME}.tar", "--out", tmp_path / "out")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'out' / NAME}\n")


def test_another_archive_than_the_decathlons_is_refused(cli, mirror, tmp_path):
    outcome = cli("data", "download", "spleen", "--mirror", address(mirror), "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "expected was 410d4a301da4e5b2f6f86ec3ddba524e" in outcome.err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_download_goes_on(cli, mirror, tmp_path):
    options = ("--mirror", address(mirror), "--sha256", checksum(mirror), "--out", tmp_path / "out")
    mirror.cut_after = 150_000
    outcome = cli("data", "download", "9", *options)
    assert outcome.code == 2
    assert "run the same command again: it goes on" in outcome.err
    mirror.cut_after = None
    assert cli("data", "download", "9", *options).code == 0
    assert mirror.asked[-1].range is not None


def test_a_hostile_archive_is_one_line_and_leaves_nothing(cli, mirror, tmp_path):
    link = tarfile.TarInfo("Task/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    with tarfile.open(mirror.root / "msd/tar/ours.tar.gz", "w:gz") as tar:
        tar.addfile(link)
    outcome = cli("data", "download", f"{address(mirror)}/ours.tar.gz", "--out", tmp_path / "out")
    assert outcome.code == 2
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("medvisionllama:"))
    assert "'Task/link' is a symbolic link" in line
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a task, such as Task04"),
        (("Task11",), "Task10_Colon"),
        (("Task04", "--offline"), "downloads are off; run `medvisionllama data download Task04_Hippocampus"),
        (("Task04", "--sha256", "1"), "64 digits"),
        (("http://example.org/x.tar",), "is not encrypted"),
        (("https://example.org/x.html",), "must end in the name of an archive"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(cli, mirror, tmp_path, arguments, said):
    outcome = cli("data", "download", *arguments, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_ten_tasks_are_listed(cli):
    assert cli("data", "download", "--list").out.count("Task") == 10
    rows = json.loads(cli("data", "download", "--list", "--json").out)
    assert rows[3]["name"] == "Task04_Hippocampus"
    assert all(row["url"].startswith("https://") for row in rows)


def test_a_dataset_is_converted_and_divided_alike(cli, phantoms, tmp_path):
    splits = []
    for to, name in (("nnunet", "Dataset004_Phantoms"), ("plain", "plain"), ("msd", "msd")):
        outcome = cli("data", "convert", phantoms, tmp_path / name, "--to", to)
        assert (outcome.code, outcome.out) == (0, f"{tmp_path / name}\n")
        cli("data", "split", tmp_path / name, "--out", tmp_path / f"{to}.json")
        splits.append(json.loads((tmp_path / f"{to}.json").read_text()))
    cli("data", "split", phantoms, "--out", tmp_path / "original.json")
    assert splits == [json.loads((tmp_path / "original.json").read_text())] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Dataset001_X", "--to", "nnunet", "--symlink", "--copy"), "exclude each other"),
        (("out", "--to", "nnunet"), "no name that nnU-Net looks for"),
        (("out", "--to", "msd", "--symlink"), "must not lead outside itself"),
        ((".", "--to", "msd"), "exists already"),
        (("out", "--to", "plain", "--renumber"), "only nnU-Net needs values numbered anew"),
    ],
)
def test_what_cannot_be_converted_is_one_line(cli, phantoms, tmp_path, arguments, said):
    name, *options = arguments
    outcome = cli("data", "convert", phantoms, tmp_path / name, *options)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", [{"to": "nnUNet"}, {"to": "msd", "transfer": "move"}])
def test_what_is_no_layout_and_no_way_is_refused_in_python_too(phantoms, tmp_path, asked):
    with pytest.raises(ConfigError, match="is unknown; choose from"):
        medvisionllama.convert(phantoms, tmp_path / "out", **asked)
    assert list(tmp_path.iterdir()) == []


def test_both_verbs_are_functions(mirror, phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = medvisionllama.download("spleen", mirror=address(mirror), sha256=checksum(mirror))
    assert folder == Path(NAME)
    assert medvisionllama.convert(folder, "plain", to="plain") == Path("plain")
    assert len(open_dataset(Path("plain")).cases) == 8
