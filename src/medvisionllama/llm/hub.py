"""Models of the Hugging Face Hub: of a checkpoint, only the byte ranges of the tensors asked for are fetched.

A repository that huggingface_hub or transformers has downloaded whole is read where it lies, without a request.
Otherwise addresses are those of the Hub, `HF_ENDPOINT/organisation/name/resolve/revision/file`, and nothing but GET
requests for ranges is needed, so a mirror may be a plain web server. Environment variables are read at each fetch.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from medvisionllama._http import is_offline
from medvisionllama.errors import BlockError
from medvisionllama.llm.cache import CONFIG, TOKENIZER, BlockCache, one_at_a_time
from medvisionllama.llm.catalog import CatalogEntry
from medvisionllama.llm.fetched import FetchedSource
from medvisionllama.llm.folder import FolderPlace
from medvisionllama.llm.http import InterruptedFetchError, Repository
from medvisionllama.llm.ranges import ByteSource
from medvisionllama.llm.reader import CheckpointReader, read_settings
from medvisionllama.llm.sources import Source
from medvisionllama.progress import Progress, Silent


class HubPlace:
    """A repository's files; small ones are fetched once, and not at all if they are kept."""

    advice = "nothing was kept; check the name and the revision"

    def __init__(self, repository: Repository, cache: BlockCache) -> None:
        self.name = f"{repository.repo} on {repository.host}"
        self._repository = repository
        self._contents: dict[str, bytes | None] = {CONFIG: cache.content(CONFIG)} if cache.has(CONFIG) else {}

    def weight_files(self) -> list[tuple[str, ...]]:
        return [
            ("model.safetensors.index.json",),
            ("model.safetensors",),
            ("pytorch_model.bin.index.json",),
            ("pytorch_model.bin",),
        ]

    def open(self, file: str) -> ByteSource | None:
        return self._repository.open(file)

    def content(self, file: str) -> bytes | None:
        if file not in self._contents:
            self._contents[file] = self._repository.small_file(file)
        return self._contents[file]


class _Downloaded(FolderPlace):
    """What another program has downloaded; for a tokenizer that it left out somebody else is asked."""

    def __init__(self, folder: Path, ask: Callable[[], bytes | None]) -> None:
        super().__init__(folder)
        self._ask = ask

    def content(self, file: str) -> bytes | None:
        found = super().content(file)
        # Other files of words may do, and what does must not depend on the network of the moment.
        others = any((self.folder / name).is_file() for name in ("vocab.json", "vocab.txt"))
        return self._ask() if found is None and file == TOKENIZER and not others else found


class _Kept:
    """The small files in the cache."""

    advice = "delete its folder and fetch the block again"

    def __init__(self, cache: BlockCache) -> None:
        self.name = str(cache.folder)
        self._cache = cache

    def content(self, file: str) -> bytes | None:
        return self._cache.content(file) if self._cache.has(file) else None


def hub_source(
    identifier: str,
    *,
    entry: CatalogEntry | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> FetchedSource:
    """Open `organisation/name` or `organisation/name@revision`.

    Args:
        entry: the catalogue's, whose settings then need no network.

    Raises:
        BlockError: the configuration is not in the cache and cannot be fetched.
    """
    repo, _, revision = identifier.partition("@")
    revision = revision or "main"
    cache = cache_of(repo, revision)
    downloaded = _downloaded(repo, revision)

    @contextmanager
    def place() -> Iterator[HubPlace]:
        parts = cache.folder / "parts"
        repository = Repository(
            repo,
            revision,
            commit=cache.noted("commit") or (downloaded.name if downloaded else None),
            parts=parts,
            progress=progress or Silent(),
        )
        try:
            yield HubPlace(repository, cache)
            cache.note(repository=repo, revision=revision, commit=repository.commit)
            _delete(parts)
        except (InterruptedFetchError, OSError):
            raise  # what came so far stays
        except Exception:
            _delete(parts)
            raise
        finally:
            repository.close()

    def tokenizer_of_repository() -> bytes | None:
        if is_offline(offline):
            return None
        with place() as files:
            return files.content(TOKENIZER)

    @contextmanager
    def opened() -> Iterator[Source]:
        if downloaded:
            yield CheckpointReader(_Downloaded(downloaded, tokenizer_of_repository), name=identifier)
            cache.note(repository=repo, revision=revision, commit=downloaded.name)
            return
        with place() as files:
            yield CheckpointReader(files, name=identifier)

    if entry is None and not cache.has(CONFIG):
        if downloaded:
            cache.keep(CONFIG, (downloaded / CONFIG).read_bytes())
        elif is_offline(offline):
            raise BlockError(
                f"{identifier} is not in the cache and downloads are off; run `medvisionllama llm pull {identifier}` while online"
            )
        else:
            with one_at_a_time():
                try:
                    with place() as files:
                        read_settings(files)
                        cache.keep(CONFIG, files.content(CONFIG) or b"")
                finally:
                    cache.tidy()
    return FetchedSource(
        entry.name if entry else identifier,
        entry.settings if entry else read_settings(_Kept(cache)),
        cache,
        opened=opened,
        offline=False if downloaded else offline,
        checkpoint_bytes=entry.checkpoint_bytes if entry else None,
    )


def cache_of(repo: str, revision: str = "main") -> BlockCache:
    """Where the pieces of a repository are kept."""
    return BlockCache("hub", repo.replace("/", "--"), quote(revision, safe=""))


def _downloaded(repo: str, revision: str) -> Path | None:
    """The folder of a repository that another program has downloaded with all its weights."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, CONFIG, revision=revision)
    except HFValidationError:
        raise BlockError(
            f"{repo!r:.120} is no name of a repository on the Hub; it is organisation/name, of letters, digits, '-', '_' and '.'"
        ) from None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        return folder if CheckpointReader(FolderPlace(folder), name=repo).is_whole() else None
    except BlockError:
        return None


def _delete(parts: Path) -> None:
    shutil.rmtree(parts, ignore_errors=True)
