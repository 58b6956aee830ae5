"""Calibration of a run on the scans it segments, slab by slab, before components are removed."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medvisionllama._files import write_json
from medvisionllama.data.index import Case
from medvisionllama.data.labels import label_on_grid
from medvisionllama.data.planning import Plan
from medvisionllama.data.readers import read_label
from medvisionllama.evaluation.calibration import (
    NUM_BINS,
    Reliability,
    brier_score,
    expected_calibration_error,
    reliability_table,
    tally,
)
from medvisionllama.evaluation.evaluate import merged_foreground
from medvisionllama.inference.predictor import PreparedScan
from medvisionllama.inference.slabs import label_values
from medvisionllama.run_dir import RunDir


class CalibrationTally:
    """Adds up scans: sums for all of them, and two numbers for each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sums: dict[str, Reliability] = {}

    def watch(self, case: Case, scan: PreparedScan) -> Callable[[Tensor, tuple[slice, ...]], None]:
        """Return what is told each slab's probabilities and place in the scan in RAS.

        Raises:
            DataError: a label on another grid than its scan.
        """
        truth = self._truth(case, scan)
        self.sums[case.case_id] = Reliability.empty()

        def on_slab(probabilities: Tensor, place: tuple[slice, ...]) -> None:
            self.sums[case.case_id] += tally(probabilities.float().cpu().numpy(), truth[place])

        return on_slab

    def facts(self, members: Sequence[RunDir], weights: Sequence[str], split: str) -> dict[str, Any]:
        """What calibration.json holds; `weights` are their hashes when they were loaded."""
        total = sum(self.sums.values(), Reliability.empty())
        return {
            "runs": [member.path.resolve().name for member in members],
            "weights_sha256": list(weights),
            "split": split,
            "voxels": "true or likeliest class is foreground",
            "num_scans": len(self.sums),
            **_scores(total),
            "num_bins": NUM_BINS,
            "bins": reliability_table(total),
            "scans": [{"case_id": case_id, **_scores(sums)} for case_id, sums in self.sums.items()],
        }

    def write(self, path: Path, members: Sequence[RunDir], weights: Sequence[str], split: str) -> None:
        write_json(path, self.facts(members, weights, split))

    def _truth(self, case: Case, scan: PreparedScan) -> np.ndarray:
        """Index of the true class of each voxel, on the scan's grid in RAS; values of no class are background."""
        assert case.label is not None, "datasets list labelled cases"
        label = read_label(case.label)
        label = label_on_grid(case.label, label, scan.ras_shape, scan.ras_affine)
        if self.plan.merged:
            return merged_foreground(label).array
        values = label_values(self.plan)
        index = np.zeros(max(int(label.array.max(initial=0)), int(values.max())) + 1, values.dtype)
        index[values] = np.arange(len(values))
        return index[label.array]


def _scores(sums: Reliability) -> dict[str, Any]:
    numbers = {"ece": expected_calibration_error(sums), "brier": brier_score(sums)}
    # JSON has no NaN.
    found = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    return {"num_voxels": sums.num_voxels, **found}
