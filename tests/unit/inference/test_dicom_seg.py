"""DICOM masks out: the voxels, names, codes and colours that went in, read by highdicom and by dcmqi."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from highdicom.seg import segread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.sequence import Sequence

from dicom_files import (
    PATIENT,
    classic,
    ds,
    enhanced,
    item,
    on_grid,
    read_seg,
    read_voxels,
    rotation,
    save,
)
from medvisionllama.colours import OKABE_ITO
from medvisionllama.data.formats.dicom import read_header
from medvisionllama.data.formats.dicom_grid import grid_of
from medvisionllama.data.formats.dicom_labels import read_classes, segment_labels
from medvisionllama.data.formats.dicom_series import find_series
from medvisionllama.data.planning import Plan
from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.volume import to_ras
from medvisionllama.errors import DataError
from medvisionllama.evaluation.evaluate import evaluate_folders
from medvisionllama.evaluation.explain.targets import ScanToExplain, read_truth
from medvisionllama.inference.anatomy import SCHEME, anatomy_of
from medvisionllama.inference.dicom_seg import write_seg

CLASSES = {0: "background", 1: "Liver", 2: "left kidney", 5: "oedema", 7: "Zyste Ü 肝"}
OBLIQUE = rotation((0.3, -0.5, 2.0))
SHAPE = (6, 8, 5)
DCMQI = Path(sys.executable).parent / "segimage2itkimage"


def stored(shape=SHAPE):
    return np.random.default_rng(0).integers(0, 4000, shape, dtype=np.int16)


def random_mask(shape, seed=0, values=(0, 1, 2, 5)):
    return np.random.default_rng(seed).choice(values, shape).astype(np.uint8)


def series_of(folder, **place):
    save(classic(stored(), **place), folder)
    return find_series(folder)[0]


def by_dcmqi(path):
    """Label volume `[x, y, z]`, matrix to RAS and segment attributes, as dcmqi's converter gives them."""
    command = [DCMQI, "--inputDICOM", path, "--outputDirectory", path.parent, "-t", "nrrd", "--mergeSegments"]
    done = subprocess.run([*command, "-p", path.stem], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (volume,) = path.parent.glob(f"{path.stem}-*.nrrd")
    image = sitk.ReadImage(str(volume))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    attributes = json.loads((path.parent / f"{path.stem}-meta.json").read_text())["segmentAttributes"]
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    return array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, [one for group in attributes for one in group]


def by_highdicom(path):
    volume = segread(path).get_volume(combine_segments=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    return volume.array, affine


def segment_numbers(mask, values):
    """What a reader finds: present classes, counted from 1."""
    expected = np.zeros(mask.shape, int)
    for number, value in enumerate(values, start=1):
        expected[mask == value] = number
    return expected


def check_everywhere(path, mask, header, values):
    expected = segment_numbers(mask, values)
    np.testing.assert_array_equal(on_grid(*by_highdicom(path), header), expected)
    array, affine, _ = by_dcmqi(path)
    np.testing.assert_array_equal(on_grid(array, affine, header), expected)
    np.testing.assert_array_equal(read_seg(path, header), expected)
    np.testing.assert_array_equal(read_seg(path, header, CLASSES), mask)


@pytest.mark.data
@pytest.mark.parametrize("name", ["13_HCropVolume", "FLAIR"])
def test_a_mask_of_a_hospital_series_comes_back(data_root, tmp_path, name):
    (series,) = find_series(data_root / "dicom" / "study1" / name)
    header = read_header(series)
    mask = random_mask(header.shape)
    mask[:, :, :2] = mask[:, :, -1] = 0
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    check_everywhere(tmp_path / "mask.dcm", mask, header, (1, 2, 5))
    seg = dcmread(tmp_path / "mask.dcm")
    referenced = seg.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == series.series_uid
    uids = [item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence]
    assert sorted(uids) == sorted(dcmread(file).SOPInstanceUID for file in series.files)


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, -1, 0), OBLIQUE]
)
@pytest.mark.parametrize("frames", [False, True])
def test_a_mask_comes_back_in_any_orientation(tmp_path, orientation, frames):
    if frames:
        save([enhanced(stored(), orientation=orientation, order=[3, 1, 5, 0, 2, 4])], tmp_path / "scan")
    else:
        save(classic(stored(), orientation=orientation), tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    header = read_header(series)
    mask = random_mask(header.shape)
    mask[:, :, 0] = 0
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    check_everywhere(tmp_path / "mask.dcm", mask, header, (1, 2, 5))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-np.pi, np.pi)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 9)] * 3),
    first=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_any_mask_comes_back(tmp_path_factory, angles, spacing, first, seed):
    folder = tmp_path_factory.mktemp("scan")
    series = series_of(folder / "scan", orientation=rotation(angles), spacing=spacing)
    header = read_header(series)
    mask = random_mask(header.shape, seed)
    mask[:, :, :first] = 0
    write_seg(folder / "mask.dcm", mask, series, CLASSES)
    np.testing.assert_array_equal(read_seg(folder / "mask.dcm", header, CLASSES), mask)
    read = read_label(folder / "mask.dcm")
    np.testing.assert_array_equal(on_grid(read.array, read.affine, header), segment_numbers(mask, (1, 2, 5)))


