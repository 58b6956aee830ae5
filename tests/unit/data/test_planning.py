import math

import pytest

from medvisionllama.config import DataConfig
from medvisionllama.data.fingerprint import Fingerprint
from medvisionllama.data.index import Dataset
from medvisionllama.data.planning import (
    Normalisation,
    Plan,
    is_ct,
    make_plan,
    plan_crop,
    plan_strides,
    total_stride,
)

ISOTROPIC = Fingerprint({"a": (35, 50, 36), "b": (37, 48, 35)}, dict.fromkeys("ab", (1.0, 1.0, 1.0)), 1)


def dataset(tmp_path, *names: str) -> Dataset:
    classes = dict(enumerate(names or ("Anterior", "Posterior"), start=1))
    return Dataset("task", tmp_path, (), ("MRI",), classes)


def plan_of(tmp_path, *names: str, flip: bool = True, patch_size: int | None = None, **settings) -> Plan:
    data = DataConfig(**settings)
    return make_plan(dataset(tmp_path, *names), ISOTROPIC, data, flip=flip, patch_size=patch_size)


@pytest.mark.parametrize(
    ("spacing", "strides"),
    [
        ((1.0, 1.0, 1.0), ((2, 2, 2), (2, 2, 2), (2, 2, 2))),
        ((1.5, 1.5, 10.0), ((2, 2, 1), (2, 2, 1), (2, 2, 2))),
        ((0.5, 0.5, 7.5), ((2, 2, 1), (2, 2, 1), (2, 2, 1))),
        ((1.0, 1.0, 3.0), ((2, 2, 1), (2, 2, 2), (2, 2, 2))),
        ((5.0, 0.8, 0.8), ((1, 2, 2), (1, 2, 2), (2, 2, 2))),
        ((1.0, 1.0, 1.99), ((2, 2, 2), (2, 2, 2), (2, 2, 2))),
    ],
)
def test_coarse_axes_are_halved_later(spacing, strides):
    assert plan_strides(spacing) == strides


def test_the_total_stride_is_the_product_of_the_stages():
    assert total_stride(((2, 2, 1), (2, 2, 1), (2, 2, 2))) == (8, 8, 2)


def test_a_small_scan_is_covered_by_one_crop():
    assert plan_crop((35.0, 50.0, 36.0), (1.0, 1.0, 1.0), (8, 8, 8), 131_072) == (40, 56, 40)


def test_the_physically_longest_axis_is_shortened_first():
    assert plan_crop((64.0, 64.0, 128.0), (1.0, 1.0, 2.0), (8, 8, 8), 64**3 - 1) == (64, 64, 56)


@pytest.mark.parametrize("budget", [512, 5_000, 40_000, 131_072])
@pytest.mark.parametrize(
    ("extent", "spacing", "unit"),
    [
        ((240.0, 240.0, 155.0), (1.0, 1.0, 1.0), (8, 8, 8)),
        ((320.0, 330.0, 90.0), (1.5, 1.5, 10.0), (8, 8, 2)),
        ((400.0, 300.0, 900.0), (3.0, 3.0, 3.0), (8, 8, 8)),
    ],
)
def test_a_crop_is_whole_tokens_and_within_the_budget(extent, spacing, unit, budget):
    crop = plan_crop(extent, spacing, unit, budget)
    assert math.prod(crop) <= budget
    assert all(size % step == 0 and size >= step for size, step in zip(crop, unit, strict=True))


def test_a_crop_is_one_token_where_the_budget_is_less():
    assert plan_crop((100.0, 100.0, 100.0), (1.0, 1.0, 1.0), (8, 8, 8), 100) == (8, 8, 8)


def test_spacing_and_crop_come_from_the_fingerprint(tmp_path):
    plan = plan_of(tmp_path)
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.crop_size == (40, 56, 40)
    assert not plan.resize


def test_a_given_spacing_decides_strides_and_crop(tmp_path):
    plan = plan_of(tmp_path, spacing_mm=(1.0, 1.0, 6.0))
    assert plan.strides == ((2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert plan.crop_size == (40, 56, 6)


def test_a_given_crop_is_rounded_up_to_whole_tokens(tmp_path):
    assert plan_of(tmp_path, crop_size=(16, 17, 30)).crop_size == (16, 24, 32)
    assert plan_of(tmp_path, crop_size=(4, 4, 4), patch_size=4).crop_size == (4, 4, 4)


def test_a_patch_is_one_cubic_stride(tmp_path):
    assert total_stride(plan_of(tmp_path, patch_size=4).strides) == (4, 4, 4)


def test_resizing_keeps_the_given_shape(tmp_path):
    plan = plan_of(tmp_path, geometry="resize", crop_size=(64, 64, 32), patch_size=8)
    assert plan.resize
    assert plan.crop_size == (64, 64, 32)


def test_every_class_has_an_output_after_background(tmp_path):
    plan = plan_of(tmp_path, "a", "b", "c")
    assert (plan.num_outputs, plan.output_values) == (4, (1, 2, 3))


def test_merged_classes_have_one_output(tmp_path):
    plan = plan_of(tmp_path, "a", "b", "c", labels="foreground")
    assert (plan.num_outputs, plan.output_values) == (1, (1,))


@pytest.mark.parametrize("names", [("Anterior", "Posterior"), ("tumour",), ("liver", "clear rim")])
def test_left_and_right_are_mirrored_where_classes_do_not_tell(tmp_path, names):
    assert plan_of(tmp_path, *names).flip_axes == (0,)
    assert plan_of(tmp_path, *names, flip=False).flip_axes == ()


@pytest.mark.parametrize("name", ["left ventricle", "Kidney_Right", "hippocampus L", "lung-r", "Rt femur"])
def test_left_and_right_are_not_mirrored_where_a_class_tells(tmp_path, name):
    assert plan_of(tmp_path, "liver", name).flip_axes == ()


def test_a_plan_survives_json(tmp_path):
    rules = (Normalisation(kind="dataset", low=-900.0, high=300.0, mean=40.5, std=12.25),)
    plan = plan_of(tmp_path).model_copy(update={"normalisation": rules})
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("channel", "expected"),
    [("CT", True), (" ct ", True), ("CTNormalization", True), ("MRI", False), ("T1c", False)],
)
def test_computed_tomography_is_told_by_its_channel_name(channel, expected):
    assert is_ct(channel) is expected
