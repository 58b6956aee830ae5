"""DICOM series that make no volume: one line for each, that says which file, what is wrong and what to do."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from dicom_files import PATIENT, classic, enhanced, read_voxels, rotation, save
from medvisionllama.data.formats import dicom, dicom_header
from medvisionllama.data.formats.dicom import read_header
from medvisionllama.data.formats.dicom_series import find_series
from medvisionllama.data.readers import read_header as read_any_header
from medvisionllama.errors import DataError
from medvisionllama.inference.inputs import collect_scans

NUM = 20


def stored(num=NUM, rows=8, columns=5):
    return np.random.default_rng(0).integers(0, 4000, (num, rows, columns), dtype=np.int16)


def each(**values):
    """Set elements of every slice."""

    def change(datasets):
        for dataset in datasets:
            for name, value in values.items():
                setattr(dataset, name, value)

    return change


def one(index=6, /, **values):
    """Set elements of one slice; None removes."""

    def change(datasets):
        for name, value in values.items():
            delattr(datasets[index], name)
            if value is not None:
                setattr(datasets[index], name, value)

    return change


def without(*indices):
    def change(datasets):
        datasets[:] = [dataset for index, dataset in enumerate(datasets) if index not in indices]

    return change


def missing_without_numbers(datasets):
    each(InstanceNumber=None)(datasets)
    without(13, 14, 15)(datasets)


def missing_counted_downwards(datasets):
    for index, dataset in enumerate(datasets):
        dataset.InstanceNumber = NUM - index
    without(13, 14, 15)(datasets)


def uneven(datasets):
    x, y, z = datasets[6].ImagePositionPatient
    datasets[6].ImagePositionPatient = [x, y, z + 2]


def sideways(datasets):
    x, y, z = datasets[6].ImagePositionPatient
    datasets[6].ImagePositionPatient = [x + 2, y, z]


def tilted(datasets):
    for index, dataset in enumerate(datasets):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + round(index * 5 * np.tan(np.radians(15)), 6), z]


def twice(datasets):
    other = classic(stored())[6]
    other.SeriesInstanceUID = datasets[0].SeriesInstanceUID
    datasets.append(other)


def same_uid_other_content(datasets):
    twice(datasets)
    datasets[-1].SOPInstanceUID = datasets[6].SOPInstanceUID


def same_uid_elsewhere(datasets):
    datasets[7].SOPInstanceUID = datasets[6].SOPInstanceUID


def echoes(datasets):
    for number, second in enumerate(classic(stored())):
        second.SeriesInstanceUID = datasets[0].SeriesInstanceUID
        second.EchoTime, datasets[number].EchoTime = 90, 30
        datasets.append(second)


def exported_twice(datasets):
    for again in copy.deepcopy(datasets):
        again.file_meta.ImplementationVersionName = "OTHER"
        datasets.append(again)


def several_series(datasets):
    second = classic(stored(4))
    each(SeriesDescription="Other", SeriesNumber=9)(second)
    datasets += second


def several_frames_in_time(datasets):
    frames = enhanced(stored(4), order=[0, 1, 2, 3])
    groups = frames.PerFrameFunctionalGroupsSequence
    for index in (2, 3):
        groups[index].PlanePositionSequence = groups[index - 2].PlanePositionSequence
    datasets[:] = [frames]


def frames_without_places(datasets):
    datasets[:] = [enhanced(stored(4))]
    del datasets[0].PerFrameFunctionalGroupsSequence


def frames_without_a_position(datasets):
    datasets[:] = [enhanced(stored(4))]
    del datasets[0].PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def more_frames_than_places(datasets):
    datasets[:] = [enhanced(stored(4))]
    datasets[0].NumberOfFrames = 2_000_000_000


def values_by_table(datasets):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [2, 0, 16], "US", b"\0\0\1\1"
    each(ModalityLUTSequence=Sequence([table]))(datasets)


BROKEN = {
    "one slice is missing": (without(6), r"slice 7 of series Scan \(.+\) is missing: 5 mm apart, a gap of 10 mm after file05; export"),
    "three slices are missing": (without(13, 14, 15), r"slices 14-16 of series Scan \(.+\) are missing: 5 mm apart, a gap of 20 mm after file12;"),
    "missing slices are counted where there are no numbers": (missing_without_numbers, "slices 14-16 of series Scan"),
    "missing slices of a series that counts downwards": (missing_counted_downwards, "slices 5-7 of series Scan"),
    "slices are missing twice": (without(3, 9, 10), "slice 4 of series Scan .+, the first of 2 gaps;"),
    "uneven distances": (uneven, r"unevenly spaced: 3 to 7 mm apart, file06 is 2 mm from its place; resample"),
    "a slice shifted sideways": (sideways, "file06 is 2 mm from its place"),
    "gantry tilt": (tilted, r"stacked 15.0 degrees off their normal \(gantry tilt\); resample"),
    "two images of one place": (twice, r"file06 and file20 are two different images of one place, among 20 places of series Scan"),
    "one uid, two contents": (same_uid_other_content, "file06 and file20 are two different images of one place"),
    "one uid, two places": (same_uid_elsewhere, "file06 and .+file07 are two images with the same SOPInstanceUID"),
    "two echoes": (echoes, r"series Scan .+ holds 2 volumes \(echoes, phases or time points\), which differ in EchoTime; put"),
    "a series exported twice": (exported_twice, r"series Scan .+ holds each image twice, with one SOPInstanceUID \(.+file00, .+file20\); remove all copies but one"),
    "frames of two time points": (several_frames_in_time, r"holds 2 volumes \(.+\); split the multi-frame file file00 first, so that each is a series of its own"),
    "another plane": (one(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "lies in another plane than file00"),
    "slightly another plane": (one(ImageOrientationPatient=[*rotation((0.02, 0, 0))]), "lies in another plane than file00"),
    "other pixels": (one(PixelSpacing=[0.75, 0.6]), "file06 has pixels of 0.75 by 0.6 mm, file00 of 0.75 by 0.5 mm"),
    "another size": (one(Rows=4, Columns=10), "file06 is 10x4 pixels, file00 is 5x8, in one series; put"),
    "no position": (one(ImagePositionPatient=None), "file06 has no usable ImagePositionPatient"),
    "half a position": (one(ImagePositionPatient=[1, 2]), "file06 has no usable ImagePositionPatient"),
    "no orientation": (one(ImageOrientationPatient=None), "file06 has no usable ImageOrientationPatient"),
    "no pixel size": (each(PixelSpacing=None), "file00 has no usable PixelSpacing"),
    "pixels without size": (each(PixelSpacing=[0, 0]), "PixelSpacing, Rows and Columns must be above zero"),
    "a position beyond all numbers": (one(ImagePositionPatient=["1", "2", "1e400"]), "file06 has no usable ImagePositionPatient"),
    "skewed rows and columns": (each(ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0]), "not at right angles"),
    "colour": (each(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "file00 is a colour image; allowed"),
    "palette": (each(PhotometricInterpretation="PALETTE COLOR"), "file00 is a colour image; allowed"),
    "values by table": (values_by_table, "file00 stores values through a look-up table; allowed"),
    "no slope": (one(RescaleSlope="0", RescaleIntercept="0"), "RescaleSlope 0 and RescaleIntercept 0 give no values"),
    "impossible bits": (each(BitsStored=60000), "BitsStored 60000 is not possible"),
    "a single slice": (without(*range(1, NUM)), "file00 is the only slice of its series; .+ give the folder"),
    "several series": (several_series, r"holds 2 series: 7_Scan_\w+ \(20 images\), 9_Other_\w+ \(4 images\); give"),
    "no series": (each(Modality="SR"), "holds no DICOM series of images .+; give"),
    "localisers only": (each(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "holds no DICOM series"),
    "no pixels": (one(PixelData=None), "file06 has no pixel data; export"),
    "frames without places": (frames_without_places, "file00 holds 4 frames but says the place of 0; convert"),
    "a frame without its position": (frames_without_a_position, "file00 has no usable ImagePositionPatient"),
    "more frames than places": (more_frames_than_places, "holds 2000000000 frames but says the place of 4; convert"),
    "no rows": (one(Rows=None), r"file06 is damaged or truncated \(its header ends early\); copy"),
}  # fmt: skip


def refusal(source, function=read_voxels):
    with pytest.raises(DataError) as caught:
        function(source)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(word in message for word in (*PATIENT[0].split("^"), PATIENT[1]))
    return message


def test_frames_without_places_do_not_hide_the_other_series_of_a_study(tmp_path):
    """As nuclear medicine and cine have it beside a CT."""
    save(classic(stored(4)), tmp_path / "ct")
    loose = [None]
    frames_without_places(loose)
    save(loose, tmp_path / "spect")
    assert len(find_series(tmp_path)) == 2
    good, bad = sorted(collect_scans([tmp_path], channels=("CT",)), key=lambda scan: -scan.num_voxels)
    assert (good.case_id, bad.num_voxels) == ("ct", 0)
    assert "holds 4 frames but says the place of 0" in refusal(bad.images[0])


@pytest.mark.parametrize("case", BROKEN)
def test_a_series_that_makes_no_volume_is_refused(tmp_path, case):
    change, expected = BROKEN[case]
    datasets = classic(stored())
    each(RescaleSlope="1", RescaleIntercept="0")(datasets)
    change(datasets)
    save(datasets, tmp_path, [f"file{index:02d}" for index in range(len(datasets))])
    assert re.search(expected, refusal(tmp_path)), refusal(tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_truncated_slice_is_refused(tmp_path, share, syntax):
    datasets = classic(stored(3, 32, 32))
    if syntax:
        for dataset in datasets:
            dataset.compress(syntax, generate_instance_uid=False)
    path = save(datasets, tmp_path)[1]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refusal(tmp_path)
    assert f"{path} is damaged or truncated (" in message or f"{path} has no pixel data" in message


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_corrupt_compressed_frame_is_refused(tmp_path, syntax):
    datasets = classic(stored(3, 32, 32))
    for dataset in datasets:
        dataset.compress(syntax, generate_instance_uid=False)
    path = save(datasets, tmp_path)[1]
    content = bytearray(path.read_bytes())
    start = len(content) - len(dcmread(path).PixelData)
    content[start + 24 : start + 200] = bytes(176)
    path.write_bytes(content)
    assert f"{path} is damaged or truncated (" in refusal(tmp_path)


def test_an_unknown_transfer_syntax_is_refused(tmp_path):
    datasets = classic(stored(3))
    for dataset in datasets:
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.103"
        dataset.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\4\0\0\0abcd"
        dataset["PixelData"].is_undefined_length = True
    save(datasets, tmp_path)
    assert "is compressed in a way that no decoder here reads; run pip install" in refusal(tmp_path)


def test_what_memory_cannot_hold_is_not_called_damaged(tmp_path, monkeypatch):
    (path, *_) = save(classic(stored(3)), tmp_path)

    def fail(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr(dicom, "_read_frames", fail)
    words = "does not fit into memory; is its header right? Crop it, or use a machine with more"
    assert refusal(tmp_path) == f"series Scan ({tmp_path}) of shape (5, 8, 3) {words}"
    monkeypatch.setattr("pydicom.dcmread", fail)
    assert refusal(path) == f"{path} {words}"


def test_one_file_of_a_series_asks_for_its_folder(tmp_path):
    path = save(classic(stored(3)), tmp_path)[0]
    assert f"{path} is the only slice" in refusal(path, read_header)


@pytest.mark.parametrize("content", [b"", b"DICM", b"no DICOM" * 40])
def test_a_file_that_is_not_dicom_is_refused(tmp_path, content):
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    assert "holds no DICOM series" in refusal(path)
    assert "holds no DICOM series" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("8.dcm", b"", "it is empty"), ("8.IMA", b"\0" * 900, "it does not begin as DICOM does")],
)
def test_a_slice_that_did_not_arrive_is_damage_of_the_series_beside_it(tmp_path, name, content, reason):
    for folder in ("a", "b"):
        save(classic(stored(7)), tmp_path / folder)
    lost = tmp_path / "a" / name
    lost.write_bytes(content)
    words = f"{lost} is damaged or truncated ({reason}); copy it again from its source"
    assert refusal(tmp_path / "a") == words
    bad, good = find_series(tmp_path, keep_going=True)
    assert refusal(bad) == words
    assert read_voxels(good).shape == (1, 5, 8, 7)


def test_a_preamble_followed_by_junk_is_refused(tmp_path):
    path = tmp_path / "a.dcm"
    for junk in (b"", b"\xff" * 300, b"\x08\x00\x16\x00UI\xff\xff" + b"1" * 20, b"\0" * 500):
        path.write_bytes(b"\0" * 128 + b"DICM" + junk)
        assert refusal(path, read_any_header).startswith(str(path))


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert "does not exist; give a DICOM file" in refusal(tmp_path / "none", find_series)


def test_a_broken_series_does_not_hide_the_others(tmp_path):
    good, bad = classic(stored(3)), classic(stored(3))
    each(SeriesNumber=8, SeriesInstanceUID=generate_uid())(bad)
    without(1)(bad)
    tilted(bad)
    save(good, tmp_path / "a")
    save(bad, tmp_path / "b")
    first, second = find_series(tmp_path)
    assert read_voxels(first).shape == (1, 5, 8, 3)
    assert "gantry tilt" in refusal(second)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file or directory"), PermissionError(13, "Permission denied")]
)
def test_a_file_that_cannot_be_read_is_the_fault_of_its_series_alone(tmp_path, monkeypatch, error):
    save(classic(stored()), tmp_path / "good")
    bad = save(classic(stored()), tmp_path / "bad", [f"{number}.dcm" for number in range(NUM)])[3]
    seen = Path.open

    def refusing(path, *arguments, **options):
        if path == bad:
            raise error
        return seen(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    first, second = collect_scans([tmp_path], channels=("CT",))
    assert second.num_voxels > 0 == first.num_voxels
    with pytest.raises(DataError, match=rf"3\.dcm cannot be read \({error.strerror}\)"):
        read_header(first.images[0])
    np.testing.assert_array_equal(
        np.sort(read_voxels(second.images[0]), axis=None), np.sort(stored(), axis=None)
    )
    with pytest.raises(type(error)):
        find_series(tmp_path)


@pytest.mark.parametrize(("memory", "fits"), [(2**22, True), (2**20, False)])
def test_a_deflated_file_that_unpacks_to_more_than_the_machine_has_is_refused(
    tmp_path, monkeypatch, memory, fits
):
    wide = stored(2, 1000, 1000)
    datasets = classic(wide)
    for dataset in datasets:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert all(2**20 < path.stat().st_size < 2_000_000 for path in save(datasets, tmp_path))
    monkeypatch.setattr(dicom_header.psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    if fits:
        np.testing.assert_array_equal(read_voxels(find_series(tmp_path)[0])[0].transpose(2, 1, 0), wide)
        return
    with pytest.raises(DataError, match="does not fit into memory"):
        find_series(tmp_path)


def test_a_file_that_goes_away_before_its_series_is_read_is_one_line(tmp_path):
    path = save(classic(stored()), tmp_path)[3]
    (series,) = find_series(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is damaged or truncated \\("):
        read_voxels(series)
