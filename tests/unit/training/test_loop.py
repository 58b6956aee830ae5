"""The training loop's marks: when the validation cases are segmented, and scans without labels."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medvisionllama.config import load_config
from medvisionllama.progress import Silent
from medvisionllama.run_dir import RunDir
from medvisionllama.training import loop as module
from medvisionllama.training.loop import TrainingLoop, num_batch_threads
from medvisionllama.training.processes import Processes
from medvisionllama.training.timetable import Timetable


@pytest.fixture
def loop(monkeypatch):
    """A loop of one minute and four validations, whose clock is `loop.now`."""
    made = object.__new__(TrainingLoop)
    made.config = load_config("small", {"train.max_minutes": 1, "train.num_validations": 4}).train
    made.timetable = Timetable(made.config, total_steps=None)
    made.processes = SimpleNamespace(first=lambda value: value, is_main=False)
    made.average, made.network = None, None
    made.now = made._clock = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def never():
    return False


def validate_in(loop, seconds):
    def validate(network, patience, interrupted):
        loop.now += seconds
        return {"dice": 0.5}

    loop.validate = validate
    assert loop._validate(Silent(), never)


def test_a_quick_validation_after_a_slow_one_is_not_repeated(loop):
    loop.now = 14.0
    loop._tick()
    validate_in(loop, 10.0)
    # Half of the 50 seconds that the slow one left.
    loop.now = 25.1
    loop._tick()
    assert loop.timetable.validation_due()
    validate_in(loop, 0.5)
    loop.now = 30.5
    loop._tick()
    assert not loop.timetable.validation_due()
    loop.now = 37.6
    loop._tick()
    assert loop.timetable.validation_due()


def test_later_weights_are_kept_unless_earlier_ones_are_clearly_ahead(loop, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(
        module, "save_tensors", lambda path, tensors, facts: kept.append(facts["validation_dice"])
    )
    loop.facts, loop.parameters, loop.run_dir = {}, {}, RunDir(tmp_path)
    loop.processes.is_main = True
    for dice in (0.70, 0.78, 0.775, 0.765, 0.772):
        loop.validate = lambda *_, dice=dice: {"dice": dice}
        assert loop._validate(Silent(), never)
        assert loop.state.kept == kept[-1] == loop.run_dir.kept_record()["dice"]
    assert kept == [0.70, 0.78, 0.775, 0.772]


def rounds_at(progress):
    return min(3, int(4 * progress))


class Lines(Silent):
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


def test_a_validation_that_would_eat_the_run_is_made_at_its_end_alone(loop):
    patience, lines = [], Lines()

    def validate(network, seconds, interrupted):
        patience.append(seconds)
        loop.now += 1.0 if seconds else 20.0
        return {"would_take_seconds": 20.0} if seconds else {"dice": 0.5}

    loop.validate = validate
    loop.now = 15.1
    loop._tick()
    assert loop.timetable.validation_due()
    loop._validate(lines, never)
    assert (loop.state.validated_step, loop.state.kept) == (0, None)
    assert "takes about 0.33 of the 1 minutes, so from now on it is done once, at the end" in lines.said[0]
    for loop.now in (16.2, 30.1, 39.9):
        loop._tick()
        assert not loop.timetable.validation_due()
    # Given more time, it may take what it takes, as often as was asked for.
    loop.timetable.config = loop.config.model_copy(update={"max_minutes": 10})
    assert not loop.timetable.validates_late
    loop.timetable.config = loop.config
    loop.now = 40.1
    loop._tick()
    assert loop.timetable.validation_due()
    loop._validate(lines, never)
    assert patience == [pytest.approx(0.25 * 60 / 4), None]
    assert loop.state.kept == 0.5
    assert len(lines.said) == 1


def test_a_validation_longer_than_the_run_leaves_time_to_train(loop):
    lines = Lines()
    loop.validate = lambda *_: {"would_take_seconds": 200.0}
    loop.now = 20.0
    loop._tick()
    loop._validate(lines, never)
    # Half of the 40 seconds that were left.
    assert loop.state.validation_seconds == 20.0
    assert loop.timetable.progress == pytest.approx(0.5)
    assert "once, at the end, 3 minutes longer than that" in lines.said[0]


def test_an_interrupted_validation_leaves_the_run_where_it_was(loop):
    loop.validate = lambda network, patience, interrupted: {"interrupted": interrupted()}
    loop.now = 15.1
    loop._tick()
    assert not loop._validate(Silent(), lambda: True)
    assert loop.timetable.validation_due()
    assert (loop.state.validated_step, loop.state.dices) == (0, [])


def test_preparing_scans_uses_up_marks_that_an_untrained_network_would_have(loop):
    loop.now = 31.0
    loop._tick()
    loop.timetable.begin()
    loop.now = 31.1
    loop._tick()
    assert not loop.timetable.validation_due()
    assert not loop.timetable.masks_due(rounds_at)
    loop.now = 45.1
    loop._tick()
    assert loop.timetable.validation_due()
    assert loop.timetable.masks_due(rounds_at)


@pytest.mark.parametrize("validated", [0, 7])
def test_a_run_that_goes_on_for_less_than_it_had_is_validated_and_ends(loop, validated):
    loop.state.step, loop.state.elapsed_seconds = 10, 50.0
    loop.state.validated_step, loop.state.validated_seconds = validated, 45.0
    loop.timetable.config = loop.config.model_copy(update={"max_minutes": 0.5})
    assert loop.timetable.progress == 1.0
    assert not loop.timetable.is_over
    assert loop.timetable.validation_due()
    loop.now = 50.0
    validate_in(loop, 1.0)
    assert loop.timetable.is_over
    assert not loop.timetable.validation_due()


def test_a_validation_put_off_beyond_the_end_is_made(loop):
    loop.state.step, loop.state.validated_step, loop.state.validated_seconds = 10, 5, 30.0
    loop.now = 61.0
    loop._tick()
    loop.timetable.put_off_validation(20.0)
    assert loop.timetable.validation_due()
    assert not loop.timetable.is_over


def test_the_learning_rate_begins_when_the_scans_are_prepared(loop):
    loop.now = 30.0
    loop._tick()
    loop.timetable.begin()
    assert loop.timetable.progress == 0.5
    assert loop.timetable.training_progress == 0.0
    loop.now = 45.0
    loop._tick()
    assert loop.timetable.training_progress == 0.5
    loop.now = 60.0
    loop._tick()
    assert loop.timetable.training_progress == 1.0
    # Of a limit that is over before it begins nothing is left.
    loop.timetable.config = loop.config.model_copy(update={"max_minutes": 0.4})
    assert loop.timetable.training_progress == 1.0


def test_a_run_that_goes_on_longer_gets_new_masks(loop):
    loop.state.pseudo_round, loop.state.pseudo_seconds = 3, 45.0
    loop.state.elapsed_seconds = 59.0
    assert not loop.timetable.masks_due(rounds_at)
    loop.timetable.config = loop.config.model_copy(update={"max_minutes": 4})
    loop.state.elapsed_seconds = 119.0
    assert loop.timetable.masks_due(rounds_at)
    loop.state.pseudo_seconds = 119.0
    assert not loop.timetable.masks_due(rounds_at)
    loop.state.elapsed_seconds = 121.0
    assert loop.timetable.masks_due(rounds_at)


def test_a_validation_that_was_noted_and_not_saved_is_made_again_and_noted_once(loop, tmp_path):
    loop.run_dir = RunDir(tmp_path)
    loop.processes = SimpleNamespace(first=lambda value: value, any=bool, is_main=True)
    loop.state.step, loop.state.validated_step = 30, 20
    for step in (20, 30):
        loop.run_dir.append_history({"step": step})
    loop.resume()
    assert loop.run_dir.read_history() == [{"step": 20}]


def test_a_single_case_that_takes_too_long_counts_once_and_then_at_the_end(loop):
    lines, asked = Lines(), []

    def validate(network, patience, interrupted):
        asked.append(loop.now)
        loop.now += 10.0
        return {"dice": 0.5, **({"would_take_seconds": 10.0} if patience else {})}

    loop.validate = validate
    while not loop.timetable.is_over and loop.now < 100:
        loop.now += 1.0
        loop.state.step += 1
        loop._tick()
        if loop.timetable.validation_due():
            assert loop._validate(lines, never)
    assert asked == [15, 50]
    assert loop.state.dices == [0.5, 0.5]
    assert len(lines.said) == 1
    assert "from now on it is done once, at the end" in lines.said[0]


class Reads(TorchDispatchMode):
    """Counts how often Python asks for a tensor's value, for which it waits."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Distance(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(3))

    def forward(self, images, labels):
        return ((images - self.place) ** 2).mean() + labels.float().mean() / 3


