import errno
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dicom_files import classic, save
from medvisionllama.config import DataConfig
from medvisionllama.data import cache
from medvisionllama.data.cache import build_cache, describe, found_classes
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import Case, Dataset, open_dataset
from medvisionllama.data.normalisation import fit_normalisation
from medvisionllama.data.planning import Plan, make_plan
from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.volume import to_ras
from medvisionllama.errors import DataError


def prepared(root, **settings) -> tuple[tuple[Case, ...], Plan]:
    dataset = open_dataset(root)
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(**settings), flip=False, patch_size=None)
    return dataset.cases, plan


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_case_on_its_own_grid_is_kept_as_read(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=1))
    entry = build_cache(cases, plan, folder=tmp_path)[0]
    np.testing.assert_array_equal(entry.image, read_image(cases[0].images).array)
    np.testing.assert_array_equal(entry.label, read_label(cases[0].label).array)
    np.testing.assert_array_equal(entry.native_label, entry.label)
    assert (entry.case_id, entry.patient_id) == ("case_000", "case_000")


def test_a_case_is_brought_to_ras_and_the_planned_spacing(dataset_folder, write_nifti, tmp_path):
    root = dataset_folder(num_cases=1)
    affine = np.array([[0, 0, -2.0, 30], [-1.0, 0, 0, 20], [0, 1.0, 0, 10], [0, 0, 0, 1]])
    rng = np.random.default_rng(0)
    image = write_nifti(
        root / "imagesTr" / "case_000.nii.gz", rng.normal(size=(12, 10, 8)), affine, np.float32
    )
    label = rng.integers(0, 3, (12, 10, 8))
    write_nifti(root / "labelsTr" / "case_000.nii.gz", label, affine, np.uint8)
    cases, plan = prepared(root, spacing_mm=(1.0, 2.0, 1.0))
    entry = build_cache(cases, plan, folder=tmp_path)[0]
    assert entry.image.shape == (1, 16, 6, 10)
    assert entry.label.shape == (16, 6, 10)
    assert entry.native_spacing_mm == (2.0, 1.0, 1.0)
    np.testing.assert_array_equal(entry.native_label, to_ras(read_label(cases[0].label)).array)
    turned = to_ras(read_image((image,))).array
    assert entry.image.mean() == pytest.approx(turned.mean(), abs=0.02)


def test_resizing_squeezes_every_case_to_one_shape(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=3), geometry="resize", crop_size=(16, 8, 24))
    for entry in build_cache(cases, plan, folder=tmp_path):
        assert entry.image.shape == (1, 16, 8, 24)
        assert entry.label.shape == (16, 8, 24)


def test_centres_are_voxels_of_their_class(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=1, values=(2, 5)))
    entry = build_cache(cases, plan, folder=tmp_path)[0]
    values, x, y, z = entry.centres.T
    np.testing.assert_array_equal(entry.label[x, y, z], values)
    assert np.unique(values).tolist() == [2, 5]


def test_facts_count_voxels_on_the_native_grid(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=1), spacing_mm=(2.0, 2.0, 2.0))
    entry = build_cache(cases, plan, folder=tmp_path)[0]
    label = read_label(cases[0].label).array
    values, counts = np.unique(label, return_counts=True)
    assert entry.facts["class_voxels"] == {
        str(value): count for value, count in zip(values, counts, strict=True)
    }


def test_cases_keep_their_order_and_are_reported_once_each(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder())
    ticks = []
    entries = build_cache(cases, plan, folder=tmp_path, on_case=lambda: ticks.append(1))
    assert [entry.case_id for entry in entries] == [case.case_id for case in cases]
    assert len(ticks) == len(cases)


def test_a_second_call_prepares_nothing_anew(dataset_folder, tmp_path, monkeypatch):
    cases, plan = prepared(dataset_folder(num_cases=2))
    first = build_cache(cases, plan, folder=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    monkeypatch.setattr(cache, "read_image", lambda *_: pytest.fail("a scan was read again"))
    second = build_cache(cases, plan, folder=tmp_path)
    assert [json.dumps(entry.facts) for entry in second] == [json.dumps(entry.facts) for entry in first]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == written


def test_a_renamed_case_shares_its_entry(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=1))
    renamed = Case("other", "someone", cases[0].images, cases[0].label)
    first, second = build_cache([*cases, renamed], plan, folder=tmp_path / "cache")
    assert second.folder == first.folder
    assert (second.case_id, second.patient_id) == ("other", "someone")
    np.testing.assert_array_equal(second.image, first.image)


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_changed_content_makes_a_new_entry(dataset_folder, write_nifti, tmp_path, part):
    root = dataset_folder(num_cases=1)
    cases, plan = prepared(root)
    before = build_cache(cases, plan, folder=tmp_path)[0]
    array = read_image((root / part / "case_000.nii.gz",)).array[0]
    array[0, 0, 0] = 1
    write_nifti(root / part / "case_000.nii.gz", array, dtype=np.float32 if part == "imagesTr" else np.uint8)
    after = build_cache(cases, plan, folder=tmp_path)[0]
    assert after.folder != before.folder
    assert after.content_sha256 != before.content_sha256
    assert (after.image if part == "imagesTr" else after.label[None])[0, 0, 0, 0] == 1


