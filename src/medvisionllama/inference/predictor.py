"""`Predictor`: one trained run, or several that are averaged, as one object that turns scans into masks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from medvisionllama._files import with_home
from medvisionllama.checkpoint import copy_into, frozen, load_facts, load_tensors
from medvisionllama.config import ONE_VIEW, Config, InferenceConfig, read_config
from medvisionllama.data.cache import to_grid
from medvisionllama.data.normalisation import image_moments, normalise
from medvisionllama.data.planning import Plan, read_plan
from medvisionllama.data.readers import ScanSource, check_finite, read_image
from medvisionllama.data.volume import Volume, from_ras, to_ras, voxel_ml
from medvisionllama.devices import autocast, choose_device, fast_layout
from medvisionllama.errors import CheckpointError, DataError, command
from medvisionllama.inference.cleaning import Cleaning, cleaning_of
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.slabs import entropy, label_values, likeliest, native_slabs, slab_thickness
from medvisionllama.inference.windows import Network, SlidingWindow, slab_axis
from medvisionllama.llm.block import tensors_sha256
from medvisionllama.networks.factory import build_network
from medvisionllama.networks.inserts import LLMInsert
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.run_dir import RunDir
from medvisionllama.types import AffineMatrix, DeviceChoice, ImageArray, SpacingMm, Triple


def to_bytes(share: Tensor) -> np.ndarray:
    """Numbers between 0 and 1 in 255 steps, an eighth of their size as float64."""
    return (share * 255).round().to(torch.uint8).cpu().numpy()


@dataclass(frozen=True)
class Prediction:
    """A mask `[x, y, z]` on the scan's own grid, in the scan's own orientation.

    `probabilities` `[k, x, y, z]`, background first, and `uncertainty` `[x, y, z]`, the entropy of those as a share
    of the largest possible, are there if asked for: in 255 steps from 0 to 1.
    """

    mask: Volume
    probabilities: np.ndarray | None = None
    uncertainty: np.ndarray | None = None

    @property
    def volumes_ml(self) -> dict[int, float]:
        """Volume of each label value present."""
        volume = voxel_ml(self.mask.affine)
        counts = np.bincount(self.mask.array.ravel()) if self.mask.array.size else np.zeros(0)
        return {int(value): int(counts[value]) * volume for value in np.flatnonzero(counts) if value}


@dataclass(frozen=True)
class Member:
    """One trained network and what its run decided."""

    network: TokenSegmenter
    plan: Plan
    config: Config
    device: torch.device

    @classmethod
    def from_run(
        cls,
        path: Path,
        device: torch.device,
        *,
        block_removed: bool = False,
        inference: InferenceConfig | None = None,
    ) -> Self:
        """Load plan, block and best weights of a run folder; see `Predictor.from_run`.

        Args:
            inference: in place of the folder's own settings.
        """
        run_dir = RunDir(path)
        run_dir.check()
        config = read_config(run_dir.config)
        if inference is not None:
            config = config.model_copy(update={"inference": inference})
        plan = read_plan(run_dir)
        network = build_network(config.network, **plan.network_shapes, seed=config.train.seed)
        tensors, facts = load_tensors(run_dir.best)
        if facts.get("frozen_sha256") != tensors_sha256(frozen(network)):
            raise CheckpointError(
                f"{run_dir.best} was trained around another frozen block than the one loaded now; use the block named in {run_dir.manifest.name}"
            )
        copy_into(network, tensors, where=run_dir.best)
        if block_removed:
            if not isinstance(network.insert, LLMInsert):
                raise CheckpointError(
                    f"{path} was trained without a block (network.insert={config.network.insert}), so none can be removed"
                )
            network.insert.block_removed = True
        return cls(fast_layout(network).to(device).eval(), plan, config, device)

    def planes(self, grid: np.ndarray, moments: Sequence[tuple[float, float]], axis: int) -> Iterator[Tensor]:
        """Probabilities of a scan on this network's grid, in pieces along `axis`."""
        window = self.window(axis, moments)
        flip, turn = self.config.inference.flip, self.config.turns_views
        return window.probabilities(torch.from_numpy(grid), flip=flip, turn=turn)

    def window(
        self, axis: int, moments: Sequence[tuple[float, float]], network: Network | None = None
    ) -> SlidingWindow:
        """Slide over a scan with these moments, scaled as training scaled its scans.

        Args:
            network: what looks through the window instead of this one.
        """

        def scaled(slab: Tensor) -> Tensor:
            return torch.from_numpy(normalise(slab.numpy(), self.plan.normalisation, moments))

        return SlidingWindow(
            network or self.network,
            self.plan,
            axis,
            self.config.inference.overlap,
            device=self.device,
            normalise=scaled,
            context=lambda: autocast(self.config.train.precision, self.device),
        )


