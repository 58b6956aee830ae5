import math

import pytest

from medvisionllama.config import DataConfig
from medvisionllama.data.fingerprint import Fingerprint, fingerprint
from medvisionllama.data.grid_rules import plan_crop, plan_strides, total_stride
from medvisionllama.data.index import Dataset, open_dataset
from medvisionllama.data.planning import Normalisation, Plan, is_ct, make_plan
from medvisionllama.errors import ConfigError

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


@pytest.mark.parametrize(
    "names",
    [
        ("Anterior", "Posterior"),
        ("tumour",),
        ("liver", "clear rim"),
        ("vertebra L1", "vertebra_L2", "tumour grade R0"),
        ("bright rim", "upright", "cleft"),
        ("LNs", "RNA", "LGE"),
        ("colon", "ribs"),
    ],
)
def test_left_and_right_are_mirrored_where_classes_do_not_tell(tmp_path, names):
    assert plan_of(tmp_path, *names).flip_axes == (0,)
    assert plan_of(tmp_path, *names, flip=False).flip_axes == ()


@pytest.mark.parametrize(
    "name",
    [
        *("left ventricle", "Kidney_Right", "hippocampus L", "lung-r", "Rt femur", "rib_left_1", "LV"),
        # A side written together with its organ.
        *("LeftKidney", "KidneyRight", "LeftLung", "leftlung", "lungright", "LKidney", "kidneyL", "LEFTLUNG"),
    ],
)
def test_left_and_right_are_not_mirrored_where_a_class_tells(tmp_path, name):
    plan = plan_of(tmp_path, "liver", name)
    assert plan.flip_axes == ()
    assert f"the class {name!r} tells left from right" in plan.reasons["flip_axes"]


@pytest.mark.parametrize(
    "names", [("rib_L1", "rib_R1"), ("lkidney", "rkidney"), ("RCA", "LCA"), ("upleftlobe", "uprightlobe")]
)
def test_two_classes_that_differ_in_their_side_only_tell_it(tmp_path, names):
    assert plan_of(tmp_path, *names).flip_axes == ()
    assert plan_of(tmp_path, names[0]).flip_axes == plan_of(tmp_path, names[1]).flip_axes == (0,)


def test_a_plan_survives_json(tmp_path):
    rules = (Normalisation(kind="dataset", low=-900.0, high=300.0, mean=40.5, std=12.25),)
    plan = plan_of(tmp_path).model_copy(update={"normalisation": rules})
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        *(
            (name, True)
            for name in ("CT", " ct ", "CTNormalization", "CT arterial", "ct_venous", "CT-scan", "(CT)")
        ),
        *((name, True) for name in ("CTA", "CBCT", "NCCT", "CECT", "cbct_planning", "portal CT")),
        *(
            (name, False)
            for name in (
                "MRI",
                "T1c",
                "T1ct",
                "T1 CT",
                "Activity",
                "FACT",
                "PCT map",
                "ctp",
                "PET/CT",
                "CT_CBF",
                "",
            )
        ),
    ],
)
def test_computed_tomography_is_told_by_its_channel_name(channel, expected):
    assert is_ct(channel) is expected


THICK = (0.6, 0.6, 4.0)


def of_spacings(*spacings: tuple[float, float, float], shape=(40, 40, 8)) -> Fingerprint:
    cases = {str(number): spacing for number, spacing in enumerate(spacings)}
    return Fingerprint(dict.fromkeys(cases, shape), cases, 1)


def planned(tmp_path, found: Fingerprint, **settings) -> Plan:
    return make_plan(dataset(tmp_path), found, DataConfig(**settings), flip=True, patch_size=None)


def test_thick_slices_that_differ_take_the_tenth_percentile(tmp_path):
    found = of_spacings(*[THICK] * 8, (0.6, 0.6, 2.0), (0.6, 0.6, 2.0), (0.6, 0.6, 2.0))
    plan = planned(tmp_path, found)
    assert plan.spacing_mm == (0.6, 0.6, 2.0)
    assert "percentile 10" in plan.reasons["spacing_mm"]
    assert planned(tmp_path, found, thick_axis_percentile=50).spacing_mm == THICK


def test_the_thick_axis_never_becomes_thinner_than_the_others(tmp_path):
    found = of_spacings(*[THICK] * 8, *[(0.6, 0.6, 0.3)] * 3)
    assert planned(tmp_path, found).spacing_mm == (0.6, 0.6, 0.6)


@pytest.mark.parametrize(
    ("common", "rare", "shape"),
    [
        ((1.0, 1.0, 2.0), (1.0, 1.0, 1.0), (40, 40, 8)),  # not thick
        (THICK, (0.6, 0.6, 2.0), (20, 40, 8)),  # thick, but not few
    ],
)
def test_spacings_that_differ_take_the_median_else(tmp_path, common, rare, shape):
    assert planned(tmp_path, of_spacings(*[common] * 8, *[rare] * 3, shape=shape)).spacing_mm == common