@pytest.mark.parametrize(
    "settings", [{"spacing_mm": (2.0, 1.0, 1.0)}, {"geometry": "resize", "crop_size": (8, 8, 8)}]
)
def test_other_settings_make_a_new_entry(dataset_folder, tmp_path, settings):
    root = dataset_folder(num_cases=1)
    before = build_cache(*prepared(root), folder=tmp_path)[0]
    after = build_cache(*prepared(root, **settings), folder=tmp_path)[0]
    assert after.folder != before.folder
    assert after.image.shape != before.image.shape


def test_a_channel_renamed_to_ct_gets_its_intensities_sampled(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=1))
    build_cache(cases, plan, folder=tmp_path)
    entry = build_cache(cases, plan.model_copy(update={"channels": ("CT",)}), folder=tmp_path)[0]
    assert fit_normalisation([entry], ["dataset"])[0].kind == "dataset"


def test_runs_that_start_together_prepare_each_scan_once(dataset_folder, tmp_path, monkeypatch):
    cases, plan = prepared(dataset_folder(num_cases=2))
    written, write = [], cache._write_arrays

    def slowly(case, *rest):
        written.append(case.case_id)
        time.sleep(0.2)
        return write(case, *rest)

    monkeypatch.setattr(cache, "_write_arrays", slowly)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build_cache, cases, plan, folder=tmp_path / "cache") for _ in range(2)]
        first, second = (future.result() for future in both)
    assert sorted(written) == sorted(case.case_id for case in cases)
    assert [case.folder for case in first] == [case.folder for case in second]


def test_what_a_killed_process_left_goes_when_its_entry_is_filled(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=1))
    folder = build_cache(cases, plan, folder=tmp_path)[0].folder
    (folder / "facts.json").unlink()
    (folder / ".partial-0123456789abcdef-image.npy").write_bytes(b"half")
    build_cache(cases, plan, folder=tmp_path)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_an_interrupted_entry_is_filled_again(dataset_folder, tmp_path, harm):
    cases, plan = prepared(dataset_folder(num_cases=1))
    folder = build_cache(cases, plan, folder=tmp_path)[0].folder
    whole = files_of(folder)
    (folder / "facts.json").unlink()
    if harm == "unlink":
        (folder / "label.npy").unlink()
    else:
        (folder / "label.npy").write_bytes(whole["label.npy"][:200])
    assert build_cache(cases, plan, folder=tmp_path)[0].folder == folder
    assert files_of(folder) == whole


@pytest.mark.parametrize("name", ["image", "label", "centres", "native_label"])
@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_an_entry_that_lost_an_array_or_a_part_of_it_is_filled_again(dataset_folder, tmp_path, name, harm):
    cases, plan = prepared(dataset_folder(num_cases=1), spacing_mm=(2.0, 1.0, 1.0))
    folder = build_cache(cases, plan, folder=tmp_path)[0].folder
    whole = files_of(folder)
    if harm == "unlink":
        (folder / f"{name}.npy").unlink()
    else:
        (folder / f"{name}.npy").write_bytes(whole[f"{name}.npy"][:-1])
    assert build_cache(cases, plan, folder=tmp_path)[0].folder == folder
    assert files_of(folder) == whole


