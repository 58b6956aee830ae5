"""Whatever a scan's orientation, spacing, place and shape: voxels keep their place in the patient, to the voxel."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medvisionllama.config import Config
from medvisionllama.data.planning import Normalisation, Plan
from medvisionllama.data.readers import read_image, read_label
from medvisionllama.data.volume import Volume, from_ras, to_ras
from medvisionllama.inference.predictor import Member, Predictor
from medvisionllama.inference.writers import write_mask

sizes = st.integers(1, 7)
spacings = st.floats(0.3, 9.0)
angles = st.floats(-0.5, 0.5)


@st.composite
def volumes(draw, *, num_channels=1):
    """A scan with any axis order and direction, turned a little, of voxels of any size, anywhere."""
    shape = (draw(sizes), draw(sizes), draw(sizes))
    order = draw(st.permutations(range(3)))
    axes = np.eye(3)[:, order] * [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    turn = np.eye(3)
    for first, second in itertools.combinations(range(3), 2):
        angle, plane = draw(angles), np.eye(3)
        plane[[first, first, second, second], [first, second, first, second]] = [
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        ]
        turn = turn @ plane
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag([draw(spacings) for _ in range(3)])
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    array = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(num_channels, *shape))
    return Volume(array.astype(np.float32), affine)


@settings(max_examples=150, deadline=None)
@given(volumes(num_channels=2))
def test_turning_to_ras_and_back_changes_nothing(volume):
    np.testing.assert_array_equal(from_ras(to_ras(volume).array, volume.affine), volume.array)


@settings(max_examples=150, deadline=None)
@given(volumes())
def test_every_voxel_keeps_its_place_in_the_patient(volume):
    ras = to_ras(volume)
    indices = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij")).reshape(3, -1)
    world = volume.affine @ np.vstack([indices, np.ones(indices.shape[1])])
    exact = (np.linalg.inv(ras.affine) @ world)[:3]
    found = np.rint(exact).astype(int)
    np.testing.assert_allclose(exact, found, atol=1e-6)
    np.testing.assert_array_equal(ras.array[0][tuple(found)], volume.array[0][tuple(indices)])
    back = np.linalg.inv(volume.affine) @ ras.affine @ np.vstack([found, np.ones(found.shape[1])])
    np.testing.assert_array_equal(np.rint(back[:3]).astype(int), indices)


class Bright(nn.Module):
    """Class 1 where the voxel is positive, class 2 where it is above one."""

    def forward(self, windows):
        return torch.cat([torch.zeros_like(windows), windows * 1000, windows * 2000 - 1000], dim=1)


def predictor(spacing_mm, crop):
    plan = Plan(
        channels=("CT",),
        classes={1: "bright", 7: "brighter"},
        merged=False,
        resize=False,
        spacing_mm=spacing_mm,
        crop_size=crop,
        strides=((1, 1, 1), (1, 1, 1), (1, 1, 1)),
        flip_axes=(0,),
        normalisation=(Normalisation(kind="dataset", low=-100, high=100),),
    )
    config = Config.model_validate({"train": {"max_minutes": 1, "precision": "fp32"}})
    return Predictor([Member(Bright(), plan, config, torch.device("cpu"))])


@settings(max_examples=100, deadline=None)
@given(volumes(), st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
def test_a_mask_is_found_voxel_by_voxel_on_the_scan_s_own_grid(volume, crop):
    mask = predictor(to_ras(volume).spacing_mm, crop).predict(volume).mask
    values = volume.array[0]
    expected = np.where(values > 1, 7, np.where(values > 0, 1, 0))
    clear = np.minimum(np.abs(values), np.abs(values - 1)) > 1e-4
    np.testing.assert_array_equal(mask.array[clear], expected[clear])
    np.testing.assert_array_equal(mask.affine, volume.affine)


@settings(max_examples=60, deadline=None)
@given(volumes(), st.tuples(spacings, spacings, spacings))
def test_any_working_spacing_gives_a_mask_on_the_scan_s_own_grid(volume, spacing_mm):
    mask = predictor(spacing_mm, (4, 4, 4)).predict(volume).mask
    assert mask.array.shape == volume.shape
    everywhere = Volume(np.full_like(volume.array, 0.4), volume.affine)
    assert (predictor(spacing_mm, (4, 4, 4)).predict(everywhere).mask.array == 1).all()


@settings(max_examples=60, deadline=None)
@given(volume=volumes())
@pytest.mark.parametrize("ending", [".nii.gz", ".seg.nrrd", ".mha"])
def test_a_mask_file_lies_where_its_scan_lies(tmp_path_factory, ending, volume):
    folder = tmp_path_factory.mktemp("masks")
    nib.save(nib.Nifti1Image(volume.array[0], volume.affine), folder / "scan.nii.gz")
    scan = read_image((folder / "scan.nii.gz",))
    mask = (scan.array[0] > 0).astype(np.uint8)
    write_mask(folder / f"mask{ending}", mask, scan.affine, like=folder / "scan.nii.gz")
    written = read_label(folder / f"mask{ending}")
    np.testing.assert_array_equal(written.array, mask)
    np.testing.assert_allclose(written.affine, scan.affine, atol=1e-4)
