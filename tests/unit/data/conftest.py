"""Facts of cases that exist in no file, for the rules of `data/check`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvisionllama.data.check.examine import examine_case
from medvisionllama.data.check.facts import CaseFacts, FileFacts
from medvisionllama.data.check.storage import Storage
from medvisionllama.data.formats.header import Header


@pytest.fixture
def case_facts() -> Callable[..., CaseFacts]:
    """`case_facts(name, image=..., label=..., affine=...)`: arrays `[x, y, z]` or `[channel, x, y, z]` in RAS."""

    def make(
        name: str = "a",
        *,
        image: np.ndarray | None = None,
        label: np.ndarray | None = None,
        affine: np.ndarray | None = None,
        patient: str | None = None,
        storage: Storage | None = None,
        seed: int = 0,
    ) -> CaseFacts:
        if image is None:
            image = np.random.default_rng(seed).normal(100, 10, (6, 7, 8))
        channels = image if image.ndim == 4 else image[None]
        x, y, z = channels.shape[1:]
        header = Header((x, y, z), len(channels), np.eye(4) if affine is None else affine)
        file = FileFacts(Path("imagesTr") / f"{name}.nii.gz", header, storage)
        mask = None
        if label is not None:
            mask = FileFacts(
                Path("labelsTr") / f"{name}.nii.gz", Header((x, y, z), 1, header.affine), storage
            )
        return examine_case(CaseFacts(name, patient or name, (file,), mask), [channels], label)

    return make
