"""The benchmarks of reading and writing run, and tell the time of each part."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from medvisionllama import api
from medvisionllama.data.phantom import write_phantoms
from medvisionllama.inference import batch
from medvisionllama.inference.predictor import Member, Predictor


@pytest.fixture
def phantoms(tmp_path):
    return write_phantoms(tmp_path / "phantoms", num_cases=6, shape=(20, 24, 16))


def test_the_script_that_times_our_preprocessing_runs(module, phantoms, tmp_path):
    benchmark = module("io_preprocess")
    cache = tmp_path / "cache"
    spent = benchmark.fresh(
        Path(sys.executable),
        benchmark.OURS,
        [phantoms, cache, benchmark.WORKERS],
        tmp_path,
        benchmark.our_environment(),
    )
    assert spent.keys() == {"plan_s", "seconds"}
    assert min(spent.values()) > 0
    assert benchmark.folder_mb(cache) > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fast", [False, True])
def test_each_part_of_a_prediction_takes_time(module, phantoms, slim, tmp_path, monkeypatch, fast):
    run = api.train(phantoms, out=tmp_path / "run", epochs=1, overrides=slim, test=False).path
    benchmark = module("io_predict")
    # Functions that the benchmark replaces are put back after the test.
    for owner, name in ((Predictor, "prepare"), (Member, "planes"), (batch, "write_mask")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    # It tells tenths of a second of a scan that takes minutes, so clocks run a thousand times as fast here.
    quick = SimpleNamespace(
        perf_counter=lambda: 1000 * time.perf_counter(), monotonic=lambda: 1000 * time.monotonic()
    )
    monkeypatch.setattr(benchmark, "time", quick)
    monkeypatch.setattr(batch, "time", quick)
    scan = phantoms / "imagesTr" / "phantom_000.nii.gz"
    facts = benchmark.timed_prediction(run, scan, tmp_path / "masks", fast=fast)
    assert facts["seconds"].keys() == {
        "read_and_resample",
        "network",
        "write",
        "loading_the_run",
        "export",
        "total",
    }
    assert min(facts["seconds"].values()) > 0
    assert facts["mask_shape"] == [20, 24, 16]
