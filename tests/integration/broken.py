"""Datasets broken in one way each, for `test_data_check.py`: what is done to a folder, and what must be found."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

CASE = "case_002"


@dataclass(frozen=True)
class Broken:
    """One way to break a dataset."""

    damage: Callable[[Path], object]
    code: str
    words: str
    train: bool = False
    """`train` sees it too, and refuses."""
    num_cases: int = 6
    channels: Sequence[str] = ("MRI",)
    frames: int = 1
    options: Sequence[str] = ()
    """Of `data check`; ROOT stands for the dataset's folder."""


def scan(root: Path, case: str = CASE) -> Path:
    return root / "imagesTr" / f"{case}.nii.gz"


def label(root: Path, case: str = CASE) -> Path:
    return root / "labelsTr" / f"{case}.nii.gz"


def pair(root: Path, case: str = CASE) -> tuple[Path, Path]:
    return scan(root, case), label(root, case)


def cases(root: Path) -> list[str]:
    return [path.name.removesuffix(".nii.gz") for path in sorted((root / "imagesTr").glob("case*"))]


def array_of(path: Path) -> np.ndarray:
    return np.array(nib.load(path).dataobj)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def change(
    path: Path, function: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None
) -> None:
    save(path, function(array_of(path)), nib.load(path).affine if affine is None else affine)


def voxel(path: Path, value: float, dtype: type = np.float32) -> None:
    def put(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[2, 3, 4] = value
        return array

    change(path, put)


def place(root: Path, affine: np.ndarray, case: str = CASE) -> None:
    for path in pair(root, case):
        change(path, lambda array: array, affine)


def header(path: Path, edit: Callable[[nib.Nifti1Image], object]) -> None:
    image = nib.Nifti1Image(array_of(path), nib.load(path).affine)
    edit(image)
    nib.save(image, path)


def edit_json(root: Path, **changes: object) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def entries(root: Path) -> list[dict[str, str]]:
    return json.loads((root / "dataset.json").read_text())["training"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def to_nnunet(root: Path) -> None:
    """Turn the 4-D scans of an MSD folder into one file per channel."""
    for case in cases(root):
        array = array_of(scan(root, case))
        for number in range(array.shape[-1]):
            save(root / "imagesTr" / f"{case}_{number:04d}.nii.gz", array[..., number])
        scan(root, case).unlink()
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))


def to_plain(root: Path) -> None:
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    (root / "dataset.json").unlink()


def nnunet_with_shifted_channel(root: Path) -> None:
    to_nnunet(root)
    shifted = np.eye(4)
    shifted[0, 3] = 3
    change(root / "imagesTr" / f"{CASE}_0001.nii.gz", lambda array: array, shifted)


def nnunet_without_channel(root: Path) -> None:
    to_nnunet(root)
    (root / "imagesTr" / f"{CASE}_0001.nii.gz").unlink()


def plain_without(root: Path, name: str) -> None:
    to_plain(root)
    (root / name / f"{CASE}.nii.gz").unlink()


def exchange(root: Path) -> None:
    image, mask = pair(root)
    between = root / "between"
    image.rename(between)
    mask.rename(image)
    between.rename(mask)


def copy_case(root: Path, source: str, target: str) -> None:
    for a, b in zip(pair(root, source), pair(root, target), strict=True):
        shutil.copyfile(a, b)


def copy_as_stored_otherwise(root: Path, source: str, target: str) -> None:
    """The same scan with other axes and another type of numbers."""
    image = nib.load(scan(root, source))
    turned = image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    save(scan(root, target), np.array(turned.dataobj).astype(np.float64), turned.affine)
    change(label(root, target), lambda _: array_of(label(root, source)))


def same_size(root: Path) -> None:
    """Cases of one size, with different labels."""
    for number, case in enumerate(cases(root)):
        array = np.random.default_rng(number).normal(100, 10, (20, 24, 18)).astype(np.float32)
        mask = np.zeros(array.shape, np.uint8)
        mask[5:12, 6:12, 5 : 9 + number], mask[5:12, 12:18, 5:9] = 1, 2
        save(scan(root, case), array)
        save(label(root, case), mask)


def same_label(root: Path) -> None:
    same_size(root)
    shutil.copyfile(label(root, "case_001"), label(root))


def next_label(root: Path) -> None:
    """Every image with the label of the one after it."""
    same_size(root)
    listed = entries(root)
    shifted = [*listed[1:], listed[0]]
    edit_json(
        root,
        training=[{"image": a["image"], "label": b["label"]} for a, b in zip(listed, shifted, strict=True)],
    )


