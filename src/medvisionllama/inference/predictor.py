"""`Predictor`: a trained run as one object that turns scans into masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from medvisionllama.checkpoint import copy_into, frozen, load_tensors
from medvisionllama.config import Config, read_config
from medvisionllama.data.cache import image_moments, normalise, to_grid
from medvisionllama.data.planning import Plan
from medvisionllama.data.readers import read_image
from medvisionllama.data.volume import Volume, from_ras, to_ras
from medvisionllama.devices import DeviceChoice, autocast, channels_last, choose_device
from medvisionllama.errors import CheckpointError, DataError
from medvisionllama.inference.windows import native_mask, predict_probabilities
from medvisionllama.llm.block import tensors_sha256
from medvisionllama.networks.factory import build_network
from medvisionllama.run_dir import RunDir


@dataclass(frozen=True)
class Prediction:
    """A mask `[x, y, z]` on the scan's own grid, in the scan's own orientation."""

    mask: Volume

    @property
    def volumes_ml(self) -> dict[int, float]:
        """Volume of each label value present."""
        voxel_ml = float(np.prod(self.mask.spacing_mm)) / 1000
        values, counts = np.unique(self.mask.array, return_counts=True)
        return {
            int(value): int(count) * voxel_ml for value, count in zip(values, counts, strict=True) if value
        }


class Predictor:
    """Segments scans with the best weights of a run."""

    def __init__(self, network: nn.Module, plan: Plan, config: Config, device: torch.device) -> None:
        self.network = network
        self.plan = plan
        self.config = config
        self.device = device

    @classmethod
    def from_run(cls, path: Path | str, *, device: DeviceChoice = "auto") -> Self:
        """Load a run folder: plan, block and best weights.

        Raises:
            CheckpointError: not a finished run, damaged files, or a block other than the run was trained around.
            BlockError: the block cannot be had.

        >>> predictor = Predictor.from_run("runs/hip")  # doctest: +SKIP
        >>> predictor.predict("scan1.nii.gz").volumes_ml  # doctest: +SKIP
        """
        run_dir = RunDir(Path(path))
        run_dir.check()
        config = read_config(run_dir.config)
        plan = read_plan(run_dir)
        network = build_network(config.network, **plan.network_sizes, seed=config.train.seed)
        tensors, facts = load_tensors(run_dir.best)
        if facts.get("frozen_sha256") != tensors_sha256(frozen(network)):
            raise CheckpointError(
                f"{run_dir.best} was trained around another frozen block than the one loaded now; use the block named in {run_dir.manifest.name}"
            )
        copy_into(network, tensors, where=run_dir.best)
        where = choose_device(device)
        return cls(channels_last(network).to(where).eval(), plan, config, where)

    def predict(self, image: Path | str | tuple[Path, ...] | Volume) -> Prediction:
        """Segment a scan.

        Args:
            image: a file, one file per channel, or a `Volume` whose array is `[channel, x, y, z]`.

        Raises:
            DataError: unreadable, or with other channels than the run was trained on.
        """
        volume = (
            image
            if isinstance(image, Volume)
            else read_image(image if isinstance(image, tuple) else (Path(image),))
        )
        ras = to_ras(volume)
        mask = native_mask(self.probabilities(ras), ras.shape, self.plan)
        return Prediction(Volume(from_ras(mask, volume.affine), volume.affine))

    def probabilities(self, ras: Volume) -> Tensor:
        """Class probabilities `[k, x, y, z]`, background first, on the grid that the network sees, in RAS."""
        if ras.array.shape[0] != len(self.plan.channels):
            raise DataError(
                f"the scan has {ras.array.shape[0]} channels, the run was trained on {len(self.plan.channels)} ({', '.join(self.plan.channels)})"
            )
        grid = normalise(to_grid(ras, self.plan), self.plan.normalisation, image_moments(ras.array))
        inference = self.config.inference
        with autocast(self.config.train.precision, self.device):
            return predict_probabilities(
                self.network,
                torch.from_numpy(grid),
                self.plan,
                overlap=inference.overlap,
                flip=inference.flip,
                device=self.device,
            )


def read_plan(run_dir: RunDir) -> Plan:
    """Read a run's plan.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return Plan.model_validate_json(run_dir.plan.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir.plan} is missing or damaged ({' '.join(str(error).split())[:80]}); restore the run folder"
        ) from None
