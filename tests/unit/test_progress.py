"""Progress as lines of a log file."""

from types import SimpleNamespace

import pytest

from medvisionllama import progress as module
from medvisionllama.progress import Lines


@pytest.fixture
def clock(monkeypatch):
    """`clock.now`, in seconds."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_what_a_run_had_done_before_it_went_on_took_no_time(clock):
    said = []
    with Lines(said.append).track("training", 1.0) as advance:
        # Preparing the scans took a minute, and before that the run had come half of the way.
        clock.now += 60
        advance(0.5)
        clock.now += 30
        advance(0.55)
    assert said[0].strip() == "training: 50%"
    assert said[1].strip() == "training: 55%, about 4.5 min left"
