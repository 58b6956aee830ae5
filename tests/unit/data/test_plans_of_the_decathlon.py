"""The ten tasks of the Medical Segmentation Decathlon by their published median shapes and spacings.

What a plan must be sensible about, whatever the task, and what it is for each, so that a changed rule shows.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from medvisionllama.config import DataConfig
from medvisionllama.data.fingerprint import Fingerprint, fingerprint
from medvisionllama.data.grid_rules import total_stride
from medvisionllama.data.index import Dataset, open_dataset
from medvisionllama.data.planning import Plan, make_plan


@dataclass(frozen=True)
class Task:
    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    # What follows from them, and why that is sensible.
    planned_mm: tuple[float, float, float]
    crop: tuple[int, int, int]
    stride: tuple[int, int, int]
    why: str


MR4 = ("FLAIR", "T1w", "t1gd", "T2w")
TASKS = (
    Task(
        "BrainTumour", (240, 240, 155), (1.0, 1.0, 1.0), MR4, ("edema", "non-enhancing", "enhancing"),
        (2.0, 2.0, 2.0), (48, 48, 56), (8, 8, 8),
        "a crop of 10 cm shows a tumour with its surroundings; at 1 mm it would be 5 cm",
    ),
    Task(
        "Heart", (320, 320, 115), (1.25, 1.25, 1.37), ("MRI",), ("left atrium",),
        (2.0, 2.0, 2.0), (48, 48, 56), (8, 8, 8), "the left atrium, 5 to 7 cm, fits the crop",
    ),
    Task(
        "Liver", (512, 512, 432), (0.77, 0.77, 1.0), ("CT",), ("liver", "cancer"),
        (2.0, 2.0, 2.0), (48, 48, 56), (8, 8, 8), "10 cm of a 39 cm trunk instead of 4 cm",
    ),
    Task(
        "Hippocampus", (35, 50, 36), (1.0, 1.0, 1.0), ("MRI",), ("Anterior", "Posterior"),
        (1.0, 1.0, 1.0), (40, 56, 40), (8, 8, 8), "the whole scan at its own spacing",
    ),
    Task(
        "Prostate", (320, 320, 20), (0.62, 0.62, 3.6), ("T2", "ADC"), ("PZ", "TZ"),
        (1.55, 1.55, 3.6), (80, 80, 20), (8, 8, 4),
        "12 cm show a prostate of 5 in its place; all 20 slices, halved after the plane has caught up",
    ),
    Task(
        "Lung", (512, 512, 252), (0.79, 0.79, 1.24), ("CT",), ("cancer",),
        (2.0, 2.0, 2.0), (48, 48, 56), (8, 8, 8), "median lung tumours measure centimetres",
    ),
    Task(
        "Pancreas", (512, 512, 93), (0.8, 0.8, 2.5), ("CT",), ("pancreas", "cancer"),
        (2.0, 2.0, 2.5), (56, 56, 40), (8, 8, 8), "11 × 11 × 10 cm around the pancreas; slices of 2.5 mm stay as they are",
    ),
    Task(
        "HepaticVessel", (512, 512, 49), (0.8, 0.8, 5.0), ("CT",), ("vessel", "tumour"),
        (2.0, 2.0, 5.0), (64, 72, 28), (8, 8, 4), "slices of 5 mm are kept apart at the first stage",
    ),
    Task(
        "Spleen", (512, 512, 90), (0.79, 0.79, 5.0), ("CT",), ("spleen",),
        (2.0, 2.0, 5.0), (64, 72, 28), (8, 8, 4), "14 cm hold a spleen of 12",
    ),
    Task(
        "Colon", (512, 512, 95), (0.78, 0.78, 5.0), ("CT",), ("colon cancer primaries",),
        (2.0, 2.0, 5.0), (64, 72, 28), (8, 8, 4), "as for the spleen",
    ),
)  # fmt: skip


# Slices three times as thick as the plane's voxels, and fewer.
THICK = {"Prostate", "Pancreas", "HepaticVessel", "Spleen", "Colon"}


def plan_of(task: Task, **settings) -> Plan:
    classes = dict(enumerate(task.classes, start=1))
    dataset = Dataset(task.name, Path(), (), task.channels, classes)
    found = Fingerprint({"median": task.shape}, {"median": task.spacing_mm}, len(task.channels))
    return make_plan(dataset, found, DataConfig(**settings), flip=True, patch_size=None)


tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@tasks
def test_what_is_planned(task):
    plan = plan_of(task)
    assert plan.spacing_mm == task.planned_mm, task.why
    assert plan.crop_size == task.crop, task.why
    assert total_stride(plan.strides) == task.stride, task.why


@tasks
@pytest.mark.parametrize("budget", [32_768, 131_072, 1_000_000])
def test_a_crop_is_whole_tokens_within_the_budget(task, budget):
    plan = plan_of(task, max_crop_voxels=budget)
    assert math.prod(plan.crop_size) <= budget
    unit = total_stride(plan.strides)
    assert all(size % step == 0 for size, step in zip(plan.crop_size, unit, strict=True))


@tasks
def test_a_crop_uses_the_budget_or_covers_the_scan(task):
    plan = plan_of(task)
    covers = all(
        size * edge >= 0.95 * length * mm
        for size, edge, length, mm in zip(
            plan.crop_size, plan.spacing_mm, task.shape, task.spacing_mm, strict=True
        )
    )
    assert covers or math.prod(plan.crop_size) > 131_072 / 2


@tasks
def test_thick_slices_are_not_halved_before_the_plane_has_caught_up(task):
    plan = plan_of(task)
    current = plan.spacing_mm
    for stage in plan.strides:
        for edge, step in zip(current, stage, strict=True):
            assert step == 1 or edge < 2 * min(current)
        current = tuple(edge * step for edge, step in zip(current, stage, strict=True))
    assert max(current) <= 2 * min(current)


@tasks
def test_a_crop_shows_enough_of_the_scan_or_is_as_coarse_as_allowed(task):
    plan = plan_of(task)
    extent = [size * edge for size, edge in zip(task.shape, task.spacing_mm, strict=True)]
    seen = 131_072 * math.prod(plan.spacing_mm) / math.prod(extent)
    assert seen >= (0.4 if task.name in THICK else 1 / 8) or min(plan.spacing_mm) == 2.0
    assert all(after in (before, max(before, min(plan.spacing_mm))) for before, after in zip(task.spacing_mm, plan.spacing_mm, strict=True))  # fmt: skip


@tasks
def test_a_side_of_the_crop_measures_seven_centimetres_or_the_scan(task):
    plan = plan_of(task)
    for size, edge, length, mm in zip(
        plan.crop_size, plan.spacing_mm, task.shape, task.spacing_mm, strict=True
    ):
        assert size * edge >= min(65.0, 0.95 * length * mm)


@tasks
def test_zero_keeps_the_spacing_of_the_scans(task):
    assert plan_of(task, coarsest_mm=0).spacing_mm == task.spacing_mm


@tasks
def test_a_large_budget_needs_less_coarsening(task):
    small, large = plan_of(task), plan_of(task, max_crop_voxels=128**3)
    assert all(fine <= coarse for fine, coarse in zip(large.spacing_mm, small.spacing_mm, strict=True))
    if task.name in {"BrainTumour", "Heart", "Prostate"}:
        assert large.spacing_mm == task.spacing_mm


@tasks
def test_every_channel_has_its_own_rule(task):
    plan = plan_of(task)
    assert plan.channel_rules == tuple("dataset" if name == "CT" else "image" for name in task.channels)


@tasks
def test_every_decision_has_a_reason(task):
    reasons = plan_of(task).reasons
    channels = {f"normalisation of {name}" for name in task.channels}
    assert reasons.keys() == {"spacing_mm", "crop_size", "strides", "flip_axes", "resize"} | channels
    assert all(reason and "\n" not in reason for reason in reasons.values())


def test_the_reason_of_a_coarser_spacing_names_both_and_the_setting():
    reason = plan_of(TASKS[2]).reasons["spacing_mm"]
    assert "0.77 × 0.77 × 1 mm" in reason
    assert "data.coarsest_mm" in reason


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "spacing", "crop", "strides", "flips"),
    [
        ("Task04_Hippocampus", (1.0, 1.0, 1.0), (40, 56, 40), ((2, 2, 2),) * 3, (0,)),
        ("Task101_ACDC", (1.85, 1.85, 10.0), (112, 112, 10), ((2, 2, 1), (2, 2, 1), (2, 2, 2)), ()),
        ("Task104_SunnybrookLV", (1.88, 1.88, 8.0), (112, 112, 10), ((2, 2, 1), (2, 2, 1), (2, 2, 2)), ()),
    ],
)
def test_plans_of_the_sets_at_hand(data_root, name, spacing, crop, strides, flips):
    dataset = open_dataset(data_root / name)
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=True, patch_size=None)
    assert (plan.spacing_mm, plan.crop_size, plan.strides, plan.flip_axes) == (spacing, crop, strides, flips)
    assert plan.channel_rules == ("image",)
