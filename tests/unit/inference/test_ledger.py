"""What a folder of masks remembers of each: read back, whatever a crash left of it."""

import re
from pathlib import Path

import pytest

from medvisionllama._files import files_sha256
from medvisionllama.errors import DataError
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.inference.ledger import Ledger, Made, MadeBy, Views, check_maker, check_scan

VIEWS = Views(overlap=0.5, flip=True, turn=True)
MAKER = MadeBy(weights_sha256=("a",), views=(VIEWS,), cleaning=Cleaning())


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "Doe_John" / "s.nii.gz"
    path.parent.mkdir()
    path.write_bytes(b"voxels")
    return path


def record(scan: Path, volume: float = 1.0) -> dict:
    mask = str(scan.parent / "masks" / "s.nii.gz")
    return {
        "case": "s",
        "source": {"file": str(scan)},
        "mask": mask,
        "volumes_ml": {"a": volume},
        "warnings": [],
    }


def test_the_last_line_of_a_mask_counts_and_a_torn_one_does_not(scan, tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.read() == {}
    ledger.add(Made.of(record(scan), files_sha256([scan]), MAKER))
    ledger.add(Made.of(record(scan, 2.0), files_sha256([scan]), MAKER))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:30])
    assert ledger.read()["s.nii.gz"].volumes_ml == {"a": 2.0}
    ledger.add(Made.of(record(scan, 3.0), files_sha256([scan]), MAKER))
    ledger.path.write_bytes(ledger.path.read_bytes() + b'[]\n{"mask": 3}\n\xff\n')
    assert ledger.read()["s.nii.gz"].volumes_ml == {"a": 3.0}


def test_a_scan_that_is_gone_is_named(scan, tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(Made.of(record(scan), files_sha256([scan]), MAKER))
    scan.unlink()
    with pytest.raises(DataError, match=f"{scan.name} cannot be read any more"):
        check_scan(tmp_path / "s.nii.gz", ledger.read()["s.nii.gz"], [scan])


def test_folders_and_headers_stay_out_of_it(scan, tmp_path):
    ledger = Ledger(tmp_path)
    said = record(scan) | {"source": {"folder": str(scan.parent)}, "warnings": [f"{scan} is of Mr Roe"]}
    ledger.add(Made.of(said, files_sha256([scan]), MAKER))
    assert not {"Doe", "Roe"} & set(re.findall("[A-Z][a-z]+", ledger.path.read_text()))
    assert ledger.read()["s.nii.gz"].volumes_ml == {"a": 1.0}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights_sha256": ("b",)}, "by other networks"),
        ({"weights_sha256": ("a", "b")}, "by other networks"),
        (
            {"views": (VIEWS.model_copy(update={"turn": False}),)},
            "mirrored and turned, windows overlapping by 0.5",
        ),
        ({"views": (VIEWS.model_copy(update={"overlap": 0.6}),)}, "other views of each scan"),
        ({"cleaning": Cleaning(largest_component=True)}, "no component is removed"),
    ],
)
def test_a_mask_made_otherwise_is_refused(scan, tmp_path, other, words):
    ledger = Ledger(tmp_path)
    ledger.add(Made.of(record(scan), files_sha256([scan]), MAKER))
    made = ledger.read()["s.nii.gz"]
    assert check_maker(tmp_path / "s.nii.gz", made, MAKER) == made
    with pytest.raises(DataError, match=words):
        check_maker(tmp_path / "s.nii.gz", made, MAKER.model_copy(update=other))


def test_a_mask_of_other_voxels_or_of_nobody_is_refused(scan, tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(Made.of(record(scan), files_sha256([scan]), MAKER))
    made = ledger.read()["s.nii.gz"]
    check_scan(tmp_path / "s.nii.gz", made, [scan])
    scan.write_bytes(b"others")
    with pytest.raises(DataError, match=r"another scan of that name, or .* has changed"):
        check_scan(tmp_path / "s.nii.gz", made, [scan])
    with pytest.raises(DataError, match="says what made it"):
        check_maker(tmp_path / "s.nii.gz", None, MAKER)


def test_a_line_names_the_maps_that_were_written_with_its_mask(scan, tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(Made.of(record(scan) | {"uncertainty": str(scan)}, files_sha256([scan]), MAKER))
    made = ledger.read()["s.nii.gz"]
    assert made.has("uncertainty")
    assert not made.has("probabilities")
    ledger.add(Made.of(record(scan), files_sha256([scan]), MAKER))
    assert not ledger.read()["s.nii.gz"].has("uncertainty")