@dataclass(frozen=True)
class PreparedScan:
    """A scan on the grids that the networks see; its own voxels are gone."""

    affine: AffineMatrix
    """Of the file, in the file's own orientation."""
    ras_shape: Triple
    ras_affine: AffineMatrix
    spacing_mm: SpacingMm
    """Edge lengths of the scan's voxels in RAS order."""
    grids: dict[tuple[float, ...], ImageArray]
    moments: Sequence[tuple[float, float]]
    """Mean and deviation of each channel's non-zero voxels, where the networks want them."""
    ranges: Sequence[tuple[float, float]]
    """Least and greatest value of each channel."""

    def grid_of(self, plan: Plan) -> ImageArray:
        """The scan on the grid of a plan."""
        return self.grids[_grid_key(plan)]


class Predictor:
    """Segments scans with the best weights of a run, or with the mean of several runs' probabilities.

    Args:
        run_dir: of the first run, whose choice of components to remove holds for all.
    """

    def __init__(self, members: Sequence[Member], run_dir: RunDir | None = None) -> None:
        self.members = tuple(members)
        self.run_dir = run_dir

    @property
    def plan(self) -> Plan:
        """The first run's plan; channels and classes are those of all."""
        return self.members[0].plan

    @property
    def _wants_moments(self) -> bool:
        return any(rule.kind == "image" for member in self.members for rule in member.plan.normalisation)

    @property
    def network(self) -> TokenSegmenter:
        """The first run's network."""
        return self.members[0].network

    @cached_property
    def cleaning(self) -> Cleaning:
        """What `predict` removes: what the first run's settings say, else what was chosen on its validation cases.

        Raises:
            CheckpointError: postprocessing.json is damaged.
        """
        own = self.members[0].config.inference
        return Cleaning.of(own) if self.run_dir is None else cleaning_of(self.run_dir, own)[0]

    @classmethod
    def from_run(
        cls,
        *paths: Path | str,
        device: DeviceChoice = "auto",
        block_removed: bool = False,
        fast: bool = False,
    ) -> Self:
        """Load a run folder, or several whose predictions are averaged, each with all of its members.

        Args:
            fast: look at each scan once, not mirrored and turned as well.
            block_removed: leave the frozen block out, so that only the residual around it is left.

        Raises:
            CheckpointError: not a finished run, damaged files, a block other than the run was trained around, or
                runs of different channels or classes, or no block to remove.
            BlockError: the block cannot be had.

        >>> predictor = Predictor.from_run("runs/hip")  # doctest: +SKIP
        >>> predictor.predict("scan1.nii.gz").volumes_ml  # doctest: +SKIP
        """
        where = choose_device(device)
        check_alike(paths)
        members = []
        for run_dir in (RunDir(path) for path in paths):
            # One run's networks look at a scan in one way, which its own folder says.
            inference = read_config(run_dir.config, ONE_VIEW if fast else {}).inference
            members += [
                Member.from_run(one.path, where, block_removed=block_removed, inference=inference)
                for one in run_dir.members()
            ]
        return cls(members, RunDir(paths[0]))

    def predict(
        self,
        image: ScanSource | str | tuple[ScanSource, ...] | Volume,
        *,
        probabilities: bool = False,
        uncertainty: bool = False,
        cleaned: bool = True,
    ) -> Prediction:
        """Segment a scan, as `medvisionllama predict` does.

        Args:
            image: a file, one file per channel, or a `Volume` whose array is `[channel, x, y, z]`.
            probabilities: keep those of every class.
            uncertainty: keep their entropy.
            cleaned: remove the components that `cleaning` says; False keeps all.

        Raises:
            DataError: unreadable, or with other channels than the run was trained on.
            CheckpointError: postprocessing.json is damaged.
        """
        found = self.segment(self.prepare(image), probabilities=probabilities, uncertainty=uncertainty)
        if not cleaned:
            return found
        return replace(found, mask=clean(found.mask, self.cleaning, self.plan.places))

    def prepare(self, image: ScanSource | str | tuple[ScanSource, ...] | Volume) -> PreparedScan:
        """Read a scan and resample it: the part of `predict` that needs no network."""
        source: object = "the scan"
        if isinstance(image, Volume):
            check_finite(source, image.array)
        else:
            sources = image if isinstance(image, tuple) else (image,)
            source = sources[0]
            image = read_image(
                tuple(with_home(one) if isinstance(one, str | Path) else one for one in sources)
            )
        if image.array.shape[0] != len(self.plan.channels):
            raise DataError(
                f"{source} has {image.array.shape[0]} channels, the run was trained on {len(self.plan.channels)} ({', '.join(self.plan.channels)})"
            )
        ras = to_ras(image)
        plans = {_grid_key(member.plan): member.plan for member in self.members}
        return PreparedScan(
            image.affine,
            ras.shape,
            ras.affine,
            ras.spacing_mm,
            {key: to_grid(ras, plan, source) for key, plan in plans.items()},
            image_moments(ras.array) if self._wants_moments else [(0.0, 1.0)] * len(ras.array),
            [(float(channel.min()), float(channel.max())) for channel in ras.array],
        )

    def segment(
        self,
        scan: PreparedScan,
        *,
        probabilities: bool = False,
        uncertainty: bool = False,
        on_share: Callable[[float], None] = lambda share: None,
        on_slab: Callable[[Tensor, tuple[slice, ...]], None] | None = None,
    ) -> Prediction:
        """Run the networks over a prepared scan, and bring classes back to its own grid slab by slab.

        Args:
            on_share: told after each slab which share of the scan is done.
            on_slab: told each slab's probabilities `[k, x, y, z]`, and its place in the scan in RAS.
        """
        turn = any(member.config.turns_views for member in self.members)
        axis = slab_axis(scan.ras_shape, [member.plan for member in self.members], turn=turn)
        values = label_values(self.plan)
        mask = np.empty(scan.ras_shape, values.dtype)
        kept = np.empty((len(values), *scan.ras_shape), np.uint8) if probabilities else None
        doubt = np.empty(scan.ras_shape, np.uint8) if uncertainty else None
        start = 0
        for slab in self._slabs(scan, axis, slab_thickness(scan.ras_shape, len(values), axis)):
            end = start + slab.shape[axis + 1]
            place = tuple(slice(start, end) if other == axis else slice(None) for other in range(3))
            mask[place] = values[likeliest(slab)]
            if kept is not None:
                kept[(slice(None), *place)] = to_bytes(slab)
            if doubt is not None:
                doubt[place] = to_bytes(entropy(slab))
            if on_slab is not None:
                on_slab(slab, place)
            start = end
            on_share(start / scan.ras_shape[axis])
        turned = [None if array is None else from_ras(array, scan.affine) for array in (kept, doubt)]
        return Prediction(Volume(from_ras(mask, scan.affine), scan.affine), *turned)

    def _slabs(self, scan: PreparedScan, axis: int, thickness: int) -> Iterator[Tensor]:
        """Mean probabilities `[k, x, y, z]` on the scan's grid in RAS, `thickness` planes at a time."""
        streams = []
        for member in self.members:
            grid = scan.grid_of(member.plan)
            planes = member.planes(grid, scan.moments, axis)
            x, y, z = grid.shape[1:]
            streams.append(native_slabs(planes, (x, y, z), scan.ras_shape, axis=axis, thickness=thickness))
        for slabs in zip(*streams, strict=True):
            yield slabs[0] if len(slabs) == 1 else torch.stack(slabs).mean(dim=0)