def test_an_axis_of_one_slice_is_never_halved(tmp_path):
    plan = planned(tmp_path, of_spacings((1.0, 1.0, 1.0), shape=(64, 64, 1)))
    assert total_stride(plan.strides) == (8, 8, 1)
    assert plan.crop_size == (64, 64, 1)
    assert plan.reasons["strides"] == "z has 1 voxel and is never halved in three stages"


def test_the_spacing_of_a_single_slice_decides_nothing(tmp_path):
    plan = planned(tmp_path, of_spacings((1.0, 1.0, 0.1), shape=(64, 64, 1)))
    assert total_stride(plan.strides) == (8, 8, 1)


def test_few_slices_are_halved_as_often_as_they_last(tmp_path):
    plan = planned(tmp_path, of_spacings((1.0, 1.0, 1.0), shape=(64, 64, 12)))
    assert (total_stride(plan.strides), plan.crop_size) == ((8, 8, 4), (64, 64, 12))


def test_a_given_crop_keeps_the_spacing_of_the_scans(tmp_path):
    found = of_spacings((0.8, 0.8, 0.8), shape=(512, 512, 512))
    assert planned(tmp_path, found).spacing_mm == (2.0, 2.0, 2.0)
    assert planned(tmp_path, found, crop_size=(64, 64, 64)).spacing_mm == (0.8, 0.8, 0.8)


@pytest.mark.parametrize("edge", [8e-6, 8e-4, 0.0123456, 0.8])
def test_scans_of_a_microscope_keep_their_spacing(tmp_path, edge):
    found = of_spacings((edge, edge, edge), shape=(40, 40, 40))
    plan = planned(tmp_path, found)
    assert plan.spacing_mm == found.median_spacing_mm == pytest.approx((edge,) * 3, rel=5e-4)
    assert plan.crop_size == (40, 40, 40)
    whole = planned(tmp_path, found, geometry="resize", crop_size=(16, 16, 16))
    assert whole.spacing_mm == pytest.approx((40 / 16 * edge,) * 3, rel=5e-4)


@pytest.mark.parametrize("edge", [8e-6, 8e-4, 0.08])
def test_a_raised_spacing_is_no_coarser_than_the_view_needs(tmp_path, edge):
    plan = planned(tmp_path, of_spacings((edge, edge, edge), shape=(128, 128, 128)))
    # 1.26 times as long shows an eighth; two digits round that up.
    assert plan.spacing_mm == pytest.approx((1.26 * edge,) * 3, rel=0.1)
    assert plan.spacing_mm[0] >= 1.259 * edge


def test_what_is_set_by_hand_is_obeyed_and_said(tmp_path):
    strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    plan = plan_of(
        tmp_path,
        "left",
        spacing_mm=(2, 2, 2),
        crop_size=(16, 16, 16),
        strides=strides,
        flip_axes=("z", "x"),
        normalisation=("-160:240",),
    )
    assert (plan.spacing_mm, plan.crop_size, plan.strides) == ((2, 2, 2), (16, 16, 16), strides)
    assert plan.flip_axes == (0, 2)
    assert plan.channel_rules == ("-160:240",)
    assert plan.unitless_channels == ()
    by_hand = {key: reason for key, reason in plan.reasons.items() if "set by you" in reason}
    assert by_hand.keys() == {"spacing_mm", "crop_size", "strides", "flip_axes", "normalisation of MRI"}
    assert "'left' tells left from right" in by_hand["flip_axes"]


def test_no_axis_is_mirrored_if_so_asked(tmp_path):
    assert plan_of(tmp_path, flip_axes=()).flip_axes == ()


def test_a_rule_for_each_channel_or_none(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.normalisation names 2 channels, the dataset has 1 \(MRI\); name each"
    ):
        plan_of(tmp_path, normalisation=("image", "dataset"))


def test_auto_follows_the_name_of_the_channel(tmp_path):
    plan = plan_of(tmp_path, normalisation=("auto",)).model_copy(update={"channels": ("CT",)})
    assert plan.channel_rules == ("dataset",)
    assert plan.unitless_channels == ()
    assert plan_of(tmp_path).unitless_channels == (0,)


def test_the_reason_of_ct_names_its_measured_limits(tmp_path):
    plan = plan_of(tmp_path).model_copy(update={"channels": ("CT",)})
    rule = Normalisation(kind="dataset", low=-57.25, high=164.0, mean=100.0, std=40.0)
    reason = plan.with_normalisation((rule,), 30).reasons["normalisation of CT"]
    assert "30 training cases, here -57.25 to 164" in reason


def test_the_lines_of_a_plan_give_reasons(tmp_path):
    lines = plan_of(tmp_path).lines
    assert lines[0].startswith("crops of 40×56×40 voxels: covers the median scan of 36 × 49 × 35.5 mm")
    assert lines[1] == "voxels of 1 × 1 × 1 mm: what every scan has"
    assert len(lines) == 5


def test_a_crop_of_one_voxel_is_refused(dataset_folder):
    dataset = open_dataset(dataset_folder(num_cases=3))
    found = fingerprint(dataset)
    with pytest.raises(ConfigError, match="1×1×1 voxel has nothing to learn from"):
        make_plan(dataset, found, DataConfig(spacing_mm=(90.0, 90.0, 90.0)), flip=True, patch_size=None)
