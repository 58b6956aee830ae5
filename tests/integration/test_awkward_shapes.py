"""Datasets shaped like the awkward tasks of the Decathlon: each is trained, and masks lie on the scans' grids."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medvisionllama import Predictor, api
from medvisionllama.run_dir import RunDir

from .conftest import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    **TINY,
    "network.insert": "none",
    "train.num_validations": 1,
    "train.batch_size": 1,
    "inference.flip": False,
    "inference.overlap": 0.1,
}


@dataclass(frozen=True)
class Shape:
    """A dataset to write: shape and spacing of each case, and the box that each class fills."""

    shapes: Sequence[tuple[int, ...]]
    spacing_mm: tuple[float, float, float]
    values: tuple[int, ...] = (1,)
    channels: tuple[str, ...] = ("MRI",)
    box: int | None = None
    background: float = 100.0
    overrides: dict[str, object] = field(default_factory=dict)


def write(root: Path, kind: Shape) -> Path:
    """Four cases in MSD layout: boxes side by side along x and y, brighter with each class."""
    rng = np.random.default_rng(0)
    affine = np.diag([*kind.spacing_mm, 1.0])
    entries = []
    for number, shape in enumerate([*kind.shapes] * 4 if len(kind.shapes) == 1 else kind.shapes):
        label = np.zeros(shape, np.uint16 if max(kind.values) > 255 else np.uint8)
        image = rng.normal(kind.background, 20, (*shape, len(kind.channels)))
        across = int(np.ceil(np.sqrt(len(kind.values))))
        for place, value in enumerate(kind.values):
            x, y = place % across, place // across
            edge = kind.box or shape[0] // (across + 1)
            box = (
                slice(2 + x * edge, 2 + (x + 1) * edge),
                slice(2 + y * edge, 2 + (y + 1) * edge),
                slice(shape[2] // 4, max(shape[2] // 4 + 1, shape[2] - shape[2] // 4))
                if not kind.box
                else slice(0, 1),
            )
            label[box] = value
            image[box] += 60 + 15 * place
        for part, array in (
            ("imagesTr", image if len(kind.channels) > 1 else image[..., 0]),
            ("labelsTr", label),
        ):
            (root / part).mkdir(parents=True, exist_ok=True)
            stored = array if part == "labelsTr" else array.astype(np.int16)
            nib.save(nib.Nifti1Image(stored, affine), root / part / f"case_{number:03d}.nii.gz")
        entries.append({part: f"{part}sTr/case_{number:03d}.nii.gz" for part in ("image", "label")})
    content = {
        "name": "awkward",
        "modality": {str(number): name for number, name in enumerate(kind.channels)},
        "labels": {"0": "background", **{str(value): f"organ {value}" for value in kind.values}},
        "training": entries,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


KINDS = {
    "four channels in 4-D": Shape(
        [(24, 24, 20)], (1.0, 1.0, 1.0), (1, 2, 3), ("FLAIR", "T1w", "t1gd", "T2w")
    ),
    "two channels, thick slices": Shape([(40, 40, 20)], (0.6, 0.6, 3.6), (1, 2), ("T2", "ADC")),
    "CT with slices of 5 mm": Shape([(40, 40, 12)], (0.8, 0.8, 5.0), channels=("CT",), background=-800.0),
    "single slices": Shape([(64, 64, 1)], (1.0, 1.0, 1.0), (1, 2)),
    "one single slice among volumes": Shape([(24, 24, 16)] * 3 + [(24, 24, 1)], (1.0, 1.0, 1.0)),
    "three voxels": Shape([(24, 24, 16)], (1.0, 1.0, 1.0), (1, 2, 3), box=1),
    "thirty classes": Shape([(40, 40, 12)], (1.0, 1.0, 2.0), tuple(range(1, 31))),
    "values with gaps": Shape([(24, 24, 16)], (1.0, 1.0, 1.0), (3, 17, 700)),
    "sizes far apart": Shape([(12, 14, 9), (24, 20, 40), (70, 60, 30), (20, 90, 12)], (1.0, 1.0, 1.5)),
    "a view too small at its own spacing": Shape(
        [(60, 60, 24)], (0.8, 0.8, 2.5), (1, 2), ("CT",), overrides={"data.max_crop_voxels": 2_048}
    ),
    "a fixed window": Shape(
        [(24, 24, 16)], (1.0, 1.0, 1.0), channels=("CT",), overrides={"data.normalisation": ["-160:240"]}
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], tuple[Path, RunDir]]:
    """Train each kind once: its data and its run."""
    made: dict[str, tuple[Path, RunDir]] = {}

    def run(name: str) -> tuple[Path, RunDir]:
        if name not in made:
            folder = tmp_path_factory.mktemp("awkward")
            data = write(folder / "data", KINDS[name])
            overrides = {**SMALL, **KINDS[name].overrides}
            result = api.train(data, out=folder / "run", epochs=1, overrides=overrides, test=False)
            made[name] = (data, RunDir(result.path))
        return made[name]

    return run


@pytest.mark.parametrize("name", KINDS)
def test_masks_come_back_on_the_grid_of_every_scan_with_declared_values(name, runs, tmp_path):
    data, run = runs(name)
    scans = sorted((data / "imagesTr").iterdir())
    api.predict(run.path, scans, out=tmp_path)
    for scan in scans:
        mask, image = nib.load(tmp_path / scan.name), nib.load(scan)
        assert mask.shape == image.shape[:3]
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert set(np.unique(np.asarray(mask.dataobj)).tolist()) <= {0, *KINDS[name].values}


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_have_an_output_for_every_class(name, runs):
    data, run = runs(name)
    scan = min((data / "imagesTr").iterdir())
    shares = Predictor.from_run(run.path).predict(scan, probabilities=True).probabilities / 255
    assert len(shares) == len(KINDS[name].values) + 1
    np.testing.assert_allclose(shares.sum(0), 1, atol=len(shares) / 2 / 255)


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_is_stored_with_its_reasons(name, runs):
    plan = json.loads(runs(name)[1].plan.read_text())
    assert {"spacing_mm", "crop_size", "strides", "flip_axes", "resize"} < plan["reasons"].keys()
    assert len([key for key in plan["reasons"] if key.startswith("normalisation of")]) == len(
        KINDS[name].channels
    )


def plan_of(runs: Callable[[str], tuple[Path, RunDir]], name: str) -> dict:
    return json.loads(runs(name)[1].plan.read_text())


def test_thick_slices_are_kept_apart_in_a_run(runs):
    plan = plan_of(runs, "two channels, thick slices")
    assert [stride[2] for stride in plan["strides"]] == [1, 1, 2]


def test_hounsfield_units_are_clipped_to_labelled_tissue(runs):
    plan = plan_of(runs, "CT with slices of 5 mm")
    [rule] = plan["normalisation"]
    assert -820 < rule["low"] < rule["high"] < -650
    assert f"{rule['low']:.5g} to {rule['high']:.5g}" in plan["reasons"]["normalisation of CT"]


def test_a_window_is_kept_as_given(runs):
    [rule] = plan_of(runs, "a fixed window")["normalisation"]
    assert (rule["kind"], rule["low"], rule["high"], rule["mean"]) == ("dataset", -160.0, 240.0, 40.0)


def test_single_slices_are_cut_as_slices(runs):
    plan = plan_of(runs, "single slices")
    assert plan["crop_size"][2] == 1
    assert all(stride[2] == 1 for stride in plan["strides"])


def test_a_view_too_small_is_widened(runs):
    x, y, z = plan_of(runs, "a view too small at its own spacing")["spacing_mm"]
    assert 0.8 < x == y <= 2.0
    assert z == 2.5
