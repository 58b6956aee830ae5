"""When a run does what: the share of it that is over, its validations, its rounds of masks, its end.

Nothing here looks at a clock or at a network. `LoopState` says where a run is, `Timetable` what is due there under
the limits in force now, which a run that goes on may have changed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from medvisionllama.config import TrainConfig
from medvisionllama.run_dir import kept_of

_MOST_VALIDATION = 0.25
"""Share of a run's minutes that all of its validations may take; if they would, the last one alone is made."""
_MOST_RESERVED = 0.5
"""Share of what is left of the minutes that is kept free for that last one, however long it takes."""
MOST_MASKS = 0.25
"""Share of the minutes that all rounds of masks for scans without labels may take."""


@dataclass
class LoopState:
    """Where a run is; everything else follows from it and the weights."""

    step: int = 0
    elapsed_seconds: float = 0.0
    begun_seconds: float = 0.0
    """Of them, those that preparing the scans took."""
    validation_seconds: float = 0.0
    """Length of the longest validation, kept free at the end of a limited run. It only grows: a shorter one would
    set the run back behind the mark that it has just passed."""
    would_take_seconds: float = 0.0
    """Length of a validation that was given up, as it would have taken too long."""
    validated_step: int = 0
    validated_seconds: float = 0.0
    dices: list[float] = field(default_factory=list)
    pseudo_round: int = 0
    """Of masks that unlabelled scans train with; before the first there are none."""
    pseudo_step: int = 0
    pseudo_seconds: float = 0.0
    """When that round was due."""
    loss_sum: float = 0.0
    """Of the steps since the last validation."""

    @property
    def kept(self) -> float | None:
        """Validation Dice of the weights that are kept; None before the first one, and where no case validates."""
        return self.dices[kept_of(self.dices)] if self.dices else None

    @property
    def keeps_last(self) -> bool:
        """Whether the weights of the last validation are those that are kept, as where no case validates."""
        return not self.dices or kept_of(self.dices) == len(self.dices) - 1


@dataclass
class Timetable:
    """What is due in a run, by its limits and by where it is."""

    config: TrainConfig
    total_steps: int | None
    """Optimiser steps of a run limited by epochs or steps."""
    state: LoopState = field(default_factory=LoopState)

    @property
    def progress(self) -> float:
        """Share of the run that is over."""
        return self._progress_at(self.state.step, self.state.elapsed_seconds)

    @property
    def training_progress(self) -> float:
        """Share of the training that is over, which begins when the scans are prepared: what schedules go by."""
        begun = self._progress_at(0, self.state.begun_seconds)
        return 1.0 if begun >= 1.0 else max(0.0, (self.progress - begun) / (1.0 - begun))

    @property
    def is_over(self) -> bool:
        """True of a run that has nothing left to do: its last step, too, has been validated."""
        return self.progress >= 1.0 and self.state.validated_step == self.state.step > 0

    @property
    def validation_patience(self) -> float | None:
        """Seconds that the next validation may take; None for the last one, and without a limit by minutes."""
        return self._validation_part if self.progress < 1.0 else None

    @property
    def validates_late(self) -> bool:
        """True of a run that only its end leaves time to validate."""
        return self._validation_part is not None and self.state.would_take_seconds > self._validation_part

    def validation_due(self) -> bool:
        """True when the run has passed another of its evenly spread marks since the last validation.

        Both ends are measured by the limits in force now, so a run that goes on with a longer limit is validated
        on as before. The end is a mark even where nothing is left between it and the last one: a limit may be
        shorter now than what the run had used up before.
        """
        if self.progress >= 1.0:
            return not self.is_over
        number = 1 if self.validates_late else self.config.num_validations
        before = self._progress_at(self.state.validated_step, self.state.validated_seconds)
        return math.floor(self.progress * number + 1e-9) > math.floor(before * number + 1e-9)

    def mask_patience(self, rounds: int) -> float | None:
        """Seconds that each of so many rounds of masks may take; None without a limit by minutes."""
        return self._seconds_each(MOST_MASKS, rounds)

    def masks_due(self, rounds_at: Callable[[float], int]) -> bool:
        """True when scans without labels should have had another round of masks by now.

        Both ends are measured by the limits in force now, as for validations.

        Args:
            rounds_at: rounds that a run should have had at a share of its course.
        """
        before = self._progress_at(self.state.pseudo_step, self.state.pseudo_seconds)
        return rounds_at(self.progress) > rounds_at(before) and self.progress < 1.0

    def begin(self) -> None:
        """Pass the marks that preparing the scans has used up: an untrained network has nothing to show."""
        self.state.begun_seconds = self.state.elapsed_seconds
        self.state.validated_seconds = self.state.pseudo_seconds = self.state.elapsed_seconds

    def validated(self, seconds: float) -> None:
        """Note a validation that ends now and took so long."""
        self.state.validation_seconds = max(self.state.validation_seconds, seconds)
        self.state.validated_step, self.state.validated_seconds = self.state.step, self.state.elapsed_seconds
        self.state.loss_sum = 0.0

    def put_off_validation(self, seconds: float) -> float:
        """Leave validation, which would take so long, to the end; return the seconds kept free for it there.

        Training has the larger part of what is left, or a run would end that has learned nothing.
        """
        assert self.config.max_minutes is not None, "without a limit none takes too long"
        self.state.would_take_seconds = seconds
        left = max(0.0, 60 * self.config.max_minutes - self.state.elapsed_seconds)
        kept = min(seconds, _MOST_RESERVED * left)
        self.state.validation_seconds = max(self.state.validation_seconds, kept)
        return kept

    @property
    def _validation_part(self) -> float | None:
        """Seconds that each of a run's validations may take."""
        return self._seconds_each(_MOST_VALIDATION, self.config.num_validations)

    def _seconds_each(self, share: float, number: int) -> float | None:
        """An even part of a share of the run's minutes; None without a limit by minutes."""
        minutes = self.config.max_minutes
        return None if minutes is None else share * 60 * minutes / number

    def _progress_at(self, step: int, seconds: float) -> float:
        """Share by steps or by time, whichever is further."""
        shares = [0.0]
        if self.total_steps is not None:
            shares.append(step / self.total_steps)
        if self.config.max_minutes is not None:
            limit = 60 * self.config.max_minutes - self.state.validation_seconds
            shares.append(seconds / max(limit, 1e-9))
        return min(1.0, max(shares))


def total_steps(config: TrainConfig, num_cases: int) -> int | None:
    """Optimiser steps of a run limited by epochs or steps; None if time alone limits it."""
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.epochs is not None:
        # Batches go on over the end of a pass, so nothing is left over but of the last one.
        crops = config.epochs * num_cases
        limits.append(max(1, round(crops / (config.batch_size * config.accumulate))))
    return min(limits, default=None)
