import numpy as np
import pytest

from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import Case, Dataset, open_dataset
from medvisionllama.errors import DataError

SHAPE = (4, 5, 6)


@pytest.fixture
def case(tmp_path, write_nifti):
    """Write one case whose label differs from the image as asked."""

    def make(shape=SHAPE, affine=None, label_affine=None) -> Case:
        image = write_nifti(tmp_path / "image.nii.gz", np.ones(SHAPE), affine, np.float32)
        label = write_nifti(tmp_path / "label.nii.gz", np.ones(shape), label_affine, np.uint8)
        return Case("a", "a", (image,), label)

    return make


def check_case(case):
    """Channels, shape and spacing of a dataset of one case."""
    found = fingerprint(Dataset("one", case.label.parent, (case,), ("image",), {}))
    return found.num_channels, found.shapes["a"], found.spacings_mm["a"]


def test_shape_and_spacing_are_in_ras(case):
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -3.0, 1.0, 2.0, 1.0
    assert check_case(case(affine=affine, label_affine=affine)) == (1, (5, 6, 4), (1.0, 2.0, 3.0))


def test_a_label_of_another_shape_is_refused_with_both_shapes(case):
    with pytest.raises(
        DataError, match=r"label\.nii\.gz has shape \(4, 5, 7\).*image\.nii\.gz has \(4, 5, 6\)"
    ):
        check_case(case(shape=(4, 5, 7)))


@pytest.mark.parametrize("affine", [np.diag([1, 1, 2, 1.0]), np.diag([-1, 1, 1, 1.0])])
def test_a_label_of_another_affine_is_refused(case, affine):
    with pytest.raises(DataError, match=r"label\.nii\.gz has another affine than its image image\.nii\.gz"):
        check_case(case(label_affine=affine))


def test_a_shifted_label_is_refused(case):
    affine = np.eye(4)
    affine[0, 3] = 0.5
    with pytest.raises(DataError, match="another affine"):
        check_case(case(label_affine=affine))


def test_rounding_in_a_header_is_no_difference(case):
    assert check_case(case(label_affine=np.diag([1.0001, 1, 1, 1.0])))[0] == 1


def test_medians_are_over_cases_and_each_axis(dataset_folder, write_nifti):
    root = dataset_folder(num_cases=3, spacing_mm=(1.0, 1.0, 2.0))
    for folder in ("imagesTr", "labelsTr"):
        write_nifti(
            root / folder / "case_000.nii.gz", np.ones((10, 40, 18)), np.diag([4, 4, 4, 1.0]), np.uint8
        )
    found = fingerprint(open_dataset(root))
    assert found.shapes["case_000"] == (10, 40, 18)
    assert found.median_spacing_mm == (1.0, 1.0, 2.0)
    extents = np.array([np.multiply(found.shapes[name], found.spacings_mm[name]) for name in found.shapes])
    assert found.median_extent_mm == tuple(np.median(extents, axis=0))
    assert found.median_extent_mm[2] == 36.0


def test_only_the_named_cases_are_described_but_all_are_checked(dataset_folder, write_nifti):
    root = dataset_folder(num_cases=3)
    assert set(fingerprint(open_dataset(root), only={"case_001"}).shapes) == {"case_001"}
    write_nifti(root / "labelsTr" / "case_002.nii.gz", np.ones(SHAPE), dtype=np.uint8)
    with pytest.raises(DataError, match=r"case_002\.nii\.gz has shape"):
        fingerprint(open_dataset(root), only={"case_001"})


def test_another_number_of_channels_than_declared_is_refused(dataset_folder, write_nifti):
    root = dataset_folder(num_cases=2, channels=("T1", "T2"))
    shape = fingerprint(open_dataset(root)).shapes["case_001"]
    write_nifti(root / "imagesTr" / "case_001.nii.gz", np.ones(shape), dtype=np.float32)
    with pytest.raises(DataError, match=r"case_001.*has 1 channels, the dataset declares 2 \(T1, T2\)"):
        fingerprint(open_dataset(root))


def test_a_label_with_permuted_and_mirrored_axes_of_the_same_grid_is_accepted(tmp_path, write_nifti):
    affine = np.diag([1.0, 2, 3, 1])
    turned = np.array([[0, -1.0, 0, 3], [0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    image = write_nifti(tmp_path / "image.nii.gz", np.ones(SHAPE), affine, np.float32)
    label = write_nifti(tmp_path / "label.nii.gz", np.ones((6, 4, 5)), turned, np.uint8)
    assert check_case(Case("a", "a", (image,), label)) == (1, SHAPE, (1.0, 2.0, 3.0))


def test_the_refusal_counts_the_other_problems_and_names_the_command_that_lists_them(
    dataset_folder, write_nifti
):
    root = dataset_folder(num_cases=4)
    for case in ("case_001", "case_003"):
        write_nifti(root / "labelsTr" / f"{case}.nii.gz", np.ones(SHAPE), dtype=np.uint8)
    (root / "imagesTr" / "case_002.nii.gz").write_text("no scan")
    with pytest.raises(
        DataError, match=r"case_001.* has shape .*\(and 2 more; list them all with: medvisionllama data check"
    ):
        fingerprint(open_dataset(root))
