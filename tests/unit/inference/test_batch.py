"""Many scans in turn: what is held in memory between them."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from medvisionllama.inference import batch
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.inference.inputs import Scan
from medvisionllama.inference.ledger import MadeBy
from medvisionllama.inference.outputs import Outputs
from medvisionllama.progress import Silent


class Held:
    """Stands for a scan in memory or for its prediction."""


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run four scans of a size through a predictor of two functions; nothing is written."""

    def run(voxels, *, prepare, segment):
        predictor = SimpleNamespace(
            plan=SimpleNamespace(mask_classes={1: "a"}), prepare=prepare, segment=segment
        )
        monkeypatch.setattr(batch, "_finish", lambda *_, **__: {})
        monkeypatch.setattr(batch, "scan_sha256", lambda files: "")
        batch.predict_scans(
            predictor,
            [Scan(f"c{number}", (Path(f"{number}.nii"),), voxels) for number in range(4)],
            Outputs(Path("nowhere"), MadeBy(weights_sha256=("0",), views=(), cleaning=Cleaning())),
            keep_going=False,
            progress=Silent(),
        )

    return run


def test_a_scan_and_its_prediction_are_gone_before_a_huge_one_is_read(predict):
    made: list[weakref.ref[Held]] = []
    alive = []

    def make(*_, **__):
        held = Held()
        made.append(weakref.ref(held))
        return held

    def prepare(images):
        alive.append(sum(one() is not None for one in made))
        return make()

    predict(batch._MOST_VOXELS_AHEAD + 1, prepare=prepare, segment=make)
    assert alive == [0, 0, 0, 0]


def test_the_next_scan_alone_is_read_while_the_networks_work_on_this_one(predict):
    begun = [threading.Event() for _ in range(4)]
    ahead = []

    def prepare(images):
        number = int(images[0].stem)
        begun[number].set()
        return number

    def segment(number, **_):
        following = begun[number + 1 :]
        ahead.append(
            [*(event.wait(2) for event in following[:1]), *(event.is_set() for event in following[1:])]
        )

    predict(batch._MOST_VOXELS_AHEAD, prepare=prepare, segment=segment)
    assert ahead == [[True, False, False], [True, False], [True], []]
