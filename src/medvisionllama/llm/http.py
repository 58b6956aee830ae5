"""Byte ranges over HTTP: only what is asked for, checked against the server's own words, resumed if cut off.

A range is asked for together with the version of the file (`ETag` or `Last-Modified`), so that two versions are
never put together. A server that answers with the whole file is left at once.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from medvisionllama import _http
from medvisionllama._http import PIECE, TIMEOUT_S, Again
from medvisionllama.errors import BlockError
from medvisionllama.llm.ranges import Range, merged
from medvisionllama.progress import Progress

if TYPE_CHECKING:
    from requests import Response
    from requests.auth import AuthBase

T = TypeVar("T")
_FIRST = 1 << 16
"""Bytes of a file that are read before anything is known of it: most headers fit."""
_GAP = 1 << 12
"""Bytes between two ranges that cost less than a further request; the header before a pickle's array has fewer."""
_MAX_SMALL_FILE = 100_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")


class InterruptedFetchError(BlockError):
    """The connection was lost; what came so far is kept, and the next fetch goes on from there."""


class Repository:
    """A repository of the Hub, or of any web server with the same addresses."""

    def __init__(
        self, repo: str, revision: str, *, commit: str | None, parts: Path, progress: Progress
    ) -> None:
        self.repo = repo
        self.commit = commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None
        """What the revision meant when the first file came; later files come from there too."""
        self.parts = parts
        """Where ranges lie until all of them are there."""
        self.progress = progress
        self._revision = revision
        self._endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.host = _host(self._endpoint)
        self._session = _http.new_session()
        self._auth = _bearer(_token())

    def close(self) -> None:
        self._session.close()

    def small_file(self, file: str) -> bytes | None:
        """Get a file whole; None if it is not there.

        Raises:
            BlockError: no access, no connection, or a file that is not small.
        """

        def attempt() -> bytes | None:
            with self.get(file, {}) as response:
                if response.status_code == 404:
                    return None
                content = bytearray()
                for piece in response.iter_content(PIECE):
                    content.extend(piece)
                    if len(content) > _MAX_SMALL_FILE:
                        raise BlockError(
                            f"{self.repo}/{file} on {self.host} is larger than {_MAX_SMALL_FILE // 10**6} MB, too large for what its name says; nothing was kept"
                        )
                return bytes(content)

        return self.tries(attempt, file)

    def open(self, file: str) -> "RemoteFile | None":
        """Open a file for reading in parts; None if it is not there."""
        remote = RemoteFile(self, file)
        return remote if remote.begin() else None

    def get(self, file: str, headers: dict[str, str]) -> "Response":
        """Ask once; the caller looks at 200, 206, 404 and 416, everything else is an error."""
        address = f"{self._endpoint}/{self.repo}/resolve/{quote(self.commit or self._revision, safe='')}/{quote(file)}"
        # `requests` does not take the token along when it is sent to another host.
        response = self._session.get(
            address, headers=headers, auth=self._auth, stream=True, timeout=TIMEOUT_S
        )
        status = response.status_code
        if status in {200, 206, 404, 416}:
            self._note_commit(response)
            return response
        response.close()
        if status in {401, 403}:
            raise BlockError(
                f"{self.repo} on {self.host} is gated, private or absent (status {status}); accept its licence on {self._page()} and set HF_TOKEN to your access token"
            )
        if status in {408, 429} or status >= 500:
            raise Again(f"status {status}")
        raise BlockError(
            f"{self.host} answered {file} of {self.repo} with status {status}; check HF_ENDPOINT"
        )

    def tries(self, attempt: Callable[[], T], file: str, *, done: Callable[[], int] = lambda: 0) -> T:
        """Repeat `attempt` while the connection fails and a few waits have not helped."""
        return _http.tries(
            attempt,
            lost=lambda cause: InterruptedFetchError(
                f"the connection to {self.host} failed while {file} of {self.repo} was fetched ({cause}); check the network, proxy or HF_ENDPOINT and run the same command again: it goes on where it stopped"
            ),
            unusable=lambda reason: BlockError(
                f"{self.host} cannot be asked for {file} of {self.repo} ({reason}); check HF_ENDPOINT and HF_TOKEN"
            ),
            done=done,
        )

    def _page(self) -> str:
        scheme, _, _ = self._endpoint.partition("://")
        return f"{scheme}://{self.host}/{self.repo}"

    def _note_commit(self, response: "Response") -> None:
        for answer in (*response.history, response):
            commit = answer.headers.get("X-Repo-Commit", "")
            if not self.commit and _COMMIT.fullmatch(commit):
                self.commit = commit


