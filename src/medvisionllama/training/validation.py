"""Validation while training: whole scans, on their own grid, by Dice."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from medvisionllama.config import Config
from medvisionllama.data.cache import CachedCase
from medvisionllama.data.normalisation import normalise
from medvisionllama.data.planning import Plan
from medvisionllama.evaluation.metrics import dice
from medvisionllama.inference.slabs import native_mask
from medvisionllama.inference.windows import SlidingWindow, slab_axis
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.training.processes import Processes
from medvisionllama.types import LabelArray, Triple

_FOUND = 0.01
"""Dice from which on a class counts as found in a case."""


def case_mask(
    network: TokenSegmenter,
    case: CachedCase,
    plan: Plan,
    shape: Triple | None = None,
    *,
    overlap: float,
    flip: bool,
    accelerator: Accelerator,
) -> LabelArray:
    """Label values of a preprocessed case as the network sees it.

    Args:
        shape: of the grid of the mask, which spans the case as the training grid does; by default that one.
    """
    image = torch.from_numpy(normalise(case.image, plan.normalisation, case.facts["moments"]))
    x, y, z = image.shape[1:]
    axis = slab_axis((x, y, z), [plan])
    window = SlidingWindow(
        network, plan, axis, overlap, device=accelerator.device, context=accelerator.autocast
    )
    return native_mask(window.probabilities(image, flip=flip), (x, y, z), shape or (x, y, z), plan, axis=axis)


def validate_cases(
    network: TokenSegmenter,
    cases: Sequence[CachedCase],
    plan: Plan,
    config: Config,
    accelerator: Accelerator,
    *,
    patience_seconds: float | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Segment every case and return mean Dice over cases and classes, and per class; none if there are no cases.

    A case says nothing of a class that neither its label nor its mask has, nor do cases none of which has it.
    Counted as tables have it, 1 and with a stray voxel 0, a network that never learned a rare class would be chosen
    before one that did.

    Under `never_found` are the classes, if there are such, that the network finds in none of the cases that have
    them: a mean over few cases and many classes hides one that is not learned at all.

    Mirrored copies are left out here: they multiply the time and change all checkpoints alike. The processes of a
    run share the cases among them and return the same; around a sharded block, which takes all of them at once,
    each segments every case.

    Args:
        patience_seconds: give up after one case or two if all of them, by their voxels, would take longer; then the
            record holds `would_take_seconds` alone. Of a single case, or one for each process,
            which are over by then, it holds that too.
        interrupted: asked between cases, of which there may be many minutes' worth; then the record says
            `interrupted`.
    """
    opened = {} if (opening := network.gate_rms) is None else {"gate_rms": opening}
    if not cases:
        return {"dice": None, "dice_per_class": {}, **opened}
    processes = Processes(accelerator)
    shared = processes.num > 1 and not config.train.shard_block
    numbers = range(processes.index, len(cases), processes.num) if shared else range(len(cases))
    # For each case the rows of `_scores`.
    table = torch.zeros(3, len(cases), len(plan.output_values), dtype=torch.float64)
    network.eval()

    def score(number: int) -> float:
        """Fill the case's rows, and return the seconds that it took."""
        started = time.monotonic()
        truth, overlap = np.asarray(cases[number].native_label), config.inference.overlap
        mask = case_mask(
            network, cases[number], plan, truth.shape, overlap=overlap, flip=False, accelerator=accelerator
        )
        table[:, number] = _scores(mask, truth, plan)
        return time.monotonic() - started

    side_by_side = processes.num if shared else 1
    voxels = [math.prod(cases[number].image.shape) for number in numbers]
    longest = 0.0
    for place in range(2):
        # On trial. Processes agree after each of the two, whether they have one or not.
        would_take = 0.0
        if place < len(numbers):
            seconds = score(numbers[place])
            longest = max(longest, seconds)
            would_take = _would_take(seconds, place, voxels, patience_seconds)
        if patience_seconds is not None and (would_take := processes.first(would_take)) > patience_seconds:
            return {"would_take_seconds": would_take}
        if len(cases) > (place + 1) * side_by_side and processes.any(interrupted()):
            return {"interrupted": True}
    stopped = False
    for number in numbers[2:]:
        # Processes that share cases have not equally many, and agree below; others work on each together.
        if stopped := interrupted() if shared else processes.any(interrupted()):
            break
        score(number)
    if processes.any(stopped):
        return {"interrupted": True}
    if shared:
        # Each row stands in one process and is zero in the others, so the sum is exact.
        table = processes.sum(table)
    too_long = {}
    if len(cases) <= side_by_side and patience_seconds is not None:
        longest = processes.first(longest)
        too_long = {"would_take_seconds": longest} if longest > patience_seconds else {}
    return {**_record(table, plan), **opened, **too_long}


def _scores(mask: LabelArray, truth: LabelArray, plan: Plan) -> torch.Tensor:
    """Three rows with a column for each class: Dice; 1 where the case has it; 1 where it or its mask has it."""
    rows = torch.zeros(3, len(plan.output_values), dtype=torch.float64)
    for column, value in enumerate(plan.output_values):
        wanted = truth > 0 if plan.merged else truth == value
        found = mask == value
        rows[0, column] = dice(found, wanted)
        rows[1, column] = float(wanted.any())
        rows[2, column] = float(wanted.any() or found.any())
    return rows


def _record(table: torch.Tensor, plan: Plan) -> dict[str, Any]:
    """Means over the cases of a table, as `validate_cases` tells them."""
    scores, present, counts = table.numpy()
    counts = counts * present.any(axis=0)
    num_counted = counts.sum(axis=0)
    per_class = np.where(num_counted > 0, (scores * counts).sum(axis=0) / np.maximum(num_counted, 1), 1.0)
    names = plan.mask_classes.values()
    lost = present.any(axis=0) & ((scores * present).max(axis=0) < _FOUND)
    never_found = [name for name, is_lost in zip(names, lost, strict=True) if is_lost]
    return {
        "dice": float(per_class.mean()),
        "dice_per_class": dict(zip(names, map(float, per_class), strict=True)),
        **({"never_found": never_found} if never_found else {}),
    }


def _would_take(seconds: float, place: int, voxels: Sequence[int], patience_seconds: float | None) -> float:
    """Seconds of all cases, judged by one that took so long; 0 where it tells nothing, or none is left.

    The first one is slower than the others: what is needed is loaded, and kernels are chosen. So it tells only as
    one of two, or if it has used up the time of all.
    """
    tells = place > 0 or len(voxels) == 2 or seconds > (patience_seconds or math.inf)
    is_last = place + 1 == len(voxels)
    return seconds * sum(voxels) / voxels[place] if tells and not is_last else 0.0