def mirrored_label(root: Path) -> None:
    """All labels near one side, one of them near the other."""
    for case in cases(root):
        mask = np.zeros_like(array_of(label(root, case)))
        mask[2:6, 5:10, 4:9], mask[2:6, 10:15, 4:9] = 1, 2
        save(label(root, case), mask[::-1] if case == CASE else mask)


def sides(root: Path, exchanged: Sequence[str]) -> None:
    edit_json(root, labels={"0": "background", "1": "left kidney", "2": "right kidney"})
    for case in cases(root):
        mask = np.zeros_like(array_of(label(root, case)))
        left, right = (2, 1) if case in exchanged else (1, 2)
        mask[2:6, 5:12, 4:9], mask[12:16, 5:12, 4:9] = left, right
        save(label(root, case), mask)


def other_axis_order(root: Path) -> None:
    """Scans of three different lengths, one with two axes exchanged and not saying so."""
    rng = np.random.default_rng(0)
    for case in cases(root):
        mask = np.zeros((16, 24, 36), np.uint8)
        mask[4:9, 6:12, 9:18], mask[4:9, 12:18, 9:18] = 1, 2
        array = rng.normal(100, 10, mask.shape).astype(np.float32)
        if case == CASE:
            array, mask = array.swapaxes(0, 2), mask.swapaxes(0, 2)
        save(scan(root, case), array)
        save(label(root, case), mask)


def scale_all(root: Path, factor_of: Callable[[int], float], shift: float = 0.0) -> None:
    for number, case in enumerate(cases(root)):
        change(
            scan(root, case),
            lambda array, number=number: (array * factor_of(number) + shift).astype(np.float32),
        )