def test_a_step_asks_for_its_loss_when_all_its_batches_are_done(loop):
    batches = [(torch.rand(2, 3), torch.ones(2)) for _ in range(3)]
    loop.config = load_config("small", {"train.accumulate": 3}).train
    loop.accelerator, loop.model = Accelerator(cpu=True), Distance()
    loop.processes, loop.batches = Processes(loop.accelerator), batches
    loop.sampler, loop.parameters = SimpleNamespace(rank=0), dict(loop.model.named_parameters())
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    loop.optimizer.param_groups[0]["scale"] = 1.0
    expected = sum(float(loop.model(*batch).detach() / 3) for batch in batches)
    with Reads() as reads:
        loss = loop._step()
    assert loss == expected
    assert reads.number == 0, "the one reading of several values at once is no such question"


@pytest.mark.parametrize(
    ("cores", "members", "processes", "threads"),
    [(2, 1, 1, 4), (12, 1, 1, 12), (12, 2, 1, 6), (64, 1, 1, 16), (64, 1, 8, 8), (64, 1, 16, 4)],
)
def test_beside_a_gpu_a_run_makes_batches_on_its_share_of_the_cores(
    cores, members, processes, threads, monkeypatch
):
    # As torchrun sets them.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores if processes == 1 else 1)
    monkeypatch.setattr(module, "available_cores", lambda: list(range(cores)))
    config = load_config("small", {"train.members": members}).train
    assert num_batch_threads(config, torch.device("cuda")) == threads
    assert num_batch_threads(config, torch.device("cpu")) == 0
    config = config.model_copy(update={"batch_threads": 3})
    assert num_batch_threads(config, torch.device("cuda")) == 3
