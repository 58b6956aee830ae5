from functools import partial
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from medvisionllama.config import DataConfig, load_config
from medvisionllama.data.cache import build_cache
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import open_dataset
from medvisionllama.data.normalisation import fit_normalisation
from medvisionllama.data.planning import make_plan
from medvisionllama.inference.slabs import likeliest
from medvisionllama.run_dir import RunDir
from medvisionllama.training import validation
from medvisionllama.training.checks import say_never_found
from medvisionllama.training.validation import validate_cases


class Everywhere(torch.nn.Module):
    """Takes all voxels for one class."""

    gate_rms = None

    def __init__(self, number, num_outputs):
        super().__init__()
        self.number, self.num_outputs = number, num_outputs

    def forward(self, image):
        logits = torch.zeros(len(image), self.num_outputs, *image.shape[2:])
        logits[:, self.number] = 1
        return logits


class Counting(Everywhere):
    """Notes each window that it sees."""

    def __init__(self, number, num_outputs):
        super().__init__(number, num_outputs)
        self.seen = []

    def forward(self, image):
        self.seen.append(1)
        return super().forward(image)


@pytest.fixture
def cases(dataset_folder, write_nifti, tmp_path):
    """Three phantoms of two classes, the last of the first class alone, and a plan that knows a third class."""
    root = dataset_folder(num_cases=3)
    last = root / "labelsTr" / "case_002.nii.gz"
    label = np.asarray(nib.load(last).dataobj)
    write_nifti(last, np.where(label == 1, 1, 0), dtype=np.uint8)
    dataset = open_dataset(root)
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=False, patch_size=None)
    found = build_cache(dataset.cases, plan, folder=tmp_path / "cache")
    plan = plan.with_normalisation(fit_normalisation(found, plan.channel_rules), len(found))
    classes = {**plan.classes, 7: "Rare"}
    return found, plan.model_copy(update={"crop_size": (32, 32, 32), "classes": classes})


def validated(cases, number):
    found, plan = cases
    return validate_cases(Everywhere(number, 4), found, plan, load_config("small"), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("number", "lost"), [(1, ["Posterior"]), (2, ["Anterior"]), (0, ["Anterior", "Posterior"])]
)
def test_a_class_that_no_case_s_mask_has_is_named(cases, number, lost):
    record = validated(cases, number)
    assert record["never_found"] == lost
    # Of a class that no label has, nothing was to be found.
    assert record["dice_per_class"]["Rare"] == 1
    assert validated(cases, 3)["dice_per_class"]["Rare"] == 1


def test_a_case_without_a_class_counts_only_where_the_mask_has_it(cases):
    never, always = (validated(cases, number)["dice_per_class"] for number in (1, 2))
    # Two of three cases have Posterior: 0, not a third for the case that lacks it.
    assert never["Posterior"] == 0
    assert 0 < never["Anterior"] < 1
    # Everywhere it is, the case that lacks it counts with 0.
    with_it = [case for case in cases[0] if (np.asarray(case.native_label) == 2).any()]
    among_them = validated((with_it, cases[1]), 2)["dice_per_class"]["Posterior"]
    assert len(with_it) == 2
    assert always["Posterior"] == pytest.approx(among_them * 2 / 3)


def test_the_network_works_in_the_runs_precision_and_nothing_else_does(cases, monkeypatch):
    found, plan = cases
    inside, outside = [], []

    class Noting(Everywhere):
        def forward(self, image):
            inside.append(torch.is_autocast_enabled("cpu"))
            return super().forward(image)

    def noting(slab):
        outside.append(torch.is_autocast_enabled("cpu"))
        return likeliest(slab)

    monkeypatch.setattr("medvisionllama.inference.slabs.likeliest", noting)
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "autocast", partial(torch.autocast, "cpu", torch.bfloat16))
    validate_cases(Noting(1, 4), found, plan, load_config("small"), accelerator)
    assert set(inside) == {True}
    assert set(outside) == {False}


def test_it_is_given_up_where_it_would_take_too_long(cases, monkeypatch):
    found, plan = cases
    network = Counting(1, 4)
    seen = network.seen

    def record(patience):
        seen.clear()
        return validate_cases(
            network, found, plan, load_config("small"), Accelerator(cpu=True), patience_seconds=patience
        )

    assert record(1e-9)["would_take_seconds"] > 1e-9
    given_up = len(seen)
    assert record(1000.0) == record(None) != {}
    assert len(seen) > given_up


def test_ctrl_c_ends_it_between_two_cases(cases):
    found, plan = cases
    network, config = Counting(1, 4), load_config("small")
    seen = network.seen

    def record(found, interrupted):
        seen.clear()
        return validate_cases(network, found, plan, config, Accelerator(cpu=True), interrupted=interrupted)

    many = [found[0]] * 6
    assert "dice" in record(many, lambda: False)
    whole = len(seen)
    assert record(many, lambda: len(seen) >= whole / 2) == {"interrupted": True}
    assert len(seen) == whole / 2
    # What is finished is not thrown away.
    assert "dice" in record(many, lambda: len(seen) >= whole)
    assert record(many[:2], lambda: True) == {"interrupted": True}
    assert len(seen) == whole / 6
    assert "dice" in record(many[:1], lambda: True)