def test_frames_of_a_multiframe_scan_are_referred_to(tmp_path):
    save([enhanced(stored(), order=[3, 1, 5, 0, 2, 4])], tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    mask = np.zeros(read_header(series).shape, np.uint8)
    mask[1, 2, 5] = 1
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    (frame,) = dcmread(tmp_path / "mask.dcm").PerFrameFunctionalGroupsSequence
    source = frame.DerivationImageSequence[0].SourceImageSequence[0]
    # The highest slice is the third frame of the file; DICOM counts from 1.
    assert source.ReferencedFrameNumber == 3
    assert source.ReferencedSOPInstanceUID == dcmread(series.files[0]).SOPInstanceUID


def test_names_codes_and_colours_come_back(tmp_path):
    series = series_of(tmp_path / "scan")
    mask = random_mask(read_header(series).shape, values=(0, 2, 5, 7))
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    _, _, attributes = by_dcmqi(tmp_path / "mask.dcm")
    assert [one["SegmentLabel"] for one in attributes] == ["left kidney", "oedema", "Zyste Ü 肝"]
    assert segment_labels(tmp_path / "mask.dcm") == {1: "left kidney", 2: "oedema", 3: "Zyste Ü 肝"}
    kidney, oedema, unknown = attributes
    assert kidney["SegmentedPropertyCategoryCodeSequence"]["CodeMeaning"] == "Anatomical Structure"
    assert kidney["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == "64033007"
    assert kidney["SegmentedPropertyTypeModifierCodeSequence"]["CodeMeaning"] == "Left"
    assert oedema["SegmentedPropertyCategoryCodeSequence"]["CodeValue"] == "49755003"
    assert oedema["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == "79654002"
    assert unknown["SegmentedPropertyTypeCodeSequence"]["CodeMeaning"] == "Zyste Ü 肝"
    assert {one["SegmentAlgorithmName"] for one in attributes} == {"medvisionllama"}
    # The colour of a class is the one it has in pictures, whichever classes were found.
    for one, colour in zip(attributes, OKABE_ITO[1:4], strict=True):
        shown = np.array(one["recommendedDisplayRGBValue"])
        written = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
        assert np.abs(shown - written).max() <= 1


def test_patient_and_study_are_the_scans(tmp_path):
    series = series_of(tmp_path / "scan")
    mask = random_mask(read_header(series).shape)
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    seg, scan = dcmread(tmp_path / "mask.dcm"), dcmread(series.files[0])
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
                    "StudyID", "AccessionNumber", "FrameOfReferenceUID"):  # fmt: skip
        assert seg[keyword].value == scan[keyword].value, keyword
    assert (seg.Modality, seg.SeriesNumber, seg.InstanceNumber) == ("SEG", 1007, 1)
    assert (seg.Manufacturer, seg.SegmentationType) == ("medvisionllama", "BINARY")
    assert seg.SeriesInstanceUID != scan.SeriesInstanceUID
    assert seg.SegmentsOverlap == "NO"


def test_texts_of_another_character_set_are_written_in_the_masks(tmp_path):
    datasets = classic(stored())
    for dataset in datasets:
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName = "Schäfer^Jürgen"
        code = item(CodeValue="1", CodingSchemeDesignator="99X", CodeMeaning="CT Schädel")
        dataset.ProcedureCodeSequence = Sequence([code])
    save(datasets, tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    write_seg(tmp_path / "mask.dcm", random_mask(read_header(series).shape), series, CLASSES)
    seg = dcmread(tmp_path / "mask.dcm")
    assert seg.SpecificCharacterSet == "ISO_IR 192"
    assert (seg.PatientName, seg.ProcedureCodeSequence[0].CodeMeaning) == ("Schäfer^Jürgen", "CT Schädel")


def test_elements_that_deidentification_removed_are_written_empty(tmp_path):
    datasets = classic(stored())
    for dataset in datasets:
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                        "StudyDate", "StudyTime", "SeriesNumber", "SeriesDescription"):  # fmt: skip
            delattr(dataset, keyword)
    save(datasets, tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    mask = random_mask(read_header(series).shape)
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    check_everywhere(tmp_path / "mask.dcm", mask, read_header(series), (1, 2, 5))
    assert dcmread(tmp_path / "mask.dcm").PatientID == ""


def test_a_sex_that_the_standard_does_not_know_is_left_empty(tmp_path):
    datasets = classic(stored())
    for dataset in datasets:
        dataset.PatientSex = "W"
    save(datasets, tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    write_seg(tmp_path / "mask.dcm", random_mask(read_header(series).shape), series, CLASSES)
    assert dcmread(tmp_path / "mask.dcm").PatientSex == ""


def test_a_mask_with_nothing_in_it_says_what_was_looked_for(tmp_path):
    series = series_of(tmp_path / "scan", orientation=OBLIQUE)
    header = read_header(series)
    write_seg(tmp_path / "mask.dcm", np.zeros(header.shape, np.uint8), series, CLASSES)
    assert segment_labels(tmp_path / "mask.dcm") == {1: "Liver"}
    read = read_label(tmp_path / "mask.dcm")
    assert read.shape == header.shape
    assert not read.array.any()
    np.testing.assert_allclose(read.affine, header.affine, atol=1e-6)
    array, _, _ = by_dcmqi(tmp_path / "mask.dcm")
    assert array.shape == header.shape
    assert not array.any()


def test_a_single_slice_with_a_mask_comes_back(tmp_path):
    series = series_of(tmp_path / "scan", orientation=OBLIQUE)
    header = read_header(series)
    mask = np.zeros(header.shape, np.uint8)
    mask[2:4, 3:6, 4] = 5
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    np.testing.assert_array_equal(read_seg(tmp_path / "mask.dcm", header, CLASSES), mask)
    array, affine, _ = by_dcmqi(tmp_path / "mask.dcm")
    np.testing.assert_array_equal(on_grid(array, affine, header), (mask > 0).astype(int))


def test_three_hundred_classes_come_back(tmp_path):
    series = series_of(tmp_path / "scan")
    header = read_header(series)
    mask = np.arange(np.prod(header.shape), dtype=np.uint16).reshape(header.shape) % 301
    classes = {value: f"structure {value}" for value in range(1, 301)}
    write_seg(tmp_path / "mask.dcm", mask, series, classes)
    mask[mask > 300] = 0
    np.testing.assert_array_equal(read_seg(tmp_path / "mask.dcm", header, classes), mask)


def test_names_that_dicom_cannot_hold_are_shortened(tmp_path):
    series = series_of(tmp_path / "scan")
    mask = random_mask(read_header(series).shape, values=(0, 1, 2))
    write_seg(tmp_path / "mask.dcm", mask, series, {1: "a\\b", 2: "long " * 30})
    assert segment_labels(tmp_path / "mask.dcm") == {1: "a/b", 2: ("long " * 30)[:64].strip()}


def test_segments_that_overlap_are_refused(tmp_path):
    series = series_of(tmp_path / "scan")
    mask = random_mask(read_header(series).shape, values=(0, 1, 2))
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    seg = dcmread(tmp_path / "mask.dcm")
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    size = seg.Rows * seg.Columns
    frames = bits[: size * seg.NumberOfFrames].reshape(seg.NumberOfFrames, size)
    segment = [
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for group in seg.PerFrameFunctionalGroupsSequence
    ]
    free = int(np.flatnonzero(frames[segment.index(1)] & ~frames[segment.index(2)] & 1)[0])
    frames[segment.index(2), free] = 1
    seg.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
    seg.save_as(tmp_path / "overlap.dcm")
    with pytest.raises(
        DataError, match=r"segments 1 \(Liver\) and 2 \(left kidney\) overlap in 1 voxels; allowed"
    ):
        read_voxels(tmp_path / "overlap.dcm")


def test_probabilities_are_refused_as_a_mask(tmp_path):
    series = series_of(tmp_path / "scan")
    write_seg(tmp_path / "mask.dcm", random_mask(read_header(series).shape), series, CLASSES)
    seg = dcmread(tmp_path / "mask.dcm")
    seg.SegmentationType = "FRACTIONAL"
    seg.SegmentationFractionalType, seg.MaximumFractionalValue = "PROBABILITY", 1
    seg.save_as(tmp_path / "fractional.dcm")
    with pytest.raises(DataError, match="holds probabilities"):
        read_voxels(tmp_path / "fractional.dcm")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_mask_is_refused(tmp_path, share):
    series = series_of(tmp_path / "scan")
    write_seg(tmp_path / "mask.dcm", random_mask(read_header(series).shape), series, CLASSES)
    content = (tmp_path / "mask.dcm").read_bytes()
    (tmp_path / "mask.dcm").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"mask\.dcm") as caught:
        read_voxels(tmp_path / "mask.dcm")
    assert "\n" not in str(caught.value)


def test_a_segment_that_is_no_class_is_refused(tmp_path):
    series = series_of(tmp_path / "scan")
    write_seg(tmp_path / "mask.dcm", random_mask(read_header(series).shape), series, CLASSES)
    with pytest.raises(DataError, match=r"segment Liver is none of spleen; rename it"):
        read_classes(tmp_path / "mask.dcm", {1: "spleen"})


def test_merged_labels_may_have_segments_of_any_name(tmp_path):
    """A run that knows one foreground is scored against labels of many classes, `--merged` or `explain --label`."""
    series = series_of(tmp_path / "scan")
    header = read_header(series)
    label = random_mask(header.shape)
    for folder in ("masks", "labels"):
        (tmp_path / folder).mkdir()
    write_seg(tmp_path / "labels" / "scan.dcm", label, series, CLASSES)
    write_seg(tmp_path / "masks" / "scan.dcm", (label > 0).astype(np.uint8), series, {1: "foreground"})
    table = evaluate_folders(tmp_path / "masks", tmp_path / "labels", merged=True)
    assert table[["class", "dice"]].values.tolist() == [["foreground", 1.0]]
    scan = ScanToExplain("scan", "scan", (series,), tmp_path / "labels" / "scan.dcm", named=True)
    image = to_ras(read_image((series,)))
    plan = Plan(
        channels=("CT",),
        classes={1: "Liver", 2: "left kidney"},
        merged=True,
        resize=False,
        spacing_mm=image.spacing_mm,
        crop_size=SHAPE,
        strides=((2, 2, 2), (4, 4, 4), (8, 8, 8)),
        flip_axes=(),
    )
    assert read_truth(scan, image, plan).sum() == (label > 0).sum()
    # Of classes that count by themselves, names must be known.
    with pytest.raises(DataError, match="segment oedema is none of Liver, left kidney"):
        read_truth(scan, image, plan.model_copy(update={"merged": False}))


def test_a_mask_beside_its_scan_is_no_series_of_images(tmp_path):
    series = series_of(tmp_path / "scan")
    write_seg(tmp_path / "scan" / "mask.dcm", random_mask(read_header(series).shape), series, CLASSES)
    assert find_series(tmp_path / "scan") == (series,)


def _without_frame_of_reference(folder):
    datasets = classic(stored())
    for dataset in datasets:
        del dataset.FrameOfReferenceUID
    save(datasets, folder)


def _in_two_files(folder):
    low, high = enhanced(stored((3, 8, 5))), enhanced(stored((3, 8, 5)), origin=(-10, 20, 45))
    high.SeriesInstanceUID = low.SeriesInstanceUID
    save([low, high], folder)


def _in_a_file_for_each_frame(folder):
    frames = [enhanced(stored((1, 8, 5)), origin=(-10, 20, 30 + 5 * number)) for number in range(6)]
    for frame in frames:
        frame.SeriesInstanceUID = frames[0].SeriesInstanceUID
    save(frames, folder)


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA")
@pytest.mark.parametrize(
    ("prepare", "mask", "name", "message"),
    [
        (None, np.ones((5, 8, 6)), "mask.nii.gz", "a DICOM mask is written as .dcm"),
        (
            None,
            np.ones((5, 8, 5)),
            "mask.dcm",
            r"the mask has shape \(5, 8, 5\), series Scan .+ has \(5, 8, 6\)",
        ),
        (None, np.full((5, 8, 6), 3), "mask.dcm", r"values without a class name \(\[3\]\)"),
        (None, np.full((5, 8, 6), -1), "mask.dcm", r"values without a class name \(\[-1\]\)"),
        (_without_frame_of_reference, np.ones((5, 8, 6)), "mask.dcm", "has no FrameOfReferenceUID"),
        (_in_two_files, np.ones((5, 8, 6)), "mask.dcm", "spread over 2 multi-frame files"),
        (_in_a_file_for_each_frame, np.ones((5, 8, 6)), "mask.dcm", "spread over 6 multi-frame files"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, prepare, mask, name, message):
    (prepare or series_of)(tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    out = tmp_path / "out" / name
    with pytest.raises(DataError, match=message) as caught:
        write_seg(out, mask.astype(np.int16), series, CLASSES)
    assert "\n" not in str(caught.value)
    assert not any(word in str(caught.value) for word in (*PATIENT, "Doe"))
    assert not out.parent.exists()


def test_an_existing_mask_survives_a_refusal(tmp_path):
    series = series_of(tmp_path / "scan")
    path = tmp_path / "mask.dcm"
    path.write_text("precious")
    with pytest.raises(DataError):
        write_seg(path, np.full((5, 8, 6), 3, np.uint8), series, CLASSES)
    assert path.read_text() == "precious"
    write_seg(path, np.ones((5, 8, 6), np.uint8), series, CLASSES)
    assert segment_labels(path) == {1: "Liver"}
    assert sorted(child.name for child in tmp_path.iterdir()) == ["mask.dcm", "scan"]


@pytest.mark.parametrize(
    ("name", "category", "kind", "modifier"),
    [
        ("Liver", "Anatomical Structure", "10200004", None),
        ("RIGHT_LUNG", "Anatomical Structure", "39607008", "Right"),
        ("kidney left", "Anatomical Structure", "64033007", "Left"),
        ("Left Ventricle", "Anatomical Structure", "87878005", None),
        ("RV", "Anatomical Structure", "53085002", None),
        ("Tumour", "Morphologically Abnormal Structure", "108369006", None),
        ("liver tumor", "Morphologically Abnormal Structure", "108369006", None),
        ("hippocampus", "Anatomical Structure", "5366008", None),
        ("white-matter", "Tissue", "389080008", None),
    ],
)
def test_known_names_have_snomed_codes(name, category, kind, modifier):
    anatomy = anatomy_of(name)
    assert (anatomy.category.meaning, anatomy.kind.value) == (category, kind)
    assert anatomy.kind.scheme_designator == "SCT"
    assert (anatomy.modifier and anatomy.modifier.meaning) == modifier


@pytest.mark.parametrize("name", ["left", "", "left something", "Klasse 7", "x" * 200, "liver and spleen"])
def test_other_names_have_a_code_of_their_own(name):
    anatomy = anatomy_of(name)
    assert anatomy.kind.scheme_designator == SCHEME
    assert 0 < len(anatomy.kind.meaning) <= 64
    assert len(anatomy.kind.value) <= 16
    assert anatomy == anatomy_of(name)
    assert anatomy.kind.value != anatomy_of(name + "?").kind.value


def test_every_name_of_the_table_is_a_code_that_pydicom_knows():
    from medvisionllama.inference import anatomy

    for name in (*anatomy._ORGANS, *anatomy._TISSUES, *anatomy._CHANGES):
        assert anatomy_of(name).kind.scheme_designator == "SCT", name


def test_a_label_map_reads_like_a_binary_mask(tmp_path):
    import highdicom

    series = series_of(tmp_path / "scan")
    header = read_header(series)
    mask = random_mask(header.shape, values=(0, 1, 2))
    write_seg(tmp_path / "mask.dcm", mask, series, CLASSES)
    binary = segread(tmp_path / "mask.dcm")
    labelmap = highdicom.seg.Segmentation(
        source_images=[dcmread(file) for file in series.files],
        pixel_array=np.ascontiguousarray(mask.transpose(2, 1, 0)),
        segmentation_type="LABELMAP",
        segment_descriptions=[binary.get_segment_description(number) for number in (1, 2)],
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="x",
        manufacturer_model_name="x",
        software_versions="x",
        device_serial_number="x",
    )
    labelmap.save_as(tmp_path / "labelmap.dcm")
    np.testing.assert_array_equal(read_seg(tmp_path / "labelmap.dcm", header), mask)
    np.testing.assert_array_equal(read_seg(tmp_path / "labelmap.dcm", header, CLASSES), mask)
    # highdicom describes the background as segment 0.
    assert segment_labels(tmp_path / "labelmap.dcm") == {1: "Liver", 2: "left kidney"}


@pytest.mark.parametrize("thickness", [None, "absent"])
def test_a_scan_that_does_not_say_its_slices_thickness_gets_a_mask(tmp_path, thickness):
    datasets = classic(stored())
    for dataset in datasets:
        if thickness is None:
            dataset.SliceThickness = None
        else:
            del dataset.SliceThickness
    save(datasets, tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    mask = np.zeros(grid_of(series).shape, np.uint8)
    mask[1, 1, 0] = 1
    write_seg(tmp_path / "mask.dcm", mask, series, {1: "liver"})
    np.testing.assert_array_equal(read_seg(tmp_path / "mask.dcm", grid_of(series), {1: "liver"}), mask)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientBirthDate", "1.2.1950"), ("StudyDate", "00000000"), ("StudyDate", "Doe^Janet")],
)
def test_dates_that_are_none_are_left_empty(tmp_path, keyword, value):
    datasets = classic(stored())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dataset in datasets:
            setattr(dataset, keyword, value)
        save(datasets, tmp_path / "scan")
        (series,) = find_series(tmp_path / "scan")
        mask = np.ones(grid_of(series).shape, np.uint8)
        write_seg(tmp_path / "mask.dcm", mask, series, {1: "liver"})
    assert not dcmread(tmp_path / "mask.dcm").get(keyword)


def test_names_that_differ_behind_the_64th_character_stay_apart(tmp_path):
    save(classic(stored()), tmp_path / "scan")
    (series,) = find_series(tmp_path / "scan")
    classes = {1: "x" * 70 + "1", 2: "x" * 70 + "2", 3: "y" * 65}
    mask = np.zeros(grid_of(series).shape, np.uint8)
    mask.flat[:3] = 1, 2, 3
    write_seg(tmp_path / "mask.dcm", mask, series, classes)
    np.testing.assert_array_equal(read_seg(tmp_path / "mask.dcm", grid_of(series), classes), mask)


@pytest.mark.parametrize(("spacing", "digits"), [((1, 1, 0.625), 2), ((1, 1, 1.25), 1), ((1, 1, 3.33), 1)])
@pytest.mark.parametrize("slices", [slice(None), slice(1, 4)])
def test_masks_of_scans_with_rounded_positions_are_read_back(tmp_path, spacing, digits, slices):
    datasets = classic(stored(), spacing=spacing)
    for dataset in datasets:
        dataset.ImagePositionPatient = ds(*np.round([float(v) for v in dataset.ImagePositionPatient], digits))
    assert_comes_back(datasets, tmp_path, slices)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("written", ["0", "1", "3"])
def test_a_wrong_distance_of_slices_in_the_scan_is_not_repeated_in_the_mask(tmp_path, written, frames):
    if frames:
        datasets = [enhanced(stored(), spacing=(1, 1, 5))]
        headers = datasets[0].SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    else:
        datasets = headers = classic(stored(), spacing=(1, 1, 5))
    for header in headers:
        header.SpacingBetweenSlices = written
    assert_comes_back(datasets, tmp_path, slice(None))
    volume = segread(tmp_path / "mask.dcm").get_volume(combine_segments=True)
    assert volume.shape[0] == SHAPE[0]
    assert volume.spacing == pytest.approx((5, 1, 1))


@pytest.mark.parametrize("shared", [False, True])
def test_frames_that_repeat_plane_and_pixel_size_each_get_a_mask(tmp_path, shared):
    dataset = enhanced(stored(), orientation=OBLIQUE, order=[3, 1, 5, 0, 2, 4])
    (common,) = dataset.SharedFunctionalGroupsSequence
    for own in dataset.PerFrameFunctionalGroupsSequence:
        own.PlaneOrientationSequence = common.PlaneOrientationSequence
        own.PixelMeasuresSequence = common.PixelMeasuresSequence
    if shared:
        del common.PlaneOrientationSequence, common.PixelMeasuresSequence
    else:
        del dataset.SharedFunctionalGroupsSequence
    assert_comes_back([dataset], tmp_path, slice(None))


def test_planes_that_were_rounded_otherwise_get_a_mask(tmp_path):
    datasets = classic(stored(), orientation=OBLIQUE)
    datasets[3].ImageOrientationPatient = ds(*np.round(OBLIQUE, 4))
    assert_comes_back(datasets, tmp_path, slice(None))


def test_the_grid_is_computed_once_for_all_slices(tmp_path, monkeypatch):
    series, computed = series_of(tmp_path / "scan"), []

    def counted(series):
        computed.append(series)
        return grid_of(series)

    monkeypatch.setattr("medvisionllama.inference.dicom_seg.grid_of", counted)
    write_seg(tmp_path / "mask.dcm", np.ones((5, 8, 6), np.uint8), series, CLASSES)
    assert len(computed) == 1


def test_a_mask_that_memory_cannot_hold_is_no_fault_of_the_scan(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr("medvisionllama.inference.dicom_seg._segmentation", fail)
    words = r"a DICOM mask of shape \(5, 8, 6\) does not fit into memory; write the mask as NIfTI"
    with pytest.raises(DataError, match=words):
        write_seg(tmp_path / "mask.dcm", np.ones((5, 8, 6), np.uint8), series_of(tmp_path / "scan"), CLASSES)


@pytest.mark.parametrize("frames", [False, True])
def test_planes_of_few_decimals_are_written_at_right_angles(tmp_path, frames):
    rough = np.round(OBLIQUE, 3)
    rough[0] += 4e-4
    datasets = [enhanced(stored(), orientation=rough)] if frames else classic(stored(), orientation=rough)
    assert_comes_back(datasets, tmp_path, slice(None))


def assert_comes_back(datasets, folder, slices):
    save(datasets, folder / "scan")
    (series,) = find_series(folder / "scan")
    header = grid_of(series)
    mask = np.zeros(header.shape, np.uint8)
    mask[:, :, slices] = random_mask(header.shape)[:, :, slices]
    write_seg(folder / "mask.dcm", mask, series, CLASSES)
    np.testing.assert_array_equal(read_seg(folder / "mask.dcm", header, CLASSES), mask)
