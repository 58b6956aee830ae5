"""Training batches as a pure function of seed and step: nothing to save, nothing to replay after a resume."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from medvisionllama.config import AugmentConfig, DataConfig
from medvisionllama.data.cache import CachedCase, PseudoLabelledCase
from medvisionllama.data.normalisation import normalise
from medvisionllama.data.planning import Plan
from medvisionllama.data.transforms import Augmentation
from medvisionllama.errors import ConfigError
from medvisionllama.types import ImageBatch, LabelBatch, Triple

_MARGIN = 0.5
"""A region larger by this share is cut out, so that rotation and zoom bring in tissue, not padding, which would be
called background: of crops within an organ 0.1 % then is, and of a quarter 2 %, in some crops 12 %."""
_CLASS_FIRST = 0.5
"""Of the crops on a labelled voxel, where some cases lack a class: so many draw the class before the case."""


class BatchSampler:
    """Cuts, normalises and augments the batch of any step.

    Cases come in a fresh random order every epoch. A share of the crops is centred on a labelled voxel, classes
    taking turns at random, the rest anywhere. Where some cases lack a class, part of that share goes to each class
    alike: of a class that one case in thirty has, among eight others, a short run would see five crops.

    Args:
        batch_size: of all processes together, so that a run is the same whatever their number.
        rank: which of `num_ranks` equal shares of each batch this process cuts.

    Raises:
        ConfigError: processes that cannot share a batch evenly.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        plan: Plan,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        pseudo_share: float = 0.0,
    ) -> None:
        check_share(batch_size, num_ranks)
        self.cases = cases
        self.plan = plan
        self.foreground_share = data.foreground_share
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.augmentation = Augmentation(
            augment, plan.spacing_mm, plan.crop_size, plan.flip_axes, plan.unitless_channels
        )
        margin = 0.0 if plan.resize or not augment.enabled else _MARGIN
        # Equal whole margins on both sides, or an unmoved crop would fall between voxels and blur.
        x, y, z = (size + 2 * math.ceil(size * margin / 2) for size in plan.crop_size)
        self.region: Triple = (x, y, z)
        self.class_of = _lookup(plan)
        self.having = _cases_by_class(cases)
        # Merged values are one class, and say nothing about each other.
        is_uneven = not plan.merged and any(len(having) < len(cases) for having in self.having.values())
        self.class_first_share = _CLASS_FIRST * self.foreground_share if is_uneven else 0.0
        self.pseudo_labelled: Sequence[CachedCase] = ()
        """Cases of which `pseudo_share` of the crops are cut, once there are any."""
        self.pseudo_share = pseudo_share

    def batch(self, step: int) -> tuple[ImageBatch, LabelBatch]:
        """Return images `[b, c, x, y, z]` and class numbers `[b, x, y, z]` of this process's share of a step."""
        # The zero keeps the batches of runs from before processes shared one.
        rng = np.random.default_rng([self.seed, 0, step])
        cases = self._cases(step)
        # All processes draw for the whole batch, so that each crop is what one process would have cut.
        places = [self._place(case, rng) for case in cases]
        length = self.batch_size // self.num_ranks
        share = slice(self.rank * length, (self.rank + 1) * length)
        pairs = [self._cut(case, centre) for case, centre in places[share]]
        images = torch.from_numpy(np.stack([image for image, _ in pairs]))
        labels = torch.from_numpy(np.stack([label for _, label in pairs]))
        return self.augmentation.apply(images, labels, self.augmentation.draw_batch(len(cases), rng)[share])

    def _cases(self, step: int) -> list[CachedCase]:
        cases = [self.cases[number] for number in self._case_numbers(step)]
        if not self.pseudo_labelled:
            return cases
        rng = np.random.default_rng([self.seed, 2_000_003, step])
        others = rng.integers(len(self.pseudo_labelled), size=len(cases))
        takes_other = rng.random(len(cases)) < self.pseudo_share
        return [
            self.pseudo_labelled[other] if takes else case
            for case, other, takes in zip(cases, others, takes_other, strict=True)
        ]

    def _case_numbers(self, step: int) -> list[int]:
        first = step * self.batch_size
        numbers = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, len(self.cases))
            numbers.append(
                int(np.random.default_rng([self.seed, 1_000_003, epoch]).permutation(len(self.cases))[place])
            )
        return numbers

    def _cut(self, case: CachedCase, centre: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        label, image = case.label, case.image
        target, source = _overlap(centre, self.region, label.shape)
        cut_image = np.zeros((image.shape[0], *self.region), dtype=np.float32)
        cut_label = np.zeros(self.region, dtype=np.int64)
        # Padding is zero after normalisation, the same as in the sliding window.
        cut_image[(slice(None), *target)] = normalise(
            image[(slice(None), *source)], self.plan.normalisation, case.facts["moments"]
        )
        cut_label[target] = self.class_of[label[source]]
        return cut_image, cut_label

    def _place(self, case: CachedCase, rng: np.random.Generator) -> tuple[CachedCase, list[int]]:
        """Where a crop is cut: of this case, or of one that has the class whose turn it is.

        Scans that train without labels keep their share of the crops.
        """
        value: int | None = None
        class_first_share = 0.0 if isinstance(case, PseudoLabelledCase) else self.class_first_share
        if len(case.centres) or class_first_share:
            drawn = rng.random()
            if drawn < class_first_share:
                value = int(rng.choice(list(self.having)))
                case = self.having[value][rng.integers(len(self.having[value]))]
            elif drawn < self.foreground_share and len(case.centres):
                value = int(rng.choice(np.unique(case.centres[:, 0])))
        wanted: np.ndarray | None = None
        if value is not None:
            rows = case.centres[case.centres[:, 0] == value]
            wanted = rows[rng.integers(len(rows)), 1:]
        return case, self._centre(case, wanted, rng)

    def _centre(self, case: CachedCase, wanted: np.ndarray | None, rng: np.random.Generator) -> list[int]:
        """On a voxel, or anywhere, and as far within the scan as it goes."""
        centre = []
        for axis, (size, crop) in enumerate(zip(case.label.shape, self.plan.crop_size, strict=True)):
            low, high = crop // 2, size - (crop - crop // 2)
            if high <= low:
                # As much padding in front as in the sliding window.
                centre.append(low - (crop - size) // 2)
            elif wanted is None:
                centre.append(int(rng.integers(low, high + 1)))
            else:
                centre.append(int(np.clip(wanted[axis], low, high)))
        return centre


def _cases_by_class(cases: Sequence[CachedCase]) -> dict[int, list[CachedCase]]:
    """Cases in whose label a value occurs, for each value."""
    having: dict[int, list[CachedCase]] = {}
    for case in cases:
        for value in np.unique(case.centres[:, 0]):
            having.setdefault(int(value), []).append(case)
    return having


def check_share(batch_size: int, num_ranks: int) -> None:
    """Raise ConfigError unless processes can share a batch evenly."""
    if batch_size % num_ranks:
        raise ConfigError(
            f"train.batch_size={batch_size} is shared by all processes and is not a multiple of their number, {num_ranks}; start fewer processes, or give --set train.batch_size={num_ranks}"
        )


def _overlap(
    centre: Sequence[int], region: Triple, shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices into the region and into the scan of what they share."""
    target, source = [], []
    for middle, length, size in zip(centre, region, shape, strict=True):
        start = middle - length // 2
        low, high = max(0, start), min(size, start + length)
        target.append(slice(low - start, high - start))
        source.append(slice(low, high))
    return tuple(target), tuple(source)


def _lookup(plan: Plan) -> np.ndarray:
    """Class number of each label value."""
    table = np.zeros(max(plan.classes) + 1, dtype=np.int64)
    for number, value in enumerate(plan.classes, start=1):
        table[value] = 1 if plan.merged else number
    return table
