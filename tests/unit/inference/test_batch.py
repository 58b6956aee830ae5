"""Many scans in turn: what is held in memory between them."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from medvisionllama.config import InferenceConfig
from medvisionllama.inference import batch
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.inference.inputs import Scan
from medvisionllama.inference.ledger import MadeBy
from medvisionllama.progress import Silent


class Held:
    """Stands for a scan in memory or for its prediction."""


@pytest.mark.parametrize("voxels", [60_000_000, 1_000])
def test_a_scan_and_its_prediction_are_gone_before_a_huge_one_is_read(monkeypatch, voxels):
    made: list[weakref.ref[Held]] = []
    alive = []

    def make(*_, **__):
        held = Held()
        made.append(weakref.ref(held))
        return held

    def prepare(images):
        alive.append(sum(one() is not None for one in made))
        return make()

    predictor = SimpleNamespace(plan=SimpleNamespace(mask_classes={1: "a"}), prepare=prepare, segment=make)
    monkeypatch.setattr(batch, "_finish", lambda *_: {})
    batch.predict_scans(
        predictor,
        [Scan(f"c{number}", (Path(f"c{number}.nii"),), voxels) for number in range(4)],
        batch.Outputs(Path("nowhere"), MadeBy(weights_sha256=("0",), views=(), cleaning=Cleaning())),
        cleaning=InferenceConfig(),
        overwrite=False,
        keep_going=False,
        progress=Silent(),
    )
    if voxels > batch._MOST_VOXELS_AHEAD:
        assert alive == [0, 0, 0, 0]
    else:
        assert len(alive) == 4
