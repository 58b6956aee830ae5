"""Validation while training: whole scans, on their own grid, by Dice."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from medvisionllama.config import Config
from medvisionllama.data.cache import CachedCase, normalise
from medvisionllama.data.planning import Plan
from medvisionllama.evaluation.metrics import dice
from medvisionllama.inference.slabs import native_mask
from medvisionllama.inference.windows import predict_probabilities
from medvisionllama.networks.segmenter import TokenSegmenter


def validate_cases(
    network: TokenSegmenter, cases: Sequence[CachedCase], plan: Plan, config: Config, accelerator: Accelerator
) -> dict[str, Any]:
    """Segment every case and return mean Dice over cases and classes, and per class.

    Mirrored copies are left out here: they multiply the time and change all checkpoints alike.
    """
    rows = []
    network.eval()
    with accelerator.autocast():
        for case in cases:
            image = torch.from_numpy(normalise(case.image, plan.normalisation, case.facts["moments"]))
            probabilities = predict_probabilities(
                network, image, plan, overlap=config.inference.overlap, flip=False, device=accelerator.device
            )
            truth = np.asarray(case.native_label)
            mask = native_mask(probabilities, truth.shape, plan)
            rows.append(
                [
                    dice(mask == value, truth > 0 if plan.merged else truth == value)
                    for value in plan.output_values
                ]
            )
    per_class = np.mean(rows, axis=0)
    names = plan.mask_classes.values()
    record: dict[str, Any] = {
        "dice": float(per_class.mean()),
        "dice_per_class": dict(zip(names, map(float, per_class), strict=True)),
    }
    gate = getattr(network.insert, "gate", None)
    if gate is not None:
        record["gate_rms"] = float(gate.detach().square().mean().sqrt())
    return record
