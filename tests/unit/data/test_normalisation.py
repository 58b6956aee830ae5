import tracemalloc

import numpy as np
import pytest

from medvisionllama.config import DataConfig
from medvisionllama.data.cache import build_cache
from medvisionllama.data.fingerprint import fingerprint
from medvisionllama.data.index import open_dataset
from medvisionllama.data.normalisation import fit_normalisation, image_moments, normalise
from medvisionllama.data.planning import Normalisation, make_plan


def test_moments_leave_out_zero_voxels_by_channel():
    image = np.zeros((3, 2, 2, 2), dtype=np.float32)
    image[0, 0] = 4.0
    image[1, 0, 0], image[1, 0, 1] = 1.0, 3.0
    assert image_moments(image) == [(4.0, 1.0), (2.0, 1.0), (0.0, 1.0)]


def test_moments_are_those_of_all_voxels_at_once_without_their_memory():
    image = np.random.default_rng(0).normal(500, 40, (1, 96, 96, 96)).astype(np.float32)
    image[:, ::3] = 0
    voxels = image[image != 0].astype(np.float64)
    tracemalloc.start()
    [found] = image_moments(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == pytest.approx((voxels.mean(), voxels.std()), rel=1e-12)
    assert peak < image.nbytes / 4


def test_an_mr_scan_is_brought_to_mean_zero_and_deviation_one():
    image = np.random.default_rng(0).normal(500, 40, (2, 8, 8, 8)).astype(np.float32)
    result = normalise(image, [Normalisation(kind="image")] * 2, image_moments(image))
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(1, 2, 3)), 1, atol=1e-5)


def test_a_ct_scan_is_clipped_and_scaled_by_fixed_numbers():
    image = np.array([-1000.0, 0.0, 50.0, 3000.0], dtype=np.float32).reshape(1, 4, 1, 1)
    rule = Normalisation(kind="dataset", low=-100.0, high=200.0, mean=50.0, std=25.0)
    assert normalise(image, [rule], [(0.0, 1.0)]).ravel().tolist() == [-6.0, -2.0, 0.0, 6.0]


def test_ct_numbers_come_from_the_foreground_of_the_training_cases(dataset_folder, tmp_path):
    dataset = open_dataset(dataset_folder(num_cases=3, channels=("MRI", "CT")))
    plan = make_plan(dataset, fingerprint(dataset), DataConfig(), flip=False, patch_size=None)
    entries = build_cache(dataset.cases, plan, folder=tmp_path)[:2]
    mr, ct = fit_normalisation(entries, plan.channel_rules)
    voxels = np.concatenate([entry.image[1][entry.label > 0] for entry in entries]).astype(np.float64)
    low, high = np.percentile(voxels, [0.5, 99.5])
    assert mr.kind == "image"
    assert (ct.low, ct.high) == pytest.approx((low, high))
    assert (ct.mean, ct.std) == pytest.approx((voxels.clip(low, high).mean(), voxels.clip(low, high).std()))
