"""Fixtures for every test: scans and datasets made on the spot, the real scans, and a cache of our own."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medvisionllama._files import user_cache

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Preprocessed scans go to a folder of this session; fetched blocks stay in the user's cache.

    Blocks are hundreds of megabytes to fetch and never change, so they come once per machine.
    """
    blocks = user_cache() / "blocks"
    blocks.mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("cache")
    (folder / "blocks").symlink_to(blocks, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVISIONLLAMA_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread: on tiny tensors, threads wait for each other far longer than they compute."""
    import torch

    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def unlistable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`unlistable(name)`: no folder of that name may be listed; by hand, as root may list everything."""

    def refuse(name: str) -> None:
        scandir = os.scandir

        def refusing(path: str) -> Any:
            if Path(path).name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)

    return refuse


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real scans."""
    folder = Path(os.environ.get("MEDVISIONLLAMA_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real scans: {folder} does not exist; set MEDVISIONLLAMA_DATA to their folder")
    return folder


def _write_nifti(
    path: Path, array: np.ndarray, affine: np.ndarray | None = None, dtype: type | str | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.asarray(array, dtype=dtype)
    nib.save(nib.Nifti1Image(stored, np.eye(4) if affine is None else affine, dtype=stored.dtype), path)
    return path


@pytest.fixture
def write_nifti() -> Callable[..., Path]:
    """`write_nifti(path, array, affine=None, dtype=None)`: write a scan, 1 mm voxels in RAS by default."""
    return _write_nifti


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a small MSD folder: two touching boxes, brighter than the noise around them, in each scan."""

    def write(
        name: str = "phantom",
        *,
        num_cases: int = 6,
        frames: int = 1,
        channels: Sequence[str] = ("MRI",),
        values: tuple[int, int] = (1, 2),
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
        seed: int = 0,
    ) -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(seed)
        affine = np.diag([*spacing_mm, 1.0])
        entries = []
        for number in range(num_cases):
            for frame in range(1, frames + 1):
                case = f"case_{number:03d}" + (f"_frame{frame:02d}" if frames > 1 else "")
                image, label = _phantom(rng, len(channels), values)
                image_path, label_path = f"./imagesTr/{case}.nii.gz", f"./labelsTr/{case}.nii.gz"
                _write_nifti(root / image_path, image, affine, np.float32)
                _write_nifti(root / label_path, label, affine, np.uint8)
                entries.append({"image": image_path, "label": label_path})
        content = {
            "name": name,
            "modality": {str(number): channel for number, channel in enumerate(channels)},
            "labels": {"0": "background", str(values[0]): "Anterior", str(values[1]): "Posterior"},
            "numTraining": len(entries),
            "training": entries,
        }
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    return write


def _phantom(
    rng: np.random.Generator, num_channels: int, values: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Image `[x, y, z]`, or `[x, y, z, channel]` for several channels, and label."""
    shape = (20 + int(rng.integers(-1, 2)), 24 + int(rng.integers(-1, 2)), 18)
    x, y, z = (int(value) for value in rng.integers(5, 7, 3))
    label = np.zeros(shape, dtype=np.uint8)
    label[x : x + 8, y + 6 : y + 12, z : z + 7] = values[0]
    label[x : x + 8, y : y + 6, z : z + 7] = values[1]
    image = rng.normal(100, 10, (*shape, num_channels))
    image += 60.0 * (label == values[0])[..., None] + 120.0 * (label == values[1])[..., None]
    return (image[..., 0] if num_channels == 1 else image), label
