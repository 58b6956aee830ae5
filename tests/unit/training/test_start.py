"""Which weights of an earlier run fit a new one, and whom it may not be scored by."""

from pathlib import Path

import pytest
import torch

from medvisionllama._files import write_json
from medvisionllama.checkpoint import frozen, trainable
from medvisionllama.config import load_config, write_config
from medvisionllama.data.index import Case, Dataset
from medvisionllama.data.planning import Plan
from medvisionllama.data.splits import Fold, Selection, Splits
from medvisionllama.errors import CheckpointError, ConfigError, DataError
from medvisionllama.llm.block import tensors_sha256
from medvisionllama.networks.factory import build_network
from medvisionllama.run_dir import RunDir
from medvisionllama.training.seen import check_strangers, patients_by_part, seen_by
from medvisionllama.training.start import Start, begin_with, started_words

TINY = {
    "data.path": "here",
    "network.stem_channels": [4, 6, 8],
    "network.context_channels": [6, 8],
    "network.width": 24,
    "network.depth": 3,
    "network.insert_after": 2,
    "network.num_heads": 2,
    "network.insert": "mlp",
}


def plan(channels=("T1", "T2"), classes=None, crop=(32, 32, 16), **more):
    named = {1: "liver", 2: "spleen"} if classes is None else classes
    return Plan(
        channels=channels,
        classes=named,
        resize=False,
        spacing_mm=(1, 1, 1),
        crop_size=crop,
        strides=((2, 2, 2),) * 3,
        flip_axes=(),
        **{"merged": False, **more},
    )


def built(config, plan, seed):
    torch.manual_seed(seed)
    network = build_network(config.network, **plan.network_shapes)
    with torch.no_grad():
        # What begins at zero would not tell one run from another.
        for parameter in trainable(network).values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return network


def begun(before=None, now=None, *, old=None, new=None, preset="small"):
    """Weights of an earlier run, those of one that began with them, and what the manifest keeps."""
    old, new = old or plan(), new or plan()
    theirs, ours = load_config("small", TINY | (before or {})), load_config(preset, TINY | (now or {}))
    first, second = built(theirs, old, 1), built(ours, new, 2)
    tensors = {name: parameter.detach().clone() for name, parameter in trainable(first).items()}
    own = {name: parameter.detach().clone() for name, parameter in trainable(second).items()}
    facts = {"frozen_sha256": tensors_sha256(frozen(first))}
    start = Start(
        RunDir(Path("earlier")), theirs, old, tensors, facts, "0" * 64, {"train": {}, "validation": {}}
    )
    told = begin_with(second, start, config=ours, plan=new)
    after = {name: parameter.detach() for name, parameter in trainable(second).items()}
    fresh = {name for name in after if torch.equal(after[name], own[name])}
    assert sum(after[name].numel() for name in after.keys() - fresh) == told["kept_parameters"]
    return tensors, after, fresh, told, started_words(told, second)


def parts(names, depth):
    return {".".join(name.split(".")[:depth]) for name in names}


def test_the_same_network_begins_where_the_other_ended():
    tensors, after, fresh, told, words = begun()
    assert not fresh
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert told["fresh"] == told["unused"] == []
    assert words == "begins with 100% of its 0.05 million weights from earlier"


def test_channels_are_found_by_their_names():
    tensors, after, fresh, *_ = begun(old=plan(("T1", "T2", "FLAIR")), new=plan(("FLAIR", "T1", "T2")))
    assert not fresh
    first = "embed.fine.conv.weight"
    assert torch.equal(after[first], tensors[first][:, [2, 0, 1]])
    tensors, after, fresh, *_ = begun(old=plan(("T1", "T2", "FLAIR")), new=plan(("T2",)))
    assert torch.equal(after[first], tensors[first][:, [1]])
    _, _, fresh, *_ = begun(old=plan(("T1", "T2")), new=plan(("T1", "DWI")))
    assert fresh == {first}
    # One is one, whatever it is called.
    assert not begun(old=plan(("MRI",)), new=plan(("T1",)))[2]


def test_what_saw_features_is_not_what_sees_the_scan():
    """Without work at full resolution the second stage's convolution is the first."""
    thin = {"network.stem_channels": [1, 6, 8], "network.refine": False}
    none = {"network.stem_channels": [0, 6, 8], "network.refine": False}
    _, _, fresh, *_ = begun(thin, none, old=plan(("MRI",)), new=plan(("MRI",)))
    assert "embed.middle.0.conv.weight" in fresh


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ({1: "liver", 2: "spleen"}, {1: "liver", 3: "spleen"}, True),
        ({1: "liver", 2: "spleen"}, {1: "spleen", 2: "liver"}, False),
        ({1: "liver", 2: "spleen"}, {1: "liver"}, False),
        ({1: "class 1"}, {1: "class 1"}, True),
    ],
)
def test_outputs_are_kept_for_the_same_classes_alone(old, new, same):
    _, _, fresh, *_ = begun(old=plan(classes=old), new=plan(classes=new))
    assert parts(fresh, 2) == (
        set() if same else {f"head.{name}" for name in ("out", "out_coarse", "out_half", "out_tokens")}
    )


