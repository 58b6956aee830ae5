"""Low-rank updates inside a frozen block, by PEFT."""

from collections.abc import Sequence

from torch import nn

from medvisionllama.errors import BlockError
from medvisionllama.llm.families import Family


def add_lora(layers: nn.Module, *, rank: int, targets: Sequence[str], family: Family) -> None:
    """Add a trainable rank-`rank` update to the named projections, in place; it starts at zero.

    Raises:
        BlockError: a target that the family does not have.
    """
    unknown = sorted(set(targets) - set(family.lora_targets))
    if unknown or not targets:
        given = unknown[0] if unknown else "nothing"
        raise BlockError(
            f"LoRA cannot act on {given!r}; projections of {family.name}: {', '.join(family.lora_targets)}"
        )
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), layers)
