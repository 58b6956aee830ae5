"""DICOM series in: every voxel where the file says, against GDCM and against what was written."""

import copy
import logging
import os
import shutil
import warnings
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from dicom_files import (
    AXIAL,
    ORIGIN,
    SPACING,
    affine_of,
    classic,
    enhanced,
    read_voxels,
    rotation,
    save,
)
from medvisionllama.data.formats.dicom import read_header
from medvisionllama.data.formats.dicom_header import quiet
from medvisionllama.data.formats.dicom_series import files_below, find_series
from medvisionllama.data.readers import read_image, stem_of
from medvisionllama.data.readers import read_voxels as read_any
from medvisionllama.data.volume import from_ras, to_ras
from medvisionllama.errors import DataError

SHAPE = (6, 8, 5)  # z, y, x: slices, rows, columns


def voxels(dtype=np.int16, seed=0, shape=SHAPE):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def by_itk(folder):
    """The volume and the matrix to RAS as GDCM reads them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@pytest.mark.data
@pytest.mark.parametrize("name", ["13_HCropVolume", "FLAIR"])
def test_a_hospital_series_is_what_gdcm_reads(data_root, tmp_path, name):
    files = sorted((data_root / "dicom" / "study1" / name).iterdir())
    order = np.random.default_rng(0).permutation(len(files))
    for number, path in zip(order, files, strict=True):
        shutil.copy(path, tmp_path / f"{number}")
    array, affine = by_itk(data_root / "dicom" / "study1" / name)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], array)
    np.testing.assert_allclose(read_header(tmp_path).affine, affine, atol=1e-6)


@pytest.mark.data
def test_both_series_of_a_study_are_found(data_root):
    found = find_series(data_root / "dicom")
    assert [(series.description, len(series.files)) for series in found] == [
        ("HippoCrop", 32),
        ("FLAIR_reg", 22),
    ]
    assert len({series.name for series in found}) == 2
    assert read_any(found[1]).shape == (280, 320, 22)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-np.pi, np.pi)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 12)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    shape=st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6)),
    frames=st.booleans(),
)
def test_any_orientation_and_spacing_come_back(tmp_path_factory, angles, spacing, origin, shape, frames):
    folder = tmp_path_factory.mktemp("series")
    stored, place = (
        voxels(shape=shape),
        {"orientation": rotation(angles), "spacing": spacing, "origin": origin},
    )
    order = np.random.default_rng(1).permutation(shape[0])
    save([enhanced(stored, order=order, **place)] if frames else classic(stored, **place), folder)
    np.testing.assert_array_equal(read_voxels(folder)[0], stored.transpose(2, 1, 0))
    np.testing.assert_allclose(read_header(folder).affine, affine_of(**place), atol=1e-5)
    # In RAS and back, nothing moves.
    volume = read_any(folder)
    turned = to_ras(volume)
    np.testing.assert_array_equal(from_ras(turned.array, volume.affine), volume.array)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32])
def test_stored_types_keep_their_values(tmp_path, dtype):
    stored = voxels(dtype)
    save(classic(stored), tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0).astype(np.int64))


def test_whole_rescaling_gives_integers_and_is_what_gdcm_gives(tmp_path):
    stored = voxels(np.uint16) >> 4
    datasets = classic(stored)
    for dataset in datasets:
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.BitsStored, dataset.HighBit = (
            "2",
            "-1024",
            12,
            11,
        )
    save(datasets, tmp_path)
    read = read_voxels(tmp_path)
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read[0], stored.transpose(2, 1, 0).astype(int) * 2 - 1024)
    np.testing.assert_array_equal(read[0], by_itk(tmp_path)[0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_bits_beyond_those_stored_are_dropped_as_gdcm_does(tmp_path, dtype):
    stored = np.array([0xF123, 0x0123, 0x0923, 0xFFFF] * 2, np.uint16).view(dtype).reshape(2, 2, 2)
    datasets = classic(stored)
    for dataset in datasets:
        dataset.BitsStored, dataset.HighBit = 12, 11
    save(datasets, tmp_path)
    read = read_voxels(tmp_path)[0]
    assert read.max() < 1 << 12
    np.testing.assert_array_equal(read, by_itk(tmp_path)[0])


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"), [(1, -32768, np.int16), (1, -32769, np.int32), (-3, 7, np.int32)]
)
def test_rescaled_values_fit_their_type(tmp_path, slope, intercept, dtype):
    stored = voxels(np.uint16)
    stored[0, 0, :2] = 0, 65535
    datasets = classic(stored)
    for dataset in datasets:
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
    save(datasets, tmp_path)
    read = read_voxels(tmp_path)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read[0], stored.transpose(2, 1, 0).astype(int) * slope + intercept)


def test_each_slice_has_its_own_slope_as_in_pet(tmp_path):
    stored = voxels(np.uint16)
    datasets = classic(stored)
    slopes = 0.1 + np.arange(len(stored)) / 8
    for slope, dataset in zip(slopes, datasets, strict=True):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), "1.5"
    save(datasets, tmp_path)
    read = read_voxels(tmp_path)
    assert read.dtype == np.float32
    expected = (stored * slopes[:, None, None] + 1.5).astype(np.float32)
    np.testing.assert_array_equal(read[0], expected.transpose(2, 1, 0))


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.int16, 16)])
def test_monochrome1_is_inverted(tmp_path, dtype, bits):
    stored = voxels(dtype) >> (8 * np.dtype(dtype).itemsize - bits)
    datasets = classic(stored)
    for dataset in datasets:
        dataset.PhotometricInterpretation = "MONOCHROME1"
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
    save(datasets, tmp_path)
    top = -1 if np.dtype(dtype).kind == "i" else (1 << bits) - 1
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], top - stored.transpose(2, 1, 0).astype(int))


def test_what_is_measured_stays_as_it_is_however_it_is_shown(tmp_path):
    stored = voxels(np.uint16) >> 4
    datasets = classic(stored)
    for dataset in datasets:
        dataset.Modality, dataset.PhotometricInterpretation = "CT", "MONOCHROME1"
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    save(datasets, tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0).astype(int) - 1024)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_slices_are_read(tmp_path, syntax, dtype):
    stored = voxels(dtype, shape=(3, 32, 32))
    datasets = classic(stored)
    for dataset in datasets:
        dataset.compress(syntax, generate_instance_uid=False)
    save(datasets, tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_frames_of_one_file_are_read_in_their_order(tmp_path, syntax):
    stored = voxels(np.uint16, shape=(4, 32, 32))
    dataset = enhanced(stored, order=[2, 0, 3, 1])
    dataset.compress(syntax, generate_instance_uid=False)
    save([dataset], tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def compress_by_gdcm(path, syntax):
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    assert dcmread(path).file_meta.TransferSyntaxUID.is_compressed


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEGLosslessProcess14"])
def test_lossless_jpeg_is_read(tmp_path, syntax, dtype):
    stored = voxels(dtype, shape=(3, 32, 32))
    for path in save(classic(stored), tmp_path):
        compress_by_gdcm(path, syntax)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_lossy_jpeg_is_what_gdcm_reads(tmp_path):
    # A smooth image: what the two decoders round differently stays small.
    grid = np.add.outer(np.arange(32), np.arange(32))
    stored = np.stack([grid + 10 * index for index in range(3)]).astype(np.uint8)
    for path in save(classic(stored), tmp_path):
        compress_by_gdcm(path, "JPEGBaselineProcess1")
    read = read_voxels(tmp_path)[0].astype(int)
    np.testing.assert_allclose(read, by_itk(tmp_path)[0], atol=1)
    np.testing.assert_allclose(read, stored.transpose(2, 1, 0), atol=4)


def test_jpeg_that_no_decoder_reads_is_refused_without_a_log(tmp_path, caplog):
    datasets = classic(voxels(np.uint16, shape=(3, 32, 32)) >> 4)
    for dataset in datasets:
        dataset.BitsStored, dataset.HighBit = 12, 11
    for path in save(datasets, tmp_path):
        compress_by_gdcm(path, "JPEGExtendedProcess2_4")
    with pytest.raises(DataError, match="compressed in a way that no decoder here reads; run pip install"):
        read_voxels(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("first", ["SOPClassUID", "ImageType"])
def test_implicit_syntax_and_a_missing_preamble_are_read(tmp_path, first):
    stored = voxels()
    for number, dataset in enumerate(classic(stored)):
        del dataset.file_meta
        if first == "ImageType":
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        assert next(iter(dataset)).keyword == first
        dataset.save_as(tmp_path / str(number), implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_implicit_syntax_is_read(tmp_path):
    stored = voxels()
    datasets = classic(stored)
    for dataset in datasets:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    save(datasets, tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_frames_have_slopes_of_their_own(tmp_path):
    stored = voxels(np.uint16)
    slopes = [1.5, 2.0, 0.25, 3.0, 1.0, 0.5]
    path = save([enhanced(stored, order=[5, 1, 0, 3, 2, 4], slopes=slopes)], tmp_path, ["a.dcm"])[0]
    expected = (stored * np.array(slopes)[:, None, None] - 3).astype(np.float32)
    np.testing.assert_array_equal(read_voxels(path)[0], expected.transpose(2, 1, 0))
    np.testing.assert_allclose(read_header(path).affine, affine_of())


def test_frames_without_slopes_have_that_of_their_file_as_in_secondary_captures(tmp_path):
    stored = voxels(np.uint16) >> 4
    dataset = enhanced(stored)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"
    dataset.Modality, dataset.RescaleSlope, dataset.RescaleIntercept = "CT", "2", "-1024"
    dataset.BitsStored, dataset.HighBit = 12, 11
    save([dataset], tmp_path)
    read = read_voxels(tmp_path)
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read[0], stored.transpose(2, 1, 0).astype(int) * 2 - 1024)


def test_frames_may_repeat_plane_and_pixel_size_each(tmp_path):
    stored, place = voxels(), {"orientation": rotation((0.2, -0.4, 1.0)), "spacing": (0.7, 0.9, 3.0)}
    dataset = enhanced(stored, **place)
    (shared,) = dataset.SharedFunctionalGroupsSequence
    for own in dataset.PerFrameFunctionalGroupsSequence:
        own.PlaneOrientationSequence = shared.PlaneOrientationSequence
        own.PixelMeasuresSequence = shared.PixelMeasuresSequence
    del dataset.SharedFunctionalGroupsSequence
    save([dataset], tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))
    np.testing.assert_allclose(read_header(tmp_path).affine, affine_of(**place), atol=1e-6)


def test_a_series_that_highdicom_converted_reads_as_before(tmp_path):
    from highdicom.legacy import LegacyConvertedEnhancedMRImage

    stored = voxels()
    save(classic(stored, orientation=rotation((0.2, -0.4, 1.0))), tmp_path / "classic")
    datasets = [dcmread(path) for path in sorted((tmp_path / "classic").iterdir())]
    converted = LegacyConvertedEnhancedMRImage(
        datasets,
        series_instance_uid=generate_uid(),
        series_number=8,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )
    (tmp_path / "one").mkdir()
    converted.save_as(tmp_path / "one" / "file")
    np.testing.assert_array_equal(read_voxels(tmp_path / "one"), read_voxels(tmp_path / "classic"))
    classic_affine = read_header(tmp_path / "classic").affine
    np.testing.assert_allclose(read_header(tmp_path / "one").affine, classic_affine)


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_read(tmp_path, keyword):
    dtype = np.float32 if keyword == "FloatPixelData" else np.float64
    stored = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    dataset = enhanced(voxels())
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.30"
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, name)
    dataset.BitsAllocated = 8 * np.dtype(dtype).itemsize
    setattr(dataset, keyword, stored.astype(dtype).tobytes())
    save([dataset], tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_slices_that_count_downwards_give_the_same_volume(tmp_path):
    stored = voxels()
    datasets = classic(stored)
    for number, dataset in enumerate(datasets):
        dataset.InstanceNumber = len(datasets) - number
    save(datasets, tmp_path)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_positions_rounded_to_a_tenth_are_accepted(tmp_path):
    datasets = classic(voxels(), spacing=(0.5, 0.5, 2.51))
    for dataset in datasets:
        dataset.ImagePositionPatient = [f"{float(value):.1f}" for value in dataset.ImagePositionPatient]
    save(datasets, tmp_path)
    assert read_header(tmp_path).spacing_mm[2] == pytest.approx(2.51, abs=0.02)


def test_the_same_image_under_two_names_counts_once(tmp_path):
    stored = voxels()
    paths = save(classic(stored), tmp_path)
    shutil.copy(paths[2], tmp_path / "copy.dcm")
    (tmp_path / "backup").mkdir()
    shutil.copy(paths[3], tmp_path / "backup" / paths[3].name)
    assert len(find_series(tmp_path)[0].files) == len(stored)
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_another_image_of_the_same_uid_size_and_time_is_no_copy(tmp_path):
    stored = voxels()
    datasets = classic(stored)
    other = copy.deepcopy(datasets[2])
    other.PixelData = bytes(len(other.PixelData))
    for path in save([*datasets, other], tmp_path):
        os.utime(path, (1, 1))
    with pytest.raises(DataError, match="two different images of one place"):
        read_voxels(tmp_path)


def test_what_is_no_scan_is_passed_over(tmp_path):
    stored = voxels()
    save(classic(stored), tmp_path / "a" / "b")
    (tmp_path / "README.txt").write_text("exported by a program")
    (tmp_path / "DICOMDIR").write_bytes(b"not even DICOM")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_bytes(b"\0" * 128 + b"DICM" + b"junk")
    localiser, report, dose, screenshot = classic(stored)[:4]
    localiser.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    report.Modality, report.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.11"
    dose.Modality = "RTDOSE"
    screenshot.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    del report.Rows, screenshot.ImagePositionPatient
    for dataset in (localiser, report, dose, screenshot):
        dataset.SeriesInstanceUID = generate_uid()
    raw = classic(stored)[0]
    raw.SOPClassUID, raw.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.66", generate_uid()
    del raw.Rows
    save([localiser, report, dose, screenshot, raw], tmp_path / "a", names=["l", "r", "d", "s", "w"])
    (series,) = find_series(tmp_path)
    assert (series.description, series.number, series.folder) == ("Scan", 7, tmp_path / "a" / "b")
    np.testing.assert_array_equal(read_voxels(tmp_path)[0], stored.transpose(2, 1, 0))


def test_one_series_in_several_folders_is_one(tmp_path):
    stored = voxels()
    datasets = classic(stored)
    save(datasets[::2], tmp_path / "x" / "1")
    save(datasets[1::2], tmp_path / "x" / "2")
    (series,) = find_series(tmp_path)
    assert series.folder == tmp_path / "x"
    np.testing.assert_array_equal(read_voxels(series)[0], stored.transpose(2, 1, 0))


def test_one_series_given_from_here_and_from_the_root_is_one(tmp_path, monkeypatch):
    datasets = classic(voxels())
    save(datasets[::2], tmp_path / "x" / "1")
    save(datasets[1::2], tmp_path / "x" / "2")
    monkeypatch.chdir(tmp_path / "x")
    (series,) = find_series(Path("1"), tmp_path / "x" / "2")
    assert series.folder == tmp_path / "x"
    assert len(series.files) == len(datasets)


def test_links_are_followed_and_end_where_they_lead_back(tmp_path):
    stored = voxels()
    store, cohort = tmp_path / "store" / "P001", tmp_path / "cohort"
    save(classic(stored), store)
    cohort.mkdir()
    (cohort / "P001").symlink_to(store)
    (store / "back").symlink_to(cohort)
    assert len(files_below(cohort)) == len(stored)
    (series,) = find_series(cohort)
    assert series.folder == cohort / "P001"
    np.testing.assert_array_equal(read_voxels(series)[0], stored.transpose(2, 1, 0))


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, unlistable):
    datasets = classic(voxels())
    save(datasets[:3], tmp_path / "a")
    save(datasets[3:], tmp_path / "b")
    unlistable("b")
    with pytest.raises(PermissionError) as caught:
        find_series(tmp_path)
    assert caught.value.filename == str(tmp_path / "b")


def test_a_multiframe_file_without_suffix_is_a_scan_of_its_own(tmp_path):
    stored = voxels()
    (path,) = save([enhanced(stored)], tmp_path, ["IM0001"])
    np.testing.assert_array_equal(read_any(path).array[0], stored.transpose(2, 1, 0))
    (tmp_path / "notes").write_text("no scan")
    with pytest.raises(
        DataError, match=r"is not a scan we read; allowed: .+ or a folder with one DICOM series"
    ):
        read_any(tmp_path / "notes")


def test_warnings_of_others_are_as_loud_as_before(tmp_path):
    save(classic(voxels()), tmp_path)
    before = list(warnings.filters)
    read_voxels(tmp_path)
    assert warnings.filters == before


def test_threads_that_read_at_once_leave_others_as_loud_as_before():
    logger, before = logging.getLogger("pydicom"), list(warnings.filters)
    inside, leave = Event(), Event()

    def read():
        with quiet():
            inside.set()
            leave.wait(10)

    level = logger.level
    thread = Thread(target=read)
    thread.start()
    inside.wait(10)
    with quiet():
        leave.set()
        thread.join()
        # The first to come has gone, and the last is still within.
        assert logger.level > logging.CRITICAL
    assert logger.level == level
    assert warnings.filters == before


def test_a_series_reads_as_its_folder_does(tmp_path):
    stored = voxels()
    save(classic(stored), tmp_path / "scan.v2")
    (series,) = find_series(tmp_path)
    for source in (series, tmp_path / "scan.v2"):
        volume = read_image((source,))
        np.testing.assert_array_equal(volume.array[0], stored.transpose(2, 1, 0).astype(np.float32))
        np.testing.assert_allclose(volume.affine, affine_of(AXIAL, SPACING, ORIGIN))
    assert stem_of(tmp_path / "scan.v2") == "scan.v2"
    assert stem_of(series) == series.name


@pytest.mark.parametrize(
    ("description", "number", "start"),
    [
        ("T1 w/ contrast: ../x", 3, "3_T1_w_contrast_x_"),
        ("Überblick", 3, "3_berblick_"),
        ("", None, "MR_"),
        ("brain of DOE", 4, "4_MR_"),
        ("id-4711 head", 4, "4_MR_"),
    ],
)
def test_the_name_of_a_series_is_a_file_name_without_the_patient(tmp_path, description, number, start):
    datasets = classic(voxels())
    for dataset in datasets:
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.SeriesDescription, dataset.SeriesNumber = description, number
    save(datasets, tmp_path)
    (series,) = find_series(tmp_path)
    assert series.name.startswith(start)
    assert set(series.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
    assert "doe" not in f"{series.name}{series}{series!r}".casefold().replace(str(tmp_path).casefold(), "")


@pytest.mark.parametrize(
    ("patient", "description", "kept"),
    [
        ("Li^Wei", "T1 LI", False),
        ("Li^Wei", "T1_li_head", False),
        ("Li^Wei", "liver", True),
        ("DOE_JANET", "head of Janet", False),
        ("Wang^Xiaoming=王^小明", "Kopf 王", False),
        ("Kim^A", "a brain", True),
        ("Garcia-Lopez^Maria", "Garcia abdomen", False),
        ("O'Brien^Pat", "OBRIEN knee", False),
        ("Müller^Hans", "Mueller HWS", False),
        ("Mu\u0308ller^Hans", "MULLER HWS", False),
        ("Muller^Hans", "Müller HWS", False),
        ("Wałęsa^Ewa", "WALESA brain", False),
        ("Đặng^An", "Dang T1", False),
        ("Yılmaz^Ada", "YILMAZ", False),
    ],
)
def test_a_description_with_a_short_name_of_the_patient_is_left_out(tmp_path, patient, description, kept):
    datasets = classic(voxels())
    for dataset in datasets:
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.PatientName, dataset.SeriesDescription = patient, description
    save(datasets, tmp_path)
    (series,) = find_series(tmp_path)
    assert series.description == (description if kept else "")


def test_a_description_with_the_day_of_birth_is_left_out(tmp_path):
    datasets = classic(voxels())
    for dataset in datasets:
        dataset.SeriesDescription = "head 19700101"
    save(datasets, tmp_path)
    assert datasets[0].PatientBirthDate == "19700101"
    assert find_series(tmp_path)[0].description == ""


def test_images_that_were_exchanged_since_their_series_was_found_are_refused(tmp_path):
    names = [f"IM{number}" for number in range(len(voxels()))]
    first, other = classic(voxels()), classic(voxels(), origin=(0.0, 0.0, 90.0))
    save(first, tmp_path, names)
    (series,) = find_series(tmp_path)
    save(other, tmp_path, names)
    with pytest.raises(DataError, match="IM0 holds another image than when its series was found"):
        read_voxels(series)
    save(first, tmp_path, names)
    np.testing.assert_array_equal(read_voxels(series), read_voxels(tmp_path))
