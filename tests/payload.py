"""A pickle that leaves a trace if it is ever opened as code."""

from pathlib import Path


class Payload:
    """Unpickling this creates the file `sentinel`."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.sentinel,)
