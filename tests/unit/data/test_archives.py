"""Archives of strangers: each refused in one line, with nothing left behind, inside the destination or outside."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from medvisionllama.data import archives
from medvisionllama.data.archives import Limits, Member, extract
from medvisionllama.errors import DataError
from medvisionllama.progress import Silent

GOOD = {"Task/dataset.json": b"{}", "Task/imagesTr/a.nii.gz": b"x" * 3000}


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes], mode: str = "w", **options: object) -> Path:
    with tarfile.open(path, mode, **options) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return path


def good(path: Path, mode: str = "w") -> Path:
    return tar(path, *(entry(name, content) for name, content in GOOD.items()), mode=mode)


def zipped(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes], **options: object) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def unpacked(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refusal(tmp_path):
    """Unpack to tmp_path/inner/out; return the message, after looking that the disk is as before."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"untouched")

    def run(archive: Path, limits: Limits | None = None) -> str:
        before = {p: (p.stat().st_mode, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")}
        with pytest.raises(DataError) as caught:
            extract(archive, tmp_path / "inner" / "out", limits)
        after = {p: (p.stat().st_mode, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")}
        assert after == before
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        return str(caught.value)

    return run


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_a_tar_is_unpacked(tmp_path, suffix, mode):
    extract(good(tmp_path / f"a.{suffix}", mode), tmp_path / "out")
    assert unpacked(tmp_path / "out") == GOOD


def test_a_zip_is_unpacked_whatever_its_name_says(tmp_path):
    extract(zipped(tmp_path / "a.tar", *GOOD.items()), tmp_path / "out")
    assert unpacked(tmp_path / "out") == GOOD


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_accented_names_are_unpacked(tmp_path, kind):
    name = f"{'patient' * 12}/{'Aufnahme-ä' * 8}/x.nii" if kind != tarfile.USTAR_FORMAT else "Ä/x.nii"
    extract(tar(tmp_path / "a.tar", entry(name, b"1"), format=kind), tmp_path / "out")
    assert unpacked(tmp_path / "out") == {name: b"1"}


def test_twins_of_macos_are_left_out(tmp_path):
    twins = [
        entry("./._Task", b"1"),
        entry("./Task/imagesTr/._a.nii.gz", b"2"),
        entry("Task/.DS_Store", b"3"),
    ]
    archive = tar(tmp_path / "a.tar", entry(".", type=tarfile.DIRTYPE), *twins, entry("./Task/a", b"4"))
    extract(archive, tmp_path / "out")
    assert unpacked(tmp_path / "out") == {"Task/a": b"4"}
    extract(zipped(tmp_path / "a.zip", ("__MACOSX/Task/a", b"5"), ("Task/a", b"4")), tmp_path / "zip")
    assert unpacked(tmp_path / "zip") == {"Task/a": b"4"}


def test_modes_and_owners_are_ignored(tmp_path):
    info = entry("a", b"1", mode=0o6777, uid=0)
    folder = entry("b", type=tarfile.DIRTYPE, mode=0o000)
    extract(tar(tmp_path / "a.tar", folder, info, entry("b/c", b"2", mode=0)), tmp_path / "out")
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((tmp_path / "out/a").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert unpacked(tmp_path / "out") == {"a": b"1", "b/c": b"2"}


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="exists already"):
        extract(good(tmp_path / "a.tar"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


NAMES = {
    "/etc/passwd": "absolute path",
    "../a": "leads out",
    "b/../../a": "leads out",
    "b/..": "leads out",
    "C:/a": "a colon",
    "..\\a": "a backslash",
    "a\nb": "sign that file names must not have",
    "a\x1b[2J": "sign that file names must not have",
    "a\u202egpj": "sign that file names must not have",
    "con.nii": "Windows reads",
    "a. ": "Windows reads",
    "x" * 300: "a part of more than 255 bytes",
    "x/" * 600 + "y": "bytes, more than 1,024",
    "x/" * 40 + "y": "folders deep",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tar_with_a_bad_name_is_refused(tmp_path, refusal, name):
    assert NAMES[name] in refusal(tar(tmp_path / "t.tar", entry("good", b"1"), entry(name, b"2")))


@pytest.mark.parametrize("name", NAMES)
def test_a_zip_with_a_bad_name_is_refused(tmp_path, refusal, name):
    assert NAMES[name] in refusal(zipped(tmp_path / "t.zip", ("good", b"1"), (zipfile.ZipInfo(name), b"2")))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (b"Z", "unknown kind"),
    ],
)
def test_what_is_no_file_and_no_folder_is_refused(tmp_path, refusal, kind, said):
    archive = tar(tmp_path / "t.tar", entry("good", b"1"), entry("x", type=kind, linkname="../a"))
    assert said in refusal(archive)


def test_a_file_behind_a_link_is_refused_at_the_link(tmp_path, refusal):
    entries = [entry("d", type=tarfile.SYMTYPE, linkname="../.."), entry("d/a", b"overwritten")]
    assert "'d' is a symbolic link" in refusal(tar(tmp_path / "t.tar", *entries))


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, refusal, mode):
    info = zipfile.ZipInfo("x")
    info.create_system, info.external_attr = 3, (mode | 0o777) << 16
    assert "only files and folders" in refusal(zipped(tmp_path / "t.zip", ("good", b"1"), (info, b"../a")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("x", "x"), "occurs twice"),
        (("x", "./x"), "occurs twice"),
        (("x/y", "x//y"), "occurs twice"),
        (("x", "X"), "case does not count"),
        (("x/1", "X/2"), "case does not count"),
        (("stra\u00dfe", "STRASSE"), "case does not count"),
        (("\u00e4", "a\u0308"), "case does not count"),
        (("x", "x/y"), "both a file and a folder"),
        (("x/y", "x"), "both a file and a folder"),
    ],
)
def test_names_that_meet_are_refused(tmp_path, refusal, names, said):
    assert said in refusal(tar(tmp_path / "t.tar", *(entry(name, b"1") for name in names)))
    assert said in refusal(zipped(tmp_path / "t.zip", *((name, b"1") for name in names)))


def test_names_that_are_not_utf8_are_refused(tmp_path, refusal):
    archive = tar(
        tmp_path / "t.tar", entry("\u00e4.nii", b"1"), encoding="latin-1", format=tarfile.GNU_FORMAT
    )
    assert "not UTF-8" in refusal(archive)
    raw = zipped(tmp_path / "t.zip", ("aa.nii", b"1")).read_bytes().replace(b"aa.nii", b"\x84a.nii")
    (tmp_path / "t.zip").write_bytes(raw)
    assert "not UTF-8" in refusal(tmp_path / "t.zip")


def test_too_many_entries_are_refused(tmp_path, refusal):
    names = [f"{number}" for number in range(12)]
    for archive in (
        tar(tmp_path / "t.tar", *map(entry, names)),
        zipped(tmp_path / "t.zip", *((name, b"") for name in names)),
        tar(tmp_path / "twins.tar", *(entry(f"._{name}") for name in names)),
    ):
        assert "more than 10 entries" in refusal(archive, Limits(max_members=10))


@pytest.mark.parametrize("make", ["tar.gz", "zip"])
def test_a_bomb_is_refused(tmp_path, refusal, make):
    zeros = bytes(3_000_000)
    archive = (
        zipped(tmp_path / "t.zip", ("0", zeros))
        if make == "zip"
        else tar(tmp_path / "t.tar.gz", entry("0", zeros), mode="w:gz")
    )
    assert "no honest compression" in refusal(archive, Limits(ratio_from_bytes=1_000_000))
    assert "the disk or the limit leaves" in refusal(archive, Limits(max_bytes=2_999_999))
    assert "the disk or the limit leaves 0.00 GB" in refusal(archive, Limits(spare_bytes=10**18))
    extract(archive, tmp_path / "fits", Limits(max_bytes=3_000_000))


def test_many_small_files_count_together(tmp_path, refusal):
    archive = tar(tmp_path / "t.tar", *(entry(str(number), bytes(1000)) for number in range(20)))
    assert "the disk or the limit leaves" in refusal(archive, Limits(max_bytes=19_000))


def test_a_tar_that_declares_more_than_it_holds_is_refused(tmp_path, refusal):
    info = tarfile.TarInfo("x")
    info.size = 10**15
    (tmp_path / "t.tar").write_bytes(info.tobuf() + bytes(2048))
    assert "no honest compression" in refusal(tmp_path / "t.tar")
    info.size = 10**5
    (tmp_path / "t.tar").write_bytes(info.tobuf() + bytes(2048))
    assert "damaged or truncated" in refusal(tmp_path / "t.tar")


def test_a_twin_that_declares_terabytes_is_refused_before_it_is_skipped(tmp_path, refusal):
    info = tarfile.TarInfo("._x")
    info.size = 10**15
    (tmp_path / "t.tar").write_bytes(info.tobuf() + bytes(2048))
    assert "no honest compression" in refusal(tmp_path / "t.tar")


@pytest.mark.parametrize("declared", [10, 5_000_000])
def test_a_zip_whose_directory_lies_about_a_size_is_refused(tmp_path, refusal, declared):
    archive = zipped(tmp_path / "t.zip", ("x", b"y" * 4000))
    raw = archive.read_bytes().replace(struct.pack("<L", 4000), struct.pack("<L", declared))
    archive.write_bytes(raw)
    message = refusal(archive)
    assert "damaged or truncated" in message or "fewer bytes than" in message


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_gigabytes_is_not_read_into_memory(tmp_path, refusal, kind):
    info = tarfile.TarInfo("././@x")
    info.type, info.size = kind, 40_000_000
    with gzip.open(tmp_path / "t.tar.gz", "wb", compresslevel=1) as file:
        file.write(entry("good")[0].tobuf() + info.tobuf() + bytes(40_000_000))
    assert "header of an entry is larger" in refusal(tmp_path / "t.tar.gz")


def test_a_chain_of_headers_is_refused(tmp_path, refusal):
    info = tarfile.TarInfo("././@x")
    info.type, info.size = tarfile.XHDTYPE, 0
    (tmp_path / "t.tar").write_bytes(entry("good")[0].tobuf() + info.tobuf() * 2000 + bytes(2048))
    refusal(tmp_path / "t.tar")


def test_a_sparse_file_is_refused(tmp_path, refusal):
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)}
    archive = tar(tmp_path / "t.tar", entry("x", b"0\n" + bytes(510), pax_headers=headers))
    assert "a sparse file" in refusal(archive) or "no honest compression" in refusal(archive)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, refusal, suffix):
    content = {name: os.urandom(700) for name in "abc"}
    archive = tmp_path / f"t.{suffix}"
    if suffix == "zip":
        zipped(archive, *content.items())
    else:
        tar(archive, *map(entry, content, content.values()), mode="w:gz" if suffix == "tar.gz" else "w")
    whole = archive.read_bytes()
    # A plain tar is whole once its last file is followed by one empty block; the rest is padding.
    end = 3 * 1536 + 512 if suffix == "tar" else len(whole)
    for length in [*range(1, end, 97), 512, 1536, end - 1]:
        archive.write_bytes(whole[:length])
        assert "is refused" in refusal(archive)
    archive.write_bytes(whole[:end])
    extract(archive, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_a_flipped_bit_is_refused(tmp_path, refusal, suffix):
    archive = tmp_path / f"t.{suffix}"
    content = os.urandom(3000)
    if suffix == "zip":
        zipped(archive, ("x", content))
    else:
        tar(archive, entry("x", content), mode="w:gz")
    raw = bytearray(archive.read_bytes())
    raw[1500] ^= 4
    archive.write_bytes(raw)
    assert "damaged or truncated" in refusal(archive)


def test_a_header_of_nonsense_in_the_middle_is_refused(tmp_path, refusal):
    archive = good(tmp_path / "t.tar")
    raw = bytearray(archive.read_bytes())
    raw[1024:1536] = b"\xff" * 512
    archive.write_bytes(raw)
    assert "its end is missing" in refusal(archive)


def test_what_follows_the_end_is_refused(tmp_path, refusal):
    archive = good(tmp_path / "t.tar")
    archive.write_bytes(archive.read_bytes() + b"more")
    assert "something follows its end" in refusal(archive)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>sign in</html>" * 100, bytes(100), b"PK\x03\x04", b"\x1f\x8b\x08 no", b"\x28\xb5\x2f\xfd"],
)
def test_what_is_no_archive_is_refused(tmp_path, refusal, content):
    (tmp_path / "t.tar").write_bytes(content)
    assert "t.tar is refused" in refusal(tmp_path / "t.tar")


