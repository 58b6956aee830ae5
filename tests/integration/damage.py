"""Ways to damage an MSD folder of phantoms, for `broken.py`."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

CASE = "case_002"


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


def rename_to_bytes(root: Path) -> None:
    """Give a case a name as an old archive may hold: bytes that are no UTF-8."""
    to_plain(root)
    for name in ("images", "labels"):
        (root / name / f"{CASE}.nii.gz").rename(root / name / os.fsdecode(b"M\xfcller.nii.gz"))


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


def rename(root: Path, names: Sequence[str]) -> None:
    for case, name in zip(cases(root), names, strict=True):
        for path in pair(root, case):
            path.rename(path.with_name(f"{name}.nii.gz"))
    paths = [(f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz") for name in names]
    edit_json(root, training=[{"image": image, "label": label} for image, label in paths])


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


def overlapping_splits(root: Path) -> None:
    """Splits with a right hash and a test patient that is trained on."""
    from dataclasses import replace

    from medvisionllama.data.splits import read_splits, write_splits

    splits = read_splits(splits_of(root))
    first = replace(splits.folds[0], train=(*splits.folds[0].train, splits.test[0]))
    write_splits(replace(splits, folds=(first, *splits.folds[1:])), root / "splits.json")


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
