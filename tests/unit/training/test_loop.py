"""The training loop's marks: when the validation cases are segmented."""

from types import SimpleNamespace

import pytest

from medvisionllama.config import load_config
from medvisionllama.training import loop as module
from medvisionllama.training.loop import LoopState, TrainingLoop


@pytest.fixture
def loop(monkeypatch):
    """A loop of one minute and four validations, whose clock is `loop.now`."""
    made = object.__new__(TrainingLoop)
    made.config = load_config("small", {"train.max_minutes": 1, "train.num_validations": 4}).train
    made.sampler = SimpleNamespace(steps_per_epoch=1)
    made.processes = SimpleNamespace(first=lambda value: value, is_main=False)
    made.state, made.average, made.network = LoopState(), None, None
    made.now = made._clock = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def validate_in(loop, seconds):
    def validate(network):
        loop.now += seconds
        return {"dice": 0.5}

    loop.validate = validate
    loop._validate()


def test_a_quick_validation_after_a_slow_one_is_not_repeated(loop):
    loop.now = 14.0
    loop._tick()
    validate_in(loop, 10.0)
    # Half of the 50 seconds that the slow one left.
    loop.now = 25.1
    loop._tick()
    assert loop._validation_due()
    validate_in(loop, 0.5)
    loop.now = 30.5
    loop._tick()
    assert not loop._validation_due()
    loop.now = 37.6
    loop._tick()
    assert loop._validation_due()