def test_an_empty_archive_is_refused(tmp_path, refusal):
    assert "holds no file" in refusal(tar(tmp_path / "t.tar"))
    assert "holds no file" in refusal(zipped(tmp_path / "t.zip"))
    assert "holds no file" in refusal(tar(tmp_path / "f.tar", entry("x", type=tarfile.DIRTYPE)))


def test_an_encrypted_or_exotic_zip_is_refused(tmp_path, refusal):
    archive = zipped(tmp_path / "t.zip", ("x", b"y" * 4000))
    raw = bytearray(archive.read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(raw)
    assert "is encrypted" in refusal(archive)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("x", b"y")
    assert "other than deflate" in refusal(archive)


def test_overlapping_entries_of_a_zip_do_not_pass_the_limits(tmp_path, refusal):
    archive = zipped(tmp_path / "t.zip", ("aa", bytes(2_000_000)))
    raw = archive.read_bytes()
    start, end = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06")
    directory = raw[start:end]
    more = b"".join(directory.replace(b"aa", f"a{n}".encode()) for n in range(9))
    tail = bytearray(raw[end:])
    struct.pack_into("<HHL", tail, 8, 10, 10, len(directory) * 10)
    archive.write_bytes(raw[:end] + more + tail)
    assert refusal(archive)


def test_a_missing_archive_is_one_line(tmp_path, refusal):
    assert "cannot be read" in refusal(tmp_path / "t.tar")


def test_ctrl_c_leaves_nothing(tmp_path):
    class Impatient(Silent):
        def track(self, title, total):
            from contextlib import nullcontext

            def advance(done, note=""):
                raise KeyboardInterrupt

            return nullcontext(advance)

    with pytest.raises(KeyboardInterrupt):
        extract(good(tmp_path / "a.tar"), tmp_path / "out", progress=Impatient())
    assert not (tmp_path / "out").exists()


def test_an_entry_without_end_is_left_once_it_is_longer_than_declared(tmp_path, refusal, monkeypatch):
    class Endless:
        damage = ()

        def members(self):
            yield Member("x", 10_000, is_folder=False)

        def pieces(self):
            while True:
                yield bytes(1000)

        def place(self):
            return 0

        def close(self):
            pass

    monkeypatch.setattr(archives, "open_archive", lambda archive: Endless())
    assert "more bytes than the 10,000 declared" in refusal(good(tmp_path / "t.tar"))