def far_matrix() -> np.ndarray:
    return np.array([[0, -1, 0, 9], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def rotated() -> np.ndarray:
    affine, angle = np.eye(4), np.radians(20)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


def sheared() -> np.ndarray:
    affine = np.eye(4)
    affine[1, 2] = 0.3
    return affine


def unset(path: Path) -> None:
    def edit(image: nib.Nifti1Image) -> None:
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)

    header(path, edit)


def disagree(path: Path) -> None:
    def edit(image: nib.Nifti1Image) -> None:
        image.set_sform(np.eye(4), code=1)
        image.set_qform(np.diag([-1.0, -1, 1, 1]), code=1)

    header(path, edit)


def both(root: Path, edit: Callable[[Path], None]) -> None:
    for path in pair(root):
        edit(path)


def splits_of(root: Path, drop: str | None = None, extra: str | None = None) -> Path:
    """Draw splits of the dataset, less one patient or with one more."""
    from medvisionllama.data.splits import make_splits, write_splits

    patients = {case: case for case in cases(root) if case != drop}
    if extra:
        patients[extra] = extra
    path = root / "splits.json"
    write_splits(make_splits(patients), path)
    return path


def edited_splits(root: Path) -> None:
    path = splits_of(root)
    path.write_text(path.read_text().replace(CASE, "case_001"))


def leaking_splits(root: Path) -> None:
    from medvisionllama.data.splits import read_splits

    path = splits_of(root)
    splits = read_splits(path)
    copy_case(root, splits.test[0], splits.folds[0].train[0])


def label_as_image(root: Path) -> None:
    change(scan(root), lambda _: 100 * array_of(label(root)).astype(np.float32))


def empty(root: Path, names: Sequence[str]) -> None:
    for case in names:
        change(label(root, case), np.zeros_like)


SPLITS = ("--splits", "ROOT/splits.json")
ERRORS: dict[str, Broken] = {
    "truncated image": Broken(lambda r: truncate(scan(r)), "unreadable", "damaged or truncated", train=True),
    "truncated label": Broken(lambda r: truncate(label(r)), "unreadable", "damaged or truncated", train=True),
    "text for an image": Broken(lambda r: scan(r).write_text("x"), "unreadable", CASE, train=True),
    "empty file": Broken(lambda r: scan(r).write_bytes(b""), "unreadable", "damaged", train=True),
    "folder for a file": Broken(
        lambda r: (label(r).unlink(), label(r).mkdir()), "unreadable", CASE, train=True
    ),
    "five dimensions": Broken(
        lambda r: change(scan(r), lambda a: np.stack([np.stack([a, a], -1)] * 2, -1)),
        "unreadable",
        "allowed: 3-D",
        train=True,
    ),
    "two dimensions": Broken(
        lambda r: change(scan(r), lambda a: a[..., 0]), "unreadable", "allowed: 3-D", train=True
    ),
    "complex voxels": Broken(
        lambda r: change(scan(r), lambda a: a.astype(np.complex64)),
        "unreadable",
        "integers and real numbers",
        train=True,
    ),
    "singular affine": Broken(
        lambda r: header(scan(r), lambda i: (i.set_sform(np.diag([0.0, 1, 1, 1]), 1), i.set_qform(None, 0))),
        "unreadable",
        "not invertible",
        train=True,
    ),
    "missing image": Broken(lambda r: scan(r).unlink(), "missing-file", "does not exist", train=True),
    "missing label": Broken(lambda r: label(r).unlink(), "missing-file", "does not exist", train=True),
    "missing channel": Broken(
        nnunet_without_channel, "missing-file", f"{CASE}_0001", train=True, channels=("T1", "T2")
    ),
    "file of another kind": Broken(
        lambda r: (
            edit_json(r, training=[*entries(r), {"image": "a.txt", "label": "a.txt"}]),
            (r / "a.txt").write_text("x"),
        ),
        "unreadable",
        "not a scan we read",
        train=True,
    ),
    "case listed twice": Broken(
        lambda r: edit_json(r, training=[*entries(r), entries(r)[2]]),
        "listed-twice",
        f"'{CASE}' is listed twice",
        train=True,
    ),
    "no case": Broken(lambda r: edit_json(r, training=[]), "layout", "no labelled cases", train=True),
    "broken dataset.json": Broken(
        lambda r: (r / "dataset.json").write_text("{"), "layout", "not readable JSON", train=True
    ),
    "entry without a label": Broken(
        lambda r: edit_json(r, training=[{"image": "imagesTr/case_000.nii.gz"}]),
        "layout",
        "needs the keys",
        train=True,
    ),
    "path out of the folder": Broken(
        lambda r: edit_json(r, training=[{"image": "../x.nii.gz", "label": "../y.nii.gz"}]),
        "layout",
        "outside the folder",
        train=True,
    ),
    "image without label": Broken(
        lambda r: plain_without(r, "labels"), "no-partner", "no file in labels/", train=True
    ),
    "label without image": Broken(
        lambda r: plain_without(r, "images"), "no-partner", "no file in images/", train=True
    ),
    "two patients": Broken(
        lambda r: edit_json(r, training=entries(r)[:2]), "too-few-patients", "at least 3 patients", train=True
    ),
    "label of another shape": Broken(
        lambda r: change(label(r), lambda a: a[:-1]), "label-shape", "has shape", train=True
    ),
    "label with permuted axes": Broken(
        lambda r: change(label(r), lambda a: a.swapaxes(0, 1)), "label-shape", "has shape", train=True
    ),
    "label of another spacing": Broken(
        lambda r: change(label(r), lambda a: a, np.diag([2.0, 2, 2, 1])),
        "label-affine",
        "spacing 2 × 2 × 2 mm, not 1 × 1 × 1",
        train=True,
    ),
    "label of another orientation": Broken(
        lambda r: change(label(r), lambda a: a, np.diag([-1.0, 1, 1, 1])),
        "label-affine",
        "axes LAS, not RAS",
        train=True,
    ),
    "shifted label": Broken(
        lambda r: change(label(r), lambda a: a, np.eye(4) + np.eye(4, k=3) * 5),
        "label-affine",
        "shifted by 5 mm",
        train=True,
    ),
    "rotated label": Broken(
        lambda r: change(label(r), lambda a: a, rotated()), "label-affine", "rotated", train=True
    ),
    "label with channels": Broken(
        lambda r: change(label(r), lambda a: np.stack([a, a], -1)),
        "label-channels",
        "must be 3-D",
        train=True,
    ),
    "too many channels": Broken(
        lambda r: change(scan(r), lambda a: np.stack([a, a], -1)),
        "channel-count",
        "has 2 channels, the dataset declares 1 (MRI)",
        train=True,
    ),
    "too few channels": Broken(
        lambda r: change(scan(r), lambda a: a[..., 0]),
        "channel-count",
        "has 1 channels, the dataset declares 2",
        train=True,
        channels=("T1", "T2"),
    ),
    "channels on two grids": Broken(
        nnunet_with_shifted_channel,
        "channel-grid",
        "differs from case_002_0000",
        train=True,
        channels=("T1", "T2"),
    ),
    "undeclared label": Broken(
        lambda r: voxel(label(r), 9, np.uint8),
        "label-undeclared",
        "label value 9, which the dataset does not declare",
        train=True,
    ),
    "fractional label": Broken(lambda r: voxel(label(r), 0.5), "label-fractional", "found 0.5", train=True),
    "negative label": Broken(
        lambda r: voxel(label(r), -1, np.int16), "label-range", "0..65535, found -1", train=True
    ),
    "enormous label": Broken(
        lambda r: voxel(label(r), 70_000, np.int32), "label-range", "found 0..70000", train=True
    ),
    "NaN in a label": Broken(
        lambda r: voxel(label(r), np.nan), "label-not-finite", "1 voxels are NaN", train=True
    ),
    "every label empty": Broken(
        lambda r: empty(r, cases(r)), "all-labels-empty", "none of the 6 labels holds a labelled voxel"
    ),
    "NaN voxel": Broken(
        lambda r: voxel(scan(r), np.nan), "image-not-finite", "1 voxel is NaN or infinite", train=True
    ),
    "infinite voxel": Broken(
        lambda r: voxel(scan(r), -np.inf), "image-not-finite", "first at (2, 3, 4)", train=True
    ),
    "value beyond float32": Broken(
        lambda r: voxel(scan(r), 1e300, np.float64), "image-not-finite", "NaN or infinite", train=True
    ),
    "constant image": Broken(
        lambda r: change(scan(r), lambda a: np.full_like(a, 7)), "image-constant", "every voxel is 7"
    ),
    "image and label exchanged": Broken(exchange, "image-is-mask", "exchanged", train=True),
    "label as image": Broken(label_as_image, "image-is-mask", "few values of a mask"),
    "one scan for two patients": Broken(
        lambda r: copy_case(r, "case_001", CASE),
        "duplicate-across-patients",
        "case_001, case_002 hold the same image but count as 2 patients",
    ),
    "one scan for two patients, stored otherwise": Broken(
        lambda r: copy_as_stored_otherwise(r, "case_001", CASE),
        "duplicate-across-patients",
        "case_001, case_002 hold the same image",
    ),
    "edited splits": Broken(
        edited_splits, "splits", "was changed since it was drawn", train=True, options=SPLITS
    ),
    "no splits file": Broken(lambda r: None, "splits", "does not exist", train=True, options=SPLITS),
    "splits that lack a patient": Broken(
        lambda r: splits_of(r, drop=CASE),
        "not-in-splits",
        f"the patient '{CASE}' is in no part of fold 0",
        train=True,
        options=SPLITS,
    ),
    "one scan in training and test": Broken(
        leaking_splits, "splits-leak", "which is kept for the test", options=SPLITS
    ),
    "a pattern that names no patient": Broken(
        lambda r: None,
        "layout",
        "does not match the case",
        train=True,
        options=("--patient-pattern", "(nobody)"),
    ),
}
WARNINGS: dict[str, Broken] = {
    "empty label": Broken(lambda r: empty(r, [CASE]), "label-empty", f"{CASE}.nii.gz: no voxel is labelled"),
    "class that is never there": Broken(
        lambda r: edit_json(r, labels={"0": "background", "1": "Anterior", "2": "Posterior", "3": "tumour"}),
        "class-unseen",
        "the class 3 (tumour) is declared but in none of the 6 labels",
    ),
    "nearly constant image": Broken(
        lambda r: change(scan(r), lambda a: np.where(a > a.max() - 1, a, 0)),
        "image-nearly-constant",
        "at least 99 % of the voxels",
    ),
    "constant channel": Broken(
        lambda r: change(scan(r), lambda a: a * np.array([1, 0], a.dtype)),
        "channel-constant",
        "channel 1 (T2): every voxel is equal",
        channels=("T1", "T2"),
    ),
    "one channel twice": Broken(
        lambda r: change(scan(r), lambda a: a[..., [0, 0]]),
        "duplicate-channel",
        "hold the same voxels",
        channels=("T1", "T2"),
    ),
    "one frame twice": Broken(
        lambda r: copy_case(r, "case_002_frame01", "case_002_frame02"),
        "duplicate-within-patient",
        "of the patient case_002 hold the same image",
        frames=2,
    ),
    "one label twice": Broken(same_label, "duplicate-label", "case_001, case_002 have the same label"),
    "labels in the wrong order": Broken(next_label, "pair-names", "paired with the label of 'case_003'"),
    "CT from 0": Broken(
        lambda r: scale_all(r, lambda _: 1.0, 1024.0),
        "ct-not-hu",
        "are no Hounsfield units",
        channels=("CT",),
    ),
    "CT of two scales": Broken(
        lambda r: scale_all(r, lambda n: 1.0 if n % 2 else 60.0, -200.0),
        "ct-mixture",
        "CT should be in Hounsfield units everywhere",
        num_cases=12,
        channels=("CT",),
    ),
    "one bright image": Broken(
        lambda r: change(scan(r), lambda a: a * 50),
        "intensity-outlier",
        f"{CASE}.nii.gz: the width of the intensities",
        num_cases=12,
    ),
    "one spacing": Broken(
        lambda r: place(r, np.diag([1.0, 1, 3, 1])),
        "spacing-outlier",
        "the spacing along z is 3 mm, the median is 1 mm",
        num_cases=12,
    ),
    "one short scan": Broken(
        lambda r: [change(path, lambda a: a[:, :, 5:13]) for path in pair(r)],
        "shape-outlier",
        "length along z is 8 mm, the median is 18 mm",
        num_cases=12,
    ),
    "one small label": Broken(
        lambda r: change(label(r), lambda a: np.where(np.arange(a.shape[0])[:, None, None] == 8, a, 0)),
        "label-volume-outlier",
        "look at the label",
        num_cases=12,
    ),
    "mirrored label": Broken(mirrored_label, "mirrored", "is the scan mirrored?", num_cases=12),
    "axes in another order": Broken(
        other_axis_order, "axis-order", "36 × 24 × 16 mm, the others 16 × 24 × 36 mm", num_cases=12
    ),
    "sides exchanged": Broken(
        lambda r: sides(r, [CASE]), "sides-swapped", "left kidney and right kidney have exchanged sides"
    ),
    "one scan without a place": Broken(
        lambda r: both(r, unset), "affine-unset", "sform and qform are unset), other files do"
    ),
    "sheared affine": Broken(
        lambda r: place(r, sheared()), "affine-sheared", "16.7 degrees off a right angle"
    ),
    "two matrices": Broken(
        lambda r: both(r, disagree), "sform-qform", "its sform and qform place it differently"
    ),
    "metres": Broken(
        lambda r: both(r, lambda path: header(path, lambda i: i.header.set_xyzt_units("meter"))),
        "spacing-unit",
        "gives lengths in meters",
    ),
    "spacing in metres": Broken(
        lambda r: place(r, np.diag([0.001, 0.001, 0.001, 1])), "spacing-implausible", "no scanner's"
    ),
    "flat voxels": Broken(lambda r: place(r, np.diag([1.0, 1, 20, 1])), "anisotropy", "20 times longer"),
}
NOTES: dict[str, Broken] = {
    "whole labels as floats": Broken(
        lambda r: change(label(r), lambda a: a.astype(np.float32)), "label-float", "stores whole labels"
    ),
    "stray voxel": Broken(lambda r: voxel(label(r), 1, np.uint8), "specks", "1 island of at most 3 voxels"),
    "three scales": Broken(
        lambda r: scale_all(r, lambda n: 100.0 ** (n % 3)),
        "intensity-mixture",
        "each scan is normalised by itself",
        num_cases=12,
    ),
    "axes of two kinds": Broken(
        lambda r: place(r, np.diag([-1.0, -1, 1, 1])), "mixed-orientations", "5 × RAS, 1 × LPS"
    ),
    "no place at all": Broken(
        lambda r: [unset(path) for path in sorted(r.glob("*Tr/*"))],
        "placement-unset",
        "none of the 12 files says where it lies",
    ),
    "no unit": Broken(
        lambda r: header(scan(r), lambda i: i.header.set_xyzt_units("unknown")),
        "unit-unset",
        "no unit of length",
    ),
    "left on the right": Broken(
        lambda r: sides(r, cases(r)), "sides-unusual", "the left one lies on the right in 6 of 6 cases"
    ),
    "file that nobody lists": Broken(
        lambda r: edit_json(r, training=entries(r)[:5]), "unlisted-file", "(case_005.nii.gz)"
    ),
    "patient of another dataset": Broken(
        lambda r: splits_of(r, extra="case_999"),
        "splits-absent",
        "1 of 21 patients are not in this dataset",
        num_cases=20,
        options=SPLITS,
    ),
}