def test_a_disk_that_takes_no_more_leaves_no_half_entry_and_is_named(dataset_folder, tmp_path):
    resource = pytest.importorskip("resource")
    cases, plan = prepared(dataset_folder(num_cases=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The system refuses larger files, as it refuses any where the disk is full; numpy would hide its reason.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            build_cache(cases, plan, folder=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert Path(caught.value.filename).parent == tmp_path / "cache"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    entry = build_cache(cases, plan, folder=tmp_path / "cache")[0]
    np.testing.assert_array_equal(entry.label, read_label(cases[0].label).array)


def test_a_label_value_that_is_not_declared_is_refused(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=2, values=(1, 2)))
    plan = plan.model_copy(update={"classes": {1: "Anterior"}})
    message = r"case_00\d\.nii\.gz holds the label value 2, .*\(0 background, 1 Anterior\)"
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            build_cache(cases, plan, folder=tmp_path)


def test_a_damaged_case_is_refused_by_name_and_the_others_are_kept(dataset_folder, tmp_path):
    root = dataset_folder(num_cases=3)
    cases, plan = prepared(root)
    (root / "imagesTr" / "case_001.nii.gz").write_bytes(b"no scan")
    with pytest.raises(DataError, match=r"case_001\.nii\.gz is damaged"):
        build_cache(cases, plan, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(".partial-*"))
    assert len(build_cache([cases[0], cases[2]], plan, folder=tmp_path / "cache")) == 2


def test_the_users_cache_is_the_default(dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "mine"))
    entry = build_cache(*prepared(dataset_folder(num_cases=1)))[0]
    assert entry.folder.parent == tmp_path / "mine" / "preprocessed"


def test_entries_outlive_the_dataset(dataset_folder, tmp_path):
    root = dataset_folder(num_cases=1)
    entry = build_cache(*prepared(root), folder=tmp_path / "cache")[0]
    shutil.rmtree(root)
    assert entry.image.shape[1:] == entry.label.shape


def test_classes_are_found_where_none_are_declared(dataset_folder, tmp_path):
    cases, plan = prepared(dataset_folder(num_cases=2, values=(2, 5)))
    entries = build_cache(cases, plan.model_copy(update={"classes": {}}), folder=tmp_path)
    assert found_classes(entries) == {2: "class 2", 5: "class 5"}


@pytest.mark.parametrize("channel", ["MRI", "CT"])
def test_empty_labels_are_refused_where_classes_or_ct_numbers_need_them(
    dataset_folder, write_nifti, tmp_path, channel
):
    root = dataset_folder(num_cases=1, channels=(channel,))
    shape = fingerprint(open_dataset(root)).shapes["case_000"]
    write_nifti(root / "labelsTr" / "case_000.nii.gz", np.zeros(shape), dtype=np.uint8)
    entries = build_cache(*prepared(root), folder=tmp_path)
    assert entries[0].centres.shape == (0, 4)
    with pytest.raises(DataError, match="every label is empty"):
        found_classes(entries)
    if channel == "CT":
        with pytest.raises(DataError, match="no labelled voxel"):
            fit_normalisation(entries, ["dataset"])


def test_what_a_file_manager_leaves_in_a_series_is_no_change_of_it(tmp_path):
    save(classic(np.random.default_rng(0).integers(0, 900, (6, 8, 5)).astype(np.int16)), tmp_path / "a")
    case = Case("a", "a", (tmp_path / "a",), None)
    dataset = Dataset("a", tmp_path, (case,), ("MR",), {})
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=False, patch_size=None)
    before = build_cache([case], plan, folder=tmp_path / "cache")[0]
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "a" / name).write_bytes(
            b"a picture of a folder, longer than the head of a DICOM file" * 3
        )
    again = build_cache([case], plan, folder=tmp_path / "cache")[0]
    assert again.content_sha256 == before.content_sha256
    slices = sorted((tmp_path / "a").glob("[!.T]*"))
    slices[0].write_bytes(slices[0].read_bytes()[:-2] + b"\x07\x07")
    assert build_cache([case], plan, folder=tmp_path / "cache")[0].content_sha256 != before.content_sha256


def test_description_gives_volumes_in_ml_and_foreground_intensities(dataset_folder):
    root = dataset_folder("described", num_cases=3, spacing_mm=(1.0, 1.0, 2.0))
    dataset = open_dataset(root)
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=True, patch_size=None)
    cases = build_cache(dataset.cases, plan)
    facts = describe(cases, plan)
    voxels = [int((case.native_label == 1).sum()) for case in cases]
    assert facts["class_volume_ml"]["Anterior"][1] == pytest.approx(np.median(voxels) * 2 / 1000, rel=1e-3)
    means = [float(case.image[0][np.asarray(case.label) > 0].mean()) for case in cases]
    assert facts["intensity_mean"]["MRI"]["foreground"][1] == pytest.approx(np.median(means), rel=1e-3)