def test_classes_that_are_numbers_mean_something_else_in_other_data():
    _, _, fresh, *_ = begun(
        now={"data.path": "there"}, old=plan(classes={1: "class 1"}), new=plan(classes={1: "class 1"})
    )
    assert {"head.out.weight", "head.out_coarse.weight"} <= fresh
    merged = plan(classes={1: "liver"}, merged=True)
    assert "head.out_coarse.weight" in begun(old=plan(classes={1: "liver"}), new=merged)[2]


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"network.num_heads": 4}, {"encoder", "decoder"}),
        ({"network.insert_after": 1}, {"encoder", "decoder"}),
        ({"network.positions": "after_insert"}, {"encoder", "decoder"}),
        ({"network.gate": "none"}, {"insert"}),
        # Some of its biases would fit.
        ({"network.insert_mlp_ratio": 2.0}, {"insert"}),
        ({"network.refine": False}, {"head.out"}),
    ],
)
def test_what_would_compute_something_else_begins_anew(changes, anew):
    *_, told, words = begun(now=changes)
    assert set(told["fresh"]) == anew
    assert all(part in words for part in anew)


def test_what_is_left_of_the_earlier_network_is_named():
    *_, told, words = begun(now={"network.insert": "none"})
    assert told["unused"] == ["insert"]
    assert words.endswith("; not used: insert")


def test_positions_are_interpolated():
    tensors, after, fresh, *_ = begun(old=plan(crop=(16, 32, 16)), new=plan(crop=(32, 32, 16)))
    assert not fresh
    name = "encoder.0.table"
    assert after[name].shape[1] == 2 * tensors[name].shape[1]
    # Between two cells lies their mean with weights of a quarter and three; beyond the last there is the last.
    before, now = (which[name].unflatten(1, (-1, 8)) for which in (tensors, after))
    assert torch.allclose(now[:, 0], before[:, 0])
    assert torch.allclose(now[:, 1], 0.75 * before[:, 0] + 0.25 * before[:, 1], atol=1e-6)


def test_a_network_of_other_widths_is_refused_although_biases_fit():
    wider = {"network.stem_channels": [6, 8, 12], "network.context_channels": [8, 10], "network.width": 36}
    with pytest.raises(ConfigError, match=r"no layer of earlier \(preset small\) fits"):
        begun(now=wider)


def run_of(tmp_path, manifest, **settings):
    run = RunDir(tmp_path / "earlier")
    write_json(run.manifest, {"unlabelled": {}} | manifest)
    write_config(load_config("small", {"data.path": "d", **settings}), run.config)
    return run


def check(run, *, test=(), validation=("v",), excluded=(), **settings):
    """Whether a new run with these cases may begin with an earlier one; each is a patient of its own."""
    config = load_config("small", {"data.path": "d", **settings}).data
    names = [*test, *validation, "new"]
    dataset = Dataset(
        "d",
        Path("d"),
        tuple(Case(name, name, (), None) for name in names),
        ("MRI",),
        {1: "one"},
        excluded=tuple(Case(name, name, (), None) for name in excluded),
    )
    splits = Splits(0, tuple(test), (Fold(("new",), tuple(validation)),))
    check_strangers(
        run, seen_by(run), config, dataset, splits, Selection(("new",), tuple(validation), tuple(test))
    )


def test_who_trained_may_not_score_and_who_validated_may_not_test(tmp_path):
    run = run_of(tmp_path, {"cases": {"train": ["a"], "validation": ["b"]}})
    check(run, test=["x"], validation=["b"])
    for bad in ({"validation": ["a"]}, {"test": ["a"]}, {"test": ["b"]}, {"excluded": ["a"]}):
        with pytest.raises(DataError, match="would leak"):
            check(run, **bad)
    # Nobody scores a run on all cases.
    check(run, test=(), validation=(), excluded=["a"])


def test_patients_are_known_under_another_pattern_too(tmp_path):
    run = run_of(
        tmp_path,
        {"cases": {"train": ["1001_10001"], "validation": []}},
        **{"data.patient_pattern": "^(.{4})"},
    )
    # A later visit of whom the earlier run saw is told by its pattern alone.
    for name in ("1001_10001", "1001_10003"):
        with pytest.raises(DataError, match="would leak"):
            check(run, validation=[name])
        with pytest.raises(DataError, match="would leak"):
            check(run, excluded=[name])
    check(run, validation=["1002_10001"])
    run = run_of(tmp_path, {"cases": {"train": ["1001_10001"], "validation": []}})
    with pytest.raises(DataError, match="would leak"):
        check(run, validation=["1001"], **{"data.patient_pattern": "^(.{4})"})


def test_those_before_the_earlier_run_count_too(tmp_path):
    before = {"seen": {"train": {"a1": "a"}, "validation": {"b1": "b"}}}
    run = run_of(tmp_path, {"cases": {"train": ["c"], "validation": []}, "started_from": before})
    known = [Case("a1", "known as a", (), None)]
    assert patients_by_part(run, known) == {"train": {"known as a", "c"}, "validation": {"b"}}
    for name in ("a", "a1"):
        with pytest.raises(DataError, match="would leak"):
            check(run, validation=[name])
    with pytest.raises(DataError, match="would leak"):
        check(run, test=["b"])


def test_scans_without_labels_count_and_a_run_that_does_not_name_them_is_refused(tmp_path):
    seen = {"cases": {"train": [], "validation": []}}
    run = run_of(tmp_path, seen | {"unlabelled": {"u1": "u"}})
    with pytest.raises(DataError, match="would leak"):
        check(run, validation=["u1"])
    write_json(run.manifest, seen)
    with pytest.raises(CheckpointError, match="does not say which cases"):
        check(run)
