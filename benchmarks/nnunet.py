"""nnU-Net beside us: an environment of its own, and our datasets in its layout. For benchmarks only.

Its packages stay out of ours: nnU-Net asks for other versions, and for torchvision, which nothing run here needs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "2.8.1"
# Without their dependencies, which would bring a second torch and torchvision.
_OWN = (
    f"nnunetv2=={VERSION}",
    "acvl-utils",
    "batchgenerators",
    "batchgeneratorsv2",
    "dynamic-network-architectures",
    "timm<1.0.23",
)
_OTHERS = [
    "blosc2",
    "connected-components-3d",
    "einops",
    "future",
    "graphviz",
    "imagecodecs",
    "matplotlib",
    "nibabel",
    "numpy",
    "pandas",
    "requests",
    "scikit-image",
    "scikit-learn",
    "scipy",
    "seaborn",
    "simpleitk",
    "tifffile",
    "tqdm",
    "yacs",
]
_STAND_IN = '"""Stands where a package imports torchvision without using it here."""\n'


def install(folder: Path) -> Path:
    """Make a virtual environment with nnU-Net unless `folder` holds one; return its python."""
    python = folder / "bin" / "python"
    done = folder / "complete"
    if done.is_file() and done.read_text().strip() == VERSION:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, *_OTHERS], check=True)
    subprocess.run([*pip, "--no-deps", *_OWN], check=True)
    code = "import nnunetv2.experiment_planning.plan_and_preprocess_api, sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if "torchvision" in found.stderr:
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (Path(site) / "torchvision.py").write_text(_STAND_IN)
        found = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"nnU-Net does not start in {folder}: {found.stderr.strip().splitlines()[-1]}")
    done.write_text(VERSION + "\n")
    return python


def environment(root: Path) -> dict[str, str]:
    """Where nnU-Net looks and writes, with one thread for each process."""
    places = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    return {**os.environ, **places, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


class Listing(NamedTuple):
    """What an MSD folder lists, and what nnU-Net calls it."""

    name: str
    content: dict[str, Any]
    """Its dataset.json."""
    entries: dict[str, dict[str, str]]
    """Image and label of each chosen case."""


def read_listing(data: Path, number: int, cases: Collection[str] | None = None) -> Listing:
    """Read what an MSD folder lists.

    Args:
        number: of the dataset in nnU-Net's name for it.
        cases: the chosen ones; by default all.

    Raises:
        ValueError: a case that the folder does not list.
    """
    content = json.loads((data / "dataset.json").read_text())
    entries = {Path(entry["image"]).name.removesuffix(".nii.gz"): entry for entry in content["training"]}
    if unknown := sorted(set(cases or ()) - entries.keys()):
        raise ValueError(
            f"{data} has no case {unknown[0]!r} with a .nii.gz image; name cases of its dataset.json"
        )
    chosen = {case: entry for case, entry in entries.items() if cases is None or case in cases}
    return Listing(f"Dataset{number:03d}_{content['name'].replace(' ', '')}", content, chosen)


def write_raw(data: Path, number: int, root: Path, cases: Collection[str] | None = None) -> str:
    """Lay an MSD folder of one channel out as nnU-Net's raw dataset by links; return its name.

    Args:
        cases: those that nnU-Net may see; by default all.

    Raises:
        ValueError: more than one channel, or a case that the folder does not list.
    """
    name, content, entries = read_listing(data, number, cases)
    if len(content["modality"]) != 1:
        raise ValueError(f"{data} has {len(content['modality'])} channels; only one is laid out for nnU-Net")
    raw = root / "raw" / name
    for folder in (raw / "imagesTr", raw / "labelsTr", root / "preprocessed", root / "results"):
        folder.mkdir(parents=True, exist_ok=True)
    for case, entry in entries.items():
        image, label = (data / entry[part] for part in ("image", "label"))
        (raw / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(image.resolve())
        (raw / "labelsTr" / f"{case}.nii.gz").symlink_to(label.resolve())
    labels = {"background": 0} | {text: int(value) for value, text in content["labels"].items() if int(value)}
    about = {
        "channel_names": content["modality"],
        "labels": labels,
        "numTraining": len(entries),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    return name


def write_splits(name: str, root: Path, train: Sequence[str], validation: Sequence[str]) -> Path:
    """Write the one fold that nnU-Net trains on instead of drawing its own five; return the file."""
    path = root / "preprocessed" / name / "splits_final.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"train": sorted(train), "val": sorted(validation)}], indent=1))
    return path
