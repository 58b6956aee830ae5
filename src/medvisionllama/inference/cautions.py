"""What a user should know before trusting a mask."""

from collections.abc import Mapping

import numpy as np

from medvisionllama.data.planning import Plan, is_ct
from medvisionllama.data.volume import shear_fault
from medvisionllama.inference.predictor import Prediction, PreparedScan

_SPACING_RATIO = 2.0


def cautions(scan: PreparedScan, prediction: Prediction, plan: Plan) -> list[str]:
    """One line for each doubt about a prediction."""
    lines = []
    # Finer ones are brought to the network's grid, as those of training were.
    if not plan.resize and np.divide(scan.spacing_mm, plan.spacing_mm).max() > _SPACING_RATIO:
        theirs, ours = (
            " × ".join(f"{edge:.3g}" for edge in edges) for edges in (scan.spacing_mm, plan.spacing_mm)
        )
        lines.append(f"voxels of {theirs} mm are far coarser than the network's grid of {ours} mm")
    if fault := shear_fault(scan.affine):
        lines.append(fault)
    for name, (low, high), rule in zip(plan.channels, scan.ranges, plan.normalisation, strict=True):
        if low == high:
            lines.append(f"channel {name} is the same everywhere")
        elif rule.kind == "dataset" and low >= 0 and is_ct(name):
            lines.append(f"channel {name} has no value below 0; CT in Hounsfield units has air at -1000")
    if not prediction.volumes_ml:
        lines.append("nothing was found")
    return lines + _cut(prediction, plan.mask_classes)


def _cut(prediction: Prediction, classes: Mapping[int, str]) -> list[str]:
    """Classes that end where the scan ends."""
    mask = prediction.mask.array
    faces = [mask.take(end, axis=axis) for axis in range(3) if mask.shape[axis] > 1 for end in (0, -1)]
    touching = {int(value) for face in faces for value in np.unique(face)} - {0}
    return [
        f"{classes[value]} touches the edge of the scan; its volume may be cut" for value in sorted(touching)
    ]
