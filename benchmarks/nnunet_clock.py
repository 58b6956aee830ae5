"""How far a run of so many seconds is, for nnU-Net's trainer. It knows no package but Python's own."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Clock:
    """Runs from when it is made; planning, preprocessing and training share it."""

    limit: float
    now: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ValueError(f"the limit is {self.limit:g} seconds; give more than 0")
        object.__setattr__(self, "started", self.now())

    @property
    def elapsed(self) -> float:
        return self.now() - self.started

    @property
    def progress(self) -> float:
        """Share of the limit that is over, at most 1."""
        return min(1.0, self.elapsed / self.limit)

    @property
    def is_over(self) -> bool:
        return self.progress >= 1.0

    def part(self, number: int) -> int:
        """Which of so many equal parts of the limit it is in, from 0."""
        return min(number - 1, int(self.progress * number))


def polynomial_rate(initial: float, progress: float, *, exponent: float = 0.9) -> float:
    """nnU-Net's learning rate, with the share of the time in the place of the share of the epochs."""
    return initial * (1.0 - progress) ** exponent
