"""The few-shot table: its rows, and the arms that are compared in each."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A dataset, and how much of it trains for how long."""

    data: str
    cases: int | None
    """Training cases, by whole patients; None for all of the fold."""
    minutes: float
    thick: bool = True
    """Whether slices are so thick that the plan makes the grid coarser."""
    exclude: tuple[str, ...] = ()
    """Patients that are left out of everything."""
    begin_with: str | None = None
    """The row of another hospital on which an arm trains first that begins with an earlier run."""


@dataclass(frozen=True)
class Arm:
    """One of MONAI's networks or our own, and what is set over it."""

    rival: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    """Whether its learning rate is chosen before, on the validation cases, in minutes that do not count."""
    begun: bool = False
    """Whether it begins with a run on `begin_with`, whose minutes do not count."""


NNUNET = "nnunet"
RIVALS = {
    "unet": (16, 32),
    "unet++": (8, 32),
    "dynunet": (16, 32),
    "segresnet": (8, 16),
    "unetr": (4, 16),
    "swin_unetr": (12, 24),
}
"""MONAI's networks, each in a slim width that suits two cores and in one nearer to the published."""
TUNED = "-tuned"
BEGUN = "-begun"
ONE = "-one-network"
RATES = (7e-4, 2e-3, 6e-3)
"""Learning rates that a rival may choose from; the one in the middle is ours."""
TUNING_SHARE = 0.25
"""Of its minutes, for a run with each."""
START_MINUTES = 15
"""Of a run that others begin with; all seeds of a row begin with the same one."""
UNLABELLED = "self-training"
NATIVE = "native-spacing"
_TWICE = ("patient076",)
"""Images of ACDC that are also patient074's, voxel by voxel: one would train while the other validates."""
ROWS = {
    "hippocampus-14": Row("Task04_Hippocampus", 14, 20, thick=False),
    "hippocampus-all": Row("Task04_Hippocampus", None, 30, thick=False),
    # Two frames a patient.
    "acdc-4": Row("Task101_ACDC", 8, 20, exclude=_TWICE, begin_with="sunnybrook-all"),
    "sunnybrook-5": Row("Task104_SunnybrookLV", 10, 20, begin_with="acdc-all"),
    "acdc-all": Row("Task101_ACDC", None, 30, exclude=_TWICE),
    "sunnybrook-all": Row("Task104_SunnybrookLV", None, 30),
}
_OF_SMALL = {"one-network", "half", "fine-16"}
"""Arms that take one of two networks away, or name the stem's channels."""
TABLES = {
    "small": ("hippocampus-14", "hippocampus-all", "acdc-4", "sunnybrook-5"),
    "large": ("hippocampus-all", "acdc-all", "sunnybrook-all"),
}
"""The rows of each preset's table."""
ARMS = {
    "block": Arm(),
    f"block{BEGUN}": Arm(begun=True),
    "random-block": Arm(overrides={"network.block.weights": "random"}),
    "no-block": Arm(overrides={"network.insert": "none", "network.gate": "none"}),
    "no-tokens": Arm(overrides={"network.tokens": False}),
    # What the scans without labels add: those of the fold that the row leaves out.
    UNLABELLED: Arm(overrides={"network.tokens": False, "unlabelled.scans": "unused"}),
    NATIVE: Arm(overrides={"network.tokens": False, "data.coarsest_mm": 0}),
    # A single network in all threads, as each arm was before decision 0022.
    "one-network": Arm(overrides={"network.tokens": False, "train.members": 1}),
    "no-bias-field": Arm(overrides={"network.tokens": False, "train.members": 1, "augment.bias_field": 0}),
    # Logits from stride 2: more steps in the same minutes.
    "half": Arm(overrides={"network.stem_channels": [0, 32, 64]}),
    # More work on each crop, and fewer steps: channels at full resolution, convolutions on the way up.
    "fine-16": Arm(overrides={"network.stem_channels": [16, 32, 64]}),
    **{f"join-{number}": Arm(overrides={"network.join_convolutions": number}) for number in (1, 2)},
    "no-context": Arm(overrides={"network.tokens": False, "network.context_channels": None}),
    **{
        f"{name}-{width}{ending}": Arm(
            name,
            {"network.base_channels": width, "train.members": members},
            tuned=ending == TUNED,
            begun=ending.endswith(BEGUN),
        )
        for name, widths in RIVALS.items()
        for width in widths
        # A slow network is better alone, in all of the steps.
        for ending, members in (("", 2), (ONE, 1), (TUNED, 1), (f"{ONE}{BEGUN}", 1))
    },
}


def says_nothing(row: Row, arm: str, preset: str) -> bool:
    """Whether an arm is the same training as another one, or is cut for another preset's widths."""
    return (
        (arm == UNLABELLED and row.cases is None)
        or (arm == NATIVE and not row.thick)
        or arm == ("join-1" if row.thick else "join-2")
        or (arm in ARMS and ARMS[arm].begun and row.begin_with is None)
        or (arm in _OF_SMALL and preset != "small")
    )