def check_alike(paths: Sequence[Path | str]) -> Plan:
    """Return the plan of the first run, or raise CheckpointError unless all can predict, and the same classes."""
    plans = []
    for path in paths:
        run_dir = RunDir(path)
        run_dir.members()
        plans.append(read_plan(run_dir))
        # Not `mask_classes`: of merged classes all are foreground, whatever it is.
        if len({(plan.channels, tuple(plan.classes.items()), plan.merged) for plan in plans}) > 1:
            raise CheckpointError(
                f"{path} has other channels or classes than {paths[0]}; average runs of one task only"
            )
    return plans[0]


def unfinished(run_dirs: Sequence[RunDir]) -> list[str]:
    """A line for each run that can predict, and trains still or was stopped before its end.

    A run without a state to go on from, as one that was handed on, is taken for finished.
    """
    lines = []
    for run_dir in run_dirs:
        if not all(_has_ended(one.state) for one in run_dir.members()):
            again = command("train", "DATA", "--out", run_dir.path, "--resume")
            lines.append(
                f"{run_dir.path} has not ended, and its weights are those of a validation before; go on with: {again} (a shorter --max-minutes beside it ends it where it is)"
            )
    return lines


def _has_ended(state: Path) -> bool:
    """What a state to go on from says, if it is there and whole."""
    with suppress(CheckpointError):
        return bool(load_facts(state)["finished"])
    return True


def _grid_key(plan: Plan) -> tuple[float, ...]:
    """Networks whose keys are equal share a scan's grid."""
    return (0.0, *plan.crop_size) if plan.resize else plan.spacing_mm
