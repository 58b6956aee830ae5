"""Which precision autocast asks for, on devices that do not know it too."""

import torch


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return what matrix products run in on a type of device; None outside autocast, and on the meta device."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
