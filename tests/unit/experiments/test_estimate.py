"""What a matrix costs, by hand-computed numbers and a made-up timing."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from medvisionllama.data.phantom import write_phantoms
from medvisionllama.experiments import estimate as estimating
from medvisionllama.experiments.estimate import START_SECONDS, estimate
from medvisionllama.experiments.matrix import expand, read_matrix
from medvisionllama.experiments.probe import Timing, time_steps
from medvisionllama.experiments.store import Experiment
from medvisionllama.networks.factory import network_sizes
from medvisionllama.progress import Silent

PAPER = Path(__file__).parents[3] / "configs" / "matrix" / "paper.yaml"
SMALL = {
    "network.width": 24,
    "network.depth": 2,
    "network.insert_after": 1,
    "network.stem_channels": [4, 6, 8],
}


@pytest.fixture
def made(tmp_path, write_matrix):
    write_phantoms(tmp_path / "Task_A", num_cases=20, shape=(16, 16, 16))
    path = write_matrix(
        set={
            **SMALL,
            "train.epochs": 3,
            "train.batch_size": 2,
            "train.num_validations": 2,
            "data.crop_size": [16, 16, 16],
        },
        arms={
            "none": {"set": {"network.insert": "none"}},
            "block": {"set": {"network.block.weights": "random"}, "also": ["block_removed"]},
            "mlp": {"match": {"arm": "block", "by": "trainable"}},
        },
        fractions=[0.5, 1.0],
    )
    return Experiment.create(tmp_path / "out", path, data_root=tmp_path)


def table(experiment, *, timed):
    runs = expand(experiment.matrix)
    return {row.arm: row for row in estimate(experiment, runs, timed=timed, progress=Silent()).rows}


def test_hours_follow_from_steps_and_timings(made, monkeypatch):
    monkeypatch.setattr(estimating, "time_steps", lambda config, shapes: Timing(step=10.0, forward=1.0))
    # 20 patients: 2 test, 18 over five folds, so 4 validate in the first one and 14 train; half of these are 7.
    # Three passes over 14 and 7 cases in batches of 2; 2 validations of 4 cases; 2 test cases seen and mirrored.
    whole, half = 21 * 10, 10 * 10
    rows = table(made, timed=True)
    evaluation = 2 * 4 * 1 + 2 * 2 * 1
    assert rows["none"].hours == pytest.approx((whole + half + 2 * (evaluation + START_SECONDS)) / 3600)
    # The block's removal is a second evaluation of the test cases.
    assert rows["block"].hours - rows["none"].hours == pytest.approx(2 * 4 / 3600)


def test_two_networks_take_twice_the_time_and_the_disk(made, write_matrix, monkeypatch):
    monkeypatch.setattr(estimating, "time_steps", lambda config, shapes: Timing(step=10.0, forward=1.0))
    one = table(made, timed=True)["none"]
    settings = made.matrix.set | {"train.members": 2}
    path = write_matrix(
        set=settings, arms={"none": {"set": {"network.insert": "none"}}}, fractions=[0.5, 1.0]
    )
    two = table(Experiment.create(made.path, path, data_root=None), timed=True)["none"]
    start = 2 * START_SECONDS / 3600
    assert two.hours - start == pytest.approx(2 * (one.hours - start))
    assert two.trainable == one.trainable
    assert two.gigabytes - one.gigabytes == pytest.approx(2 * 4 * one.trainable / 1e9)


def test_sizes_are_those_of_the_networks_and_a_matched_arm_says_how_near_it_comes(made):
    rows = table(made, timed=False)
    run = next(run for run in expand(made.matrix) if run.arm == "block")
    shapes = {"num_channels": 1, "num_outputs": 3, "crop_size": (16, 16, 16), "strides": ((2, 2, 2),) * 3}
    sizes = network_sizes(run.config(data=Path()).network, **shapes)
    assert (rows["block"].trainable, rows["block"].frozen) == (sizes.trainable, sizes.frozen)
    assert rows["mlp"].trainable == pytest.approx(sizes.trainable, rel=0.01)
    assert rows["mlp"].matched.startswith("trainable of block: ")
    assert rows["mlp"].frozen == 0
    assert rows["none"].hours is None


def test_a_dataset_that_is_elsewhere_is_a_line_and_no_failure(made, tmp_path):
    elsewhere = Experiment(made.path, made.matrix, tmp_path / "nowhere")
    found = estimate(elsewhere, expand(made.matrix), timed=False, progress=Silent())
    assert len(found.problems) == 1
    assert "nowhere" in found.problems[0]
    assert "--data ROOT" in found.problems[0]
    assert found.num_runs == found.num_unknown == 6
    assert found.hours is None


def test_scans_in_the_cache_are_counted_once_for_all_arms(made):
    runs = expand(made.matrix)
    few = [run for run in runs if run.fraction == 0.5]
    # Of 20 patients 4 validate, and 14 train or half of them; a voxel is four bytes of image and one of label.
    for chosen, cases in ((runs, 18), (few, 11)):
        found = estimate(made, chosen, timed=False, progress=Silent())
        assert found.prepared_gigabytes == pytest.approx(cases * 5 * 16**3 / 1e9)


def test_so_many_cases_train_and_are_counted_and_more_than_there_are_is_said(made, write_matrix, monkeypatch):
    monkeypatch.setattr(estimating, "time_steps", lambda config, shapes: Timing(step=10.0, forward=1.0))
    tasks = {
        name: {"data": "Task_A", "set": {"data.num_cases": cases}}
        for name, cases in (("few", 4), ("all", 99))
    }
    arms = {"none": {"set": {"network.insert": "none"}}}
    path = write_matrix(tasks=tasks, arms=arms, set=made.matrix.set)
    experiment = Experiment.create(made.path, path, data_root=None)
    found = estimate(experiment, expand(experiment.matrix), timed=True, progress=Silent())
    # Three passes over 4 cases in batches of 2; 2 validations of 4 cases; 2 test cases seen and mirrored.
    few, _ = found.rows
    assert few.hours == pytest.approx((6 * 10 + 2 * 4 + 2 * 2 + START_SECONDS) / 3600)
    assert found.prepared_gigabytes == pytest.approx((4 + 4) * 5 * 16**3 / 1e9)
    assert "14 training cases" in found.problems[0]


def test_a_resampled_scan_has_its_own_label_in_the_cache_too():
    plan = SimpleNamespace(resize=False, spacing_mm=(2.0, 2.0, 2.0), channels=("T1", "T2"))
    size = estimating._prepared_bytes((16, 16, 16), (1.0, 1.0, 1.0), plan)
    assert size == (2 * 4 + 1) * 8**3 + 16**3


def test_the_published_study_can_be_planned_without_its_scans(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    experiment = Experiment(tmp_path, read_matrix(PAPER), tmp_path)
    runs = [run for run in expand(experiment.matrix) if run.task in {"heart", "brain-tumour"}]
    rows = estimate(experiment, runs, timed=False, progress=Silent()).rows
    sizes = {(row.task, row.arm): row for row in rows}
    assert all(not row.problem for row in rows)
    # Llama 3.1 8B's layer and last norm.
    assert sizes["heart", "medvisionllama-4"].frozen == 218_112_000 + 4096
    # Four channels of 8 x 8 x 8 patches instead of one, into 64 channels.
    more = sizes["brain-tumour", "vit-baseline"].trainable - sizes["heart", "vit-baseline"].trainable
    assert more == 3 * 512 * 64


def test_the_probe_trains_the_network_it_is_asked_about(made):
    run = next(run for run in expand(made.matrix) if run.arm == "block")
    shapes = {"num_channels": 1, "num_outputs": 3, "crop_size": (16, 16, 16), "strides": ((2, 2, 2),) * 3}
    timing = time_steps(run.config(data=Path()), shapes)
    assert timing.step > timing.forward > 0


def test_an_estimate_can_be_written_as_json(made):
    found = estimate(made, expand(made.matrix), timed=False, progress=Silent())
    assert json.dumps([vars(row) for row in found.rows])


def test_an_arm_that_does_not_fit_the_memory_leaves_the_others_their_rows(made, monkeypatch):
    def time_or_fail(config, shapes):
        if config.network.insert == "mlp":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return Timing(step=10.0, forward=1.0)

    monkeypatch.setattr(estimating, "time_steps", time_or_fail)
    rows = table(made, timed=True)
    assert rows["mlp"].problem == "small, mlp: a step does not fit the memory of this machine"
    assert rows["block"].hours > rows["none"].hours > 0
