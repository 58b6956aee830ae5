"""Which components masks lose: candidates, the rule that picks one, and the choice that a run's folder keeps.

What decides, first to last: what the user asks for in a command; a run's own settings `inference.*`, if they remove
anything; postprocessing.json, chosen on the run's validation cases; nothing.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from medvisionllama._files import write_json
from medvisionllama.config import InferenceConfig
from medvisionllama.errors import CheckpointError, command
from medvisionllama.run_dir import RunDir

MARGIN = 0.002
"""Mean class Dice that removing something must gain, and the most that a class may lose by it; less is below what a
handful of cases can tell."""
_ROUNDING = 1e-9


class Cleaning(BaseModel):
    """One way to clean masks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    largest_foreground: bool = False
    largest_component: bool = False
    min_component_ml: float = 0.0

    @classmethod
    def of(cls, settings: "InferenceConfig | Cleaning") -> "Cleaning":
        """What a run's settings, or a choice, remove."""
        return Cleaning(**{name: getattr(settings, name) for name in Cleaning.model_fields})

    @property
    def removes(self) -> bool:
        """Whether any component may go."""
        return self.largest_foreground or self.largest_component or self.min_component_ml > 0

    @property
    def words(self) -> str:
        """What is done, for people."""
        parts = []
        if self.largest_foreground and self.largest_component:
            parts.append(
                "of the largest component of all classes together, the largest of each class alone is kept"
            )
        elif self.largest_foreground:
            parts.append("the largest component of all classes together alone is kept")
        elif self.largest_component:
            parts.append("the largest component of each class alone is kept")
        if self.min_component_ml:
            parts.append(f"components smaller than {self.min_component_ml:g} ml are removed")
        return ", and ".join(parts) or "no component is removed"


class Candidate(Cleaning):
    """A way that was tried, and what it scored."""

    dice: float
    """Mean over validation cases of the mean over classes."""
    dice_per_class: dict[str, float]


class Choice(Cleaning):
    """What postprocessing.json holds."""

    chosen_on: str = "validation"
    num_cases: int
    margin: float = MARGIN
    weights_sha256: str
    """Of the best weights whose masks were compared; of others, nothing is known."""
    candidates: tuple[Candidate, ...]


def make_candidates(volumes_ml: Sequence[Mapping[int, Sequence[float]]]) -> list[Cleaning]:
    """List what is worth trying, the mildest first: nothing, a few volumes, the largest components alone.

    Those are the largest of all classes together, of each class, and of each class within the first.

    The volumes are a half and the whole of the smallest labelled component, and a tenth and a half of the smallest
    main component (the largest of its class in a case): a labelled speck would make the first two useless. None is
    more than that half, or the next patient's smaller organ would go as a whole.

    Args:
        volumes_ml: of each case, the volumes of each class's labelled components.
    """
    found = [sizes for case in volumes_ml for sizes in case.values() if len(sizes)]
    limits: set[float] = set()
    if found:
        smallest, main = min(map(min, found)), min(map(max, found))
        volumes = (smallest / 2, smallest, main / 10, main / 2)
        limits = {_floor(volume) for volume in volumes if volume <= main / 2}
    return [
        Cleaning(),
        *(Cleaning(min_component_ml=limit) for limit in sorted(limits)),
        Cleaning(largest_foreground=True),
        Cleaning(largest_component=True),
        Cleaning(largest_foreground=True, largest_component=True),
    ]


def pick(dice: np.ndarray) -> int:
    """Number of the candidate to take: the best in the mean, if it is better than the first by more than `MARGIN`.

    Candidates that lower the mean of any class by more than that are out; of equals the first is taken.

    Args:
        dice: `[candidate, case, class]`; the first candidate removes nothing.
    """
    per_class = dice.mean(axis=1)
    means = per_class.mean(axis=1)
    best = 0
    for number in range(1, len(dice)):
        harmless = bool((per_class[number] >= per_class[0] - MARGIN - _ROUNDING).all())
        if harmless and means[number] > max(means[0] + MARGIN, means[best]) + _ROUNDING:
            best = number
    return best


def make_choice(
    candidates: Sequence[Cleaning], dice: np.ndarray, classes: Sequence[str], *, weights_sha256: str
) -> Choice:
    """Pick a candidate and record what all of them scored; `dice` as for `pick`."""
    per_class = dice.mean(axis=1)
    scored = [
        Candidate(
            **candidate.model_dump(),
            dice=float(row.mean()),
            dice_per_class=dict(zip(classes, row.tolist(), strict=True)),
        )
        for candidate, row in zip(candidates, per_class, strict=True)
    ]
    return Choice(
        **candidates[pick(dice)].model_dump(),
        num_cases=dice.shape[1],
        weights_sha256=weights_sha256,
        candidates=tuple(scored),
    )


def write_choice(run_dir: RunDir, choice: Choice) -> None:
    write_json(run_dir.postprocessing, choice.model_dump(mode="json"))


def read_choice(run_dir: RunDir) -> Choice | None:
    """Read a run's choice, if one was made.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return Choice.model_validate_json(run_dir.postprocessing.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir.postprocessing} is damaged ({' '.join(str(error).split())[:80]}); remove it, or choose again with: {_command(run_dir)}"
        ) from None


def cleaning_of(
    run_dir: RunDir,
    settings: InferenceConfig,
    *,
    largest: bool | None = None,
    min_ml: float | None = None,
    num_runs: int = 1,
) -> tuple[Cleaning, str]:
    """How a run's masks are cleaned, and a line that says where that comes from if nobody asked for it.

    Args:
        settings: the run's own.
        largest: what the user asks for; either of the two puts postprocessing.json aside.
        num_runs: members of the ensemble of which this run is the first; its choice holds for all.

    Raises:
        CheckpointError: postprocessing.json is damaged.
    """
    # Who asks for all components asks for small ones and for those far from the others too.
    asked = {
        "largest_foreground": None if largest is None else False,
        "largest_component": largest,
        "min_component_ml": 0.0 if largest is False and min_ml is None else min_ml,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    own = Cleaning.of(settings)
    if given:
        return own.model_copy(update=given), ""
    if own.removes:
        return own, f"{own.words}, as the run's own settings say ({run_dir.config}: inference)"
    choice = read_choice(run_dir)
    if choice is None:
        return own, ""
    if choice.weights_sha256 != run_dir.weights_sha256():
        return (
            own,
            f"{run_dir.postprocessing} was chosen with other weights and is not used; choose again with: {_command(run_dir)}",
        )
    first = "; the first run's choice holds for all" if num_runs > 1 else ""
    return (
        Cleaning.of(choice),
        f"{choice.words}, as chosen on {choice.num_cases} validation cases ({run_dir.postprocessing}{first})",
    )


def _command(run_dir: RunDir) -> str:
    return command("evaluate", run_dir.path, "--split", "validation", "--choose-cleaning")


def _floor(volume: float) -> float:
    """Three digits, rounded down, so that a component of just this volume stays."""
    step = 10.0 ** (math.floor(math.log10(volume)) - 2)
    return float(f"{math.floor(volume / step + _ROUNDING) * step:.6g}")
