"""What this process may use of its machine."""

import os

import psutil

_MOST_SCANS = 4
_BYTES_A_SCAN = 4 << 30
"""A large CT and a label of floating-point numbers, with the copies that are made of them."""


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def scans_at_once() -> int:
    """Scans to read side by side: no more than cores, and one for each 4 GiB of memory."""
    most = min(_MOST_SCANS, len(available_cores()))
    return max(1, min(most, psutil.virtual_memory().total // _BYTES_A_SCAN))