class RemoteFile:
    """A file on the server."""

    advice = "nothing was kept; try another revision or tell the owner of the repository"

    def __init__(self, repository: Repository, file: str) -> None:
        self.name = f"{repository.repo}/{file} on {repository.host}"
        self.size = 0
        self._repository = repository
        self._file = file
        self._first = b""
        self._version = ""
        self._validator = ""
        self._parts: list[tuple[Range, Path]] = []

    def begin(self) -> bool:
        """Read the first bytes, and with them size and version; False if there is no such file."""

        def attempt() -> bool:
            with self._repository.get(self._file, {"Range": f"bytes=0-{_FIRST - 1}"}) as response:
                if response.status_code == 404:
                    return False
                if response.status_code == 416:  # an empty file has no first byte
                    return True
                start, end, self.size = self._content_range(response)
                self._version, self._validator = _http.version_of(response)
                if start != 0 or end != min(_FIRST, self.size):
                    raise self._nonsense(f"bytes {start} to {end} instead of the first {_FIRST}")
                self._first = self._exactly(response, end)
                return True

        return self._repository.tries(attempt, self._file)

    def read_into(self, buffer: memoryview, start: int) -> None:
        end = start + len(buffer)
        if end <= len(self._first):
            buffer[:] = self._first[start:end]
            return
        for (first, last), path in self._parts:
            if first <= start and end <= last:
                with path.open("rb", buffering=0) as part:
                    part.seek(start - first)
                    while buffer:
                        if not (size := part.readinto(buffer)):
                            raise self._changed()
                        buffer = buffer[size:]
                return
        place = 0

        def take(piece: bytes) -> None:
            nonlocal place
            buffer[place : place + len(piece)] = piece
            place += len(piece)

        self._copy(lambda: start + place, end, take)

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Bring ranges here, into files that a later fetch goes on with."""
        needed = [item for item in merged(ranges, gap=_GAP) if item[1] > len(self._first)]
        parts = self._repository.parts
        # Without a version nobody knows whether a part found here still belongs to the file.
        version = hashlib.sha256((self._version or secrets.token_hex()).encode()).hexdigest()[:16]
        for stale in parts.glob(f"{self._file}-*.part"):
            if not stale.name.startswith(f"{self._file}-{version}-"):
                stale.unlink()
        total = sum(end - start for start, end in needed)
        if not total:
            return
        parts.mkdir(parents=True, exist_ok=True)
        before = 0
        with self._repository.progress.track(f"{self._repository.repo}/{self._file}", total) as advance:
            for start, end in needed:
                path = parts / f"{self._file}-{version}-{start}-{end}.part"
                self._bring(path, start, end, lambda here, before=before: advance(before + here))  # type: ignore[misc]
                self._parts.append(((start, end), path))
                before += end - start

    def _bring(self, path: Path, start: int, end: int, report: Callable[[int], None]) -> None:
        path.touch()
        # Not to append: two who bring the same bytes, where nothing is locked, then write them to the same places.
        with path.open("r+b") as part:
            here = part.seek(0, os.SEEK_END)
            if here > end - start:
                here = part.truncate(part.seek(0))

            def take(piece: bytes) -> None:
                nonlocal here
                part.seek(here)
                part.write(piece)
                part.flush()
                here += len(piece)
                report(here)

            self._copy(lambda: start + here, end, take)

    def _copy(self, place: Callable[[], int], end: int, take: Callable[[bytes], None]) -> None:
        """Hand the bytes from `place()` to `end` to `take`, which moves the place; reconnect as needed."""

        def attempt() -> None:
            if place() == end:
                return
            headers = {"Range": f"bytes={place()}-{end - 1}"}
            if self._validator:
                headers["If-Range"] = self._validator
            with self._repository.get(self._file, headers) as response:
                first, last, size = self._content_range(response)
                version, _ = _http.version_of(response)
                if size != self.size or version != self._version:
                    raise self._changed()
                if (first, last) != (place(), end):
                    raise self._nonsense(f"bytes {first} to {last} instead of {place()} to {end}")
                for piece in response.iter_content(PIECE):
                    if place() + len(piece) > end:
                        raise self._nonsense("more bytes than it announced")
                    take(piece)
            if place() != end:
                raise Again("the answer ended early")

        self._repository.tries(attempt, self._file, done=place)

    def _content_range(self, response: "Response") -> tuple[int, int, int]:
        """First byte, byte after the last, and size of the file; refuses an answer that is no range."""
        if response.status_code == 404:
            raise self._changed()
        if response.status_code == 200 and self._first:
            raise self._changed()  # it did send ranges, and If-Range makes it send a new version whole
        answered = _http.content_range(response)
        if answered is None:
            raise BlockError(
                f"{self._repository.host} ignores the byte ranges asked of {self._file}, so the whole file would have to be fetched; nothing was kept. Download {self._repository.repo} with a tool of your choice and give its folder"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._nonsense("a compressed range")
        return answered

    def _exactly(self, response: "Response", count: int) -> bytes:
        content = bytearray()
        for piece in response.iter_content(PIECE):
            content.extend(piece)
            if len(content) > count:
                raise self._nonsense("more bytes than it announced")
        if len(content) != count:
            raise Again("the answer ended early")
        return bytes(content)

    def _changed(self) -> BlockError:
        return BlockError(
            f"{self.name} changed while it was being read; nothing was kept, run the same command again"
        )

    def _nonsense(self, what: str) -> BlockError:
        return BlockError(
            f"{self._repository.host} sent {what} of {self._file}; nothing was kept, check HF_ENDPOINT and proxies"
        )


def _host(endpoint: str) -> str:
    """Host and port, without the name and password that an address may carry.

    Raises:
        BlockError: no address of a web server.
    """
    host = _http.host_of(endpoint)
    if host is None:
        raise BlockError(
            "HF_ENDPOINT is no address of a web server; check HF_ENDPOINT, or unset it for the Hub"
        )
    return host


def _bearer(token: str | None) -> "AuthBase | None":
    from requests.auth import AuthBase

    class Bearer(AuthBase):
        """Set by hand, so that a password in ~/.netrc does not take the token's place."""

        def __call__(self, request):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
            request.headers["Authorization"] = f"Bearer {token}"
            return request

    return Bearer() if token else None


def _token() -> str | None:
    from huggingface_hub import get_token

    token = os.environ.get("HF_TOKEN", "").strip() or get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise BlockError(
            "HF_TOKEN holds blanks or letters that no token has; copy it again from your account"
        )
    return token
