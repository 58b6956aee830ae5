"""Low-rank updates inside a frozen block, by PEFT."""

from collections.abc import Sequence

from torch import nn

from medvisionllama.errors import BlockError
from medvisionllama.llm.families import Family


def add_lora(layers: nn.Module, *, rank: int, targets: Sequence[str], family: Family) -> None:
    """Add a trainable rank-`rank` update to the named projections, in place; it starts at zero.

    Args:
        targets: by default query and value.

    Raises:
        BlockError: a target that the family does not have.
    """
    unknown = sorted(set(targets) - set(family.lora_targets))
    if unknown:
        raise BlockError(
            f"LoRA cannot act on {unknown[0]!r}; projections of {family.name}: {', '.join(family.lora_targets)}"
        )
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(targets or family.lora_default),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.modules()),
    )
    inject_adapter_in_model(settings, layers)
    for name, parameter in layers.named_parameters():
        # PEFT takes the layer's own type, and small steps vanish in bfloat16.
        if ".lora_" in name:
            parameter.data = parameter.data.float()
