"""Controls of equal size: how wide an MLP, or how many more blocks, weigh as much as another arm's insert.

Each number of `Sizes` grows by the same amount with each hidden channel of the MLP and with each transformer block,
so two networks tell all others, however large, and nothing is searched.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from medvisionllama.errors import ConfigError
from medvisionllama.networks.layers import hidden_width
from medvisionllama.networks.sizes import Sizes
from medvisionllama.types import SizeCriterion

_WORDS = {"trainable": "trainable parameters", "total": "parameters", "flops": "FLOPs"}


@dataclass(frozen=True)
class Match:
    """A control, and how near it comes."""

    settings: dict[str, Any]
    """Dotted settings that make the network this control."""
    sizes: Sizes
    ratio: float
    """The control's number divided by the target's; 1 is a perfect match."""


def wider(target: Sizes, sizes_at: Callable[[int], Sizes], *, by: SizeCriterion, width: int) -> Match:
    """Find the MLP insert.

    Args:
        sizes_at: sizes of the network by the number of hidden channels of its MLP.
        width: of the tokens.

    Raises:
        ConfigError: one hidden channel is too many.
    """
    first, second = sizes_at(1), sizes_at(2)
    steps = _nearest(target, first, second, by)
    if steps < 0:
        raise _impossible("MLP insert", "with one hidden channel", target, first, by)
    settings = {"network.insert": "mlp", "network.insert_mlp_ratio": ratio_for(width, 1 + steps)}
    return _match(settings, target, first, second, steps, by)


def deeper(target: Sizes, sizes_at: Callable[[int], Sizes], *, by: SizeCriterion, depth: int) -> Match:
    """Find the depth; at least one block is added, or the control would be the network without an insert.

    Args:
        sizes_at: sizes of the network without an insert by its depth.
        depth: of the network with the insert.

    Raises:
        ConfigError: the network is as large without another block.
    """
    first, second = sizes_at(depth), sizes_at(depth + 1)
    if measure(target, by) <= measure(first, by):
        raise _impossible("depth", "without an insert", target, first, by)
    steps = max(1, _nearest(target, first, second, by))
    settings = {"network.insert": "none", "network.depth": depth + steps}
    return _match(settings, target, first, second, steps, by)


def measure(sizes: Sizes, by: SizeCriterion) -> int:
    """Return the number that is matched."""
    return sizes.flops_forward if by == "flops" else int(getattr(sizes, by))


def ratio_for(width: int, hidden: int) -> float:
    """Return a short ratio that gives an MLP exactly so many hidden channels.

    >>> ratio_for(192, 577)
    3.01
    """
    # A plain quotient may fall just below, and would lose a channel.
    for digits in range(1, 16):
        ratio = math.ceil(hidden * 10**digits / width) / 10**digits
        if hidden_width(width, ratio) == hidden:
            return ratio
    raise AssertionError("sixteen digits name any width")


def _nearest(target: Sizes, first: Sizes, second: Sizes, by: SizeCriterion) -> int:
    step = measure(second, by) - measure(first, by)
    return math.floor((measure(target, by) - measure(first, by)) / step + 0.5)


def _match(
    settings: dict[str, Any], target: Sizes, first: Sizes, second: Sizes, steps: int, by: SizeCriterion
) -> Match:
    pairs = zip(astuple(first), astuple(second), strict=True)
    reached = Sizes(*(start + steps * (after - start) for start, after in pairs))
    return Match(settings, reached, measure(reached, by) / measure(target, by))


def _impossible(what: str, smallest: str, target: Sizes, first: Sizes, by: SizeCriterion) -> ConfigError:
    return ConfigError(
        f"no {what} matches the target's {measure(target, by):,} {_WORDS[by]}: {smallest} the network has {measure(first, by):,}; match by another criterion, or a larger target"
    )