def test_how_long_it_takes_goes_by_voxels_and_not_by_the_second_case(cases, monkeypatch):
    found, plan = cases
    seconds = iter(range(100))
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    # Each takes a second; the second one has a fifth of the voxels of all.
    shapes = [(1, 10, 10, 1), (1, 10, 10, 1), (1, 10, 10, 3)]
    sized = [Sized(case, shape) for case, shape in zip(found, shapes, strict=True)]
    monkeypatch.setattr(validation, "case_mask", lambda network, case, plan, shape, **_: np.zeros(shape))
    network, config = Everywhere(1, 4), load_config("small")
    record = validate_cases(network, sized, plan, config, Accelerator(cpu=True), patience_seconds=4)
    assert record == {"would_take_seconds": 5.0}


@pytest.mark.parametrize(("number", "given_up_after"), [(2, 1), (3, 2)])
def test_two_cases_are_judged_by_the_first(cases, monkeypatch, number, given_up_after):
    found, plan = cases
    seconds, scored = iter(range(100)), []
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    def mask(network, case, plan, shape, **_):
        scored.append(case)
        return np.zeros(shape)

    monkeypatch.setattr(validation, "case_mask", mask)
    config = load_config("small")
    network, accelerator = Everywhere(1, 4), Accelerator(cpu=True)
    record = validate_cases(
        network, [found[0]] * number, plan, config, accelerator, patience_seconds=number - 0.5
    )
    assert record == {"would_take_seconds": number}
    assert len(scored) == given_up_after


def test_a_first_case_longer_than_all_may_take_is_the_last(cases, monkeypatch):
    found, plan = cases
    seconds = iter(range(100))
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(validation, "case_mask", lambda network, case, plan, shape, **_: np.zeros(shape))
    network, config = Everywhere(1, 4), load_config("small")
    many = [found[0]] * 4
    record = validate_cases(network, many, plan, config, Accelerator(cpu=True), patience_seconds=0.5)
    assert record == {"would_take_seconds": 4}
    assert next(seconds) == 2


@pytest.mark.parametrize(("patience", "too_long"), [(0.5, {"would_take_seconds": 1}), (1.5, {}), (None, {})])
def test_a_single_case_that_takes_too_long_counts_and_says_so(cases, monkeypatch, patience, too_long):
    found, plan = cases
    seconds = iter(range(100))
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(validation, "case_mask", lambda network, case, plan, shape, **_: np.zeros(shape))
    network, config = Everywhere(1, 4), load_config("small")
    record = validate_cases(
        network, found[:1], plan, config, Accelerator(cpu=True), patience_seconds=patience
    )
    assert {key: record[key] for key in ("would_take_seconds",) if key in record} == too_long
    assert "dice" in record


def test_processes_of_a_case_each_say_that_it_takes_too_long(cases, monkeypatch):
    class FirstOfTwo:
        num, index = 2, 0

        def __init__(self, accelerator):
            pass

        def first(self, value):
            return value

        def any(self, value):
            return value

        def sum(self, table):
            return table

    found, plan = cases
    seconds = iter(range(100))
    monkeypatch.setattr(validation, "Processes", FirstOfTwo)
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(validation, "case_mask", lambda network, case, plan, shape, **_: np.zeros(shape))
    network, config = Everywhere(1, 4), load_config("small")
    record = validate_cases(
        network, [found[0]] * 2, plan, config, Accelerator(cpu=True), patience_seconds=0.5
    )
    assert record["would_take_seconds"] == 1
    assert "dice" in record


class Sized:
    """A case whose image says that it has another size."""

    def __init__(self, case, shape):
        self.native_label = case.native_label
        self.image = SimpleNamespace(shape=shape)


def test_nothing_is_said_where_every_class_is_found_somewhere(cases):
    class Halves(Everywhere):
        def forward(self, image):
            logits = super().forward(image)
            logits[:, 2, :, : image.shape[3] // 2] = 2
            return logits

    found, plan = cases
    record = validate_cases(Halves(1, 4), found, plan, load_config("small"), Accelerator(cpu=True))
    assert "never_found" not in record


class Lines(list):
    def say(self, line):
        self.append(line)


def test_the_user_is_told_of_the_weights_that_are_kept(tmp_path):
    run, lines = RunDir(tmp_path), Lines()
    run.append_history({"step": 1, "dice": 0.5})
    run.append_history({"step": 2, "dice": 0.6, "never_found": ["a", "b"]})
    run.append_history({"step": 3, "dice": 0.58})
    say_never_found(run, 5, lines)
    assert len(lines) == 1
    assert f"in {tmp_path}, 'a' and 'b' was found in none of the 5 validation cases" in lines[0]
    run.append_history({"step": 4, "dice": 0.7})
    run.append_history({"step": 5, "dice": 0.6, "never_found": ["a"]})
    say_never_found(run, 5, lines)
    assert len(lines) == 1


def test_without_validation_cases_there_is_nothing_to_tell(tmp_path):
    run, lines = RunDir(tmp_path), Lines()
    run.append_history({"step": 1, "dice": None})
    say_never_found(run, 0, lines)
    assert lines == []
