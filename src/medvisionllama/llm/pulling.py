"""`pull`: layers of a checkpoint into the user's cache, and nothing else of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medvisionllama.errors import BlockError
from medvisionllama.llm.block import FrozenBlock
from medvisionllama.llm.cache import layer_file, one_at_a_time
from medvisionllama.llm.families import family_of
from medvisionllama.llm.fetched import FetchedSource
from medvisionllama.llm.sources import open_source, resolve_layers
from medvisionllama.progress import Progress


@dataclass(frozen=True)
class Pulled:
    """Layers that are in the cache now."""

    name: str
    layers: tuple[int, ...]
    """From the front."""
    folder: Path
    sha256: str
    """Of the block, as manifests of runs have it."""


def pull(
    source: str,
    *,
    layers: Sequence[int] = (-1,),
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch layers of a checkpoint, only their bytes; an interrupted download goes on where it stopped.

    Args:
        source: a name of the catalogue, or `organisation/name`, also with `@revision`, on the Hub.
        layers: negative ones are counted from the back.
        sha256: of the block; any other is refused, and what was fetched for it is not kept.

    Raises:
        BlockError: no such source or layer, one that is a folder or file of this machine, a checksum that differs,
            or layers that are not here while nothing may be fetched.

    >>> pull("smollm2-135m").layers  # doctest: +SKIP
    (29,)
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BlockError(f"--sha256 {sha256[:80]!r} is no checksum; it has 64 digits from 0 to f")
    opened = open_source(source, progress=progress)
    if not isinstance(opened, FetchedSource):
        raise BlockError(f"{source} is on this machine already; use it as network.block.source={source}")
    family = family_of(opened.settings["model_type"])
    config = family.make_config(opened.settings)
    positions = resolve_layers(layers, config.num_hidden_layers)
    kept_before = set(opened.cache.layers())
    opened.layer_tensors(positions, family)
    found = FrozenBlock.from_pretrained(source, layers=positions).sha256()
    if sha256 is not None and found != sha256.lower():
        fetched_now = set(positions) - kept_before
        with one_at_a_time():
            for position in fetched_now:
                opened.cache.forget(layer_file(position))
            if not opened.cache.layers():
                opened.cache.clear()
        fate = "was not kept" if fetched_now else f"stays in {opened.cache.folder} from before"
        raise BlockError(
            f"the block of {source} has sha256 {found}, expected was {sha256}; it {fate}, check --layers, the revision and the source"
        )
    return Pulled(opened.name, tuple(positions), opened.cache.folder, found)
