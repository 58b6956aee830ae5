"""Datasets broken in one way each, for `test_data_check.py`: what is done to a folder, and what must be found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .damage import (
    CASE,
    both,
    cases,
    change,
    copy_as_stored_otherwise,
    copy_case,
    disagree,
    edit_json,
    edited_splits,
    empty,
    entries,
    exchange,
    header,
    label,
    label_as_image,
    leaking_splits,
    mirrored_label,
    next_label,
    nnunet_with_shifted_channel,
    nnunet_without_channel,
    other_axis_order,
    overlapping_splits,
    pair,
    place,
    plain_without,
    rename,
    rename_to_bytes,
    rotated,
    same_label,
    scale_all,
    scan,
    sheared,
    sides,
    splits_of,
    truncate,
    unset,
    voxel,
)


@dataclass(frozen=True)
class Broken:
    """One way to break a dataset."""

    damage: Callable[[Path], object]
    code: str
    words: str
    train: bool = False
    """`train` sees it too, and refuses."""
    train_words: str = ""
    """What `train` says where it says it otherwise."""
    num_cases: int = 6
    channels: Sequence[str] = ("MRI",)
    frames: int = 1
    options: Sequence[str] = ()
    """Of `data check`; ROOT stands for the dataset's folder."""


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
    "name of other bytes": Broken(
        rename_to_bytes, "name-not-text", "is no name in UTF-8; rename its image and its label", train=True
    ),
    "no channel": Broken(
        lambda r: edit_json(r, modality={}), "layout", "must map channel numbers to names", train=True
    ),
    "no channel of nnU-Net": Broken(
        lambda r: (r / "dataset.json").write_text('{"channel_names": {}, "labels": {"a": 1}}'),
        "layout",
        "needs 'training' (MSD), or 'channel_names'",
        train=True,
    ),
    "deep dataset.json": Broken(
        lambda r: (r / "dataset.json").write_text("[" * 100_000), "layout", "not readable JSON", train=True
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
    "label of nearly the same spacing": Broken(
        lambda r: change(label(r), lambda a: a, np.diag([1.008, 1, 1, 1])),
        "label-affine",
        "differs a little, 0.",
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
        lambda r: voxel(label(r), np.nan),
        "label-not-finite",
        "1 voxels are NaN",
        train=True,
        train_words="1 voxel is NaN",
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
    "image and label exchanged": Broken(
        exchange, "image-is-mask", "exchanged", train=True, train_words="labels must be whole numbers"
    ),
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
    "splits with a patient in two parts": Broken(
        overlapping_splits, "splits", "fold 0 has a patient in two parts", train=True, options=SPLITS
    ),
    "no splits file": Broken(lambda r: None, "splits", "does not exist", train=True, options=SPLITS),
    "splits that lack a patient": Broken(
        lambda r: splits_of(r, drop=CASE),
        "not-in-splits",
        f"the patient '{CASE}' is in no part of fold 0",
        train=True,
        train_words=f"the patient '{CASE}' is in no part of the splits",
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
    "two sides of one patient": Broken(
        lambda r: rename(r, [f"A1{n // 2}_{'LR'[n % 2]}" for n in range(6)]),
        "patients-alike",
        "as A10_L and A10_R; if those are one patient",
    ),
    "patients taken for one": Broken(
        lambda r: rename(r, [*(f"LiTS17_scan_{n:03d}" for n in range(10)), "p1", "p2", "p3"]),
        "patient-crowded",
        "10 scans count as one patient, LiTS17",
        num_cases=13,
    ),
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
    "one scan placed by the identity": Broken(
        lambda r: [place(r, np.diag([1.0, 1, 2, 1]), case) for case in cases(r) if case != CASE],
        "affine-unset",
        "is placed by the identity matrix",
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
