"""Validation while training: whole scans, on their own grid, by Dice."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from medvisionllama.config import Config
from medvisionllama.data.cache import CachedCase, normalise
from medvisionllama.data.planning import Plan
from medvisionllama.evaluation.metrics import dice
from medvisionllama.inference.slabs import native_mask
from medvisionllama.inference.windows import predict_probabilities
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.training.processes import Processes

_FOUND = 0.01
"""Dice from which on a class counts as found in a case."""


def case_probabilities(
    network: TokenSegmenter,
    case: CachedCase,
    plan: Plan,
    *,
    overlap: float,
    flip: bool,
    accelerator: Accelerator,
) -> Tensor:
    """Class probabilities `[k, x, y, z]` of a preprocessed case, on the training grid."""
    image = torch.from_numpy(normalise(case.image, plan.normalisation, case.facts["moments"]))
    return predict_probabilities(
        network,
        image,
        plan,
        overlap=overlap,
        flip=flip,
        device=accelerator.device,
        context=accelerator.autocast,
    )


def validate_cases(
    network: TokenSegmenter, cases: Sequence[CachedCase], plan: Plan, config: Config, accelerator: Accelerator
) -> dict[str, Any]:
    """Segment every case and return mean Dice over cases and classes, and per class; none if there are no cases.

    Under `never_found` are the classes, if there are such, that the network finds in none of the cases that have
    them: a mean over few cases and many classes hides one that is not learned at all.

    Mirrored copies are left out here: they multiply the time and change all checkpoints alike. The processes of a
    run share the cases among them and return the same; around a sharded block, which takes all of them at once,
    each segments every case.
    """
    gate = getattr(network.insert, "gate", None)
    opened = {} if gate is None else {"gate_rms": float(gate.detach().square().mean().sqrt())}
    if not cases:
        return {"dice": None, "dice_per_class": {}, **opened}
    processes = Processes(accelerator)
    shared = processes.num > 1 and not config.train.shard_block
    numbers = range(processes.index, len(cases), processes.num) if shared else range(len(cases))
    # Dice, and 1 where a case has the class.
    table = torch.zeros(2, len(cases), len(plan.output_values), dtype=torch.float64)
    network.eval()
    for number in numbers:
        case = cases[number]
        probabilities = case_probabilities(
            network, case, plan, overlap=config.inference.overlap, flip=False, accelerator=accelerator
        )
        truth = np.asarray(case.native_label)
        mask = native_mask(probabilities, truth.shape, plan)
        for column, value in enumerate(plan.output_values):
            wanted = truth > 0 if plan.merged else truth == value
            table[0, number, column] = dice(mask == value, wanted)
            table[1, number, column] = float(wanted.any())
    if shared:
        # Each row stands in one process and is zero in the others, so the sum is exact.
        table = processes.sum(table)
    scores, present = table.numpy()
    per_class = scores.mean(axis=0)
    names = plan.mask_classes.values()
    lost = present.any(axis=0) & ((scores * present).max(axis=0) < _FOUND)
    never_found = [name for name, is_lost in zip(names, lost, strict=True) if is_lost]
    return {
        "dice": float(per_class.mean()),
        "dice_per_class": dict(zip(names, map(float, per_class), strict=True)),
        **({"never_found": never_found} if never_found else {}),
        **opened,
    }
