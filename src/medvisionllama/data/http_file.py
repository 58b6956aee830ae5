"""One file over HTTP into a folder, going on where an earlier process stopped.

    archive.part  what has come so far      archive.json  which version of which address it is a part of

The first request asks for the whole file, so a server that knows no ranges will do. The rest is asked for only if
the server told its version, and the answer has to be of the same one.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from medvisionllama import _http
from medvisionllama._files import write_json
from medvisionllama.errors import DataError
from medvisionllama.progress import Progress

if TYPE_CHECKING:
    from requests import Response

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class InterruptedDownloadError(DataError):
    """The connection was lost; what came so far is kept, and the next download goes on from there."""


class HttpFile:
    """A file on a server, and the part of it that is here."""

    def __init__(self, url: str, folder: Path, *, plain_http: bool, progress: Progress) -> None:
        self.part = folder / "archive.part"
        self._note = folder / "archive.json"
        self._url = url
        self._plain_http = plain_http
        """Whether http without encryption will do, since a checksum says what has to come."""
        self._progress = progress
        self._host = _http.host_of(url) or "the server"
        self._file = Path(urlsplit(url).path).name
        self._size = 0

    def fetch(self, check_room: Callable[[int, int], None]) -> Path:
        """Bring the file here and return its path.

        Args:
            check_room: called with the file's size and the bytes still to come before they come; may raise.

        Raises:
            InterruptedDownloadError: the connection failed for good.
            DataError: no such file, no access, or nonsense from the server.
        """
        with _http.new_session() as session:

            def attempt() -> None:
                # The second time from the start, if the server has another version now, or will not send the rest.
                if not self._ask(session.get, check_room, resume=True):
                    self._ask(session.get, check_room, resume=False)

            _http.tries(
                attempt,
                lost=lambda cause: InterruptedDownloadError(
                    f"the connection to {self._host} failed while {self._file} was fetched ({cause}); check the network and run the same command again: it goes on where it stopped"
                ),
                unusable=lambda reason: DataError(
                    f"{self._host} cannot be asked for {self._file} ({reason}); check the address"
                ),
                done=self._here,
            )
        return self.part

    def discard(self) -> None:
        """Delete what has come."""
        self.part.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def _here(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _ask(
        self, get: Callable[..., "Response"], check_room: Callable[[int, int], None], *, resume: bool
    ) -> bool:
        """Ask once and take what comes; False if the answer does not go on from what is here."""
        noted, here = self._noted(), self._here()
        going_on = resume and here > 0 and bool(noted.get("validator"))
        if going_on:
            self._size = noted["size"]
            if here == self._size:
                return True
        headers = (
            {"Range": f"bytes={here}-{self._size - 1}", "If-Range": noted["validator"]} if going_on else {}
        )
        with get(self._url, headers=headers, stream=True, timeout=_http.TIMEOUT_S) as response:
            self._check_answer(response)
            if response.status_code == 200:
                if going_on:
                    self._progress.say(
                        f"{self._host} has another version of {self._file} now, or sends no parts; starting again"
                    )
                self._begin(response)
            elif not going_on:
                raise self._nonsense(f"status {response.status_code} to a request for all of")
            elif (
                response.status_code == 416
                or _http.content_range(response) != (here, self._size, self._size)
                or _http.version_of(response)[0] != noted["version"]
            ):
                self._progress.say(f"{self._file} has changed on {self._host}; starting again")
                return False
            self._take(response, check_room)
        if self._here() != self._size:
            raise _http.Again("the answer ended early")
        return True

    def _check_answer(self, response: "Response") -> None:
        status = response.status_code
        hops = [urlsplit(answer.url) for answer in (*response.history, response)]
        if not self._plain_http and any(h.scheme != "https" and h.hostname not in _LOOPBACK for h in hops):
            raise DataError(
                f"{self._host} leads to http without encryption, where anybody on the way can change {self._file}; use https, or give --sha256"
            )
        if status in {401, 403}:
            raise DataError(
                f"{self._host} does not give {self._file} to everybody (status {status}); check the address, or fetch it with a browser"
            )
        if status in {404, 410}:
            raise DataError(
                f"{self._file} is not on {self._host} (status {status}); check the address or --mirror"
            )
        if status in {408, 429} or status >= 500:
            raise _http.Again(f"status {status}")
        if status not in {200, 206, 416}:
            raise DataError(f"{self._host} answered with status {status}; check the address or --mirror")

    def _begin(self, response: "Response") -> None:
        """Note which version comes now, and drop what has come of another one."""
        self.discard()
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal() or response.headers.get("Content-Encoding", "identity") != "identity":
            raise DataError(
                f"{self._host} does not say how large {self._file} is, so nobody could tell when it is whole; use another mirror"
            )
        self._size = int(length)
        version, validator = _http.version_of(response)
        write_json(
            self._note,
            {"url": self._key(), "size": self._size, "version": version, "validator": validator},
        )

    def _take(self, response: "Response", check_room: Callable[[int, int], None]) -> None:
        check_room(self._size, self._size - self._here())
        with (
            self.part.open("ab") as part,
            self._progress.track(f"fetching {self._file}", max(self._size, 1)) as advance,
        ):
            place = part.tell()
            for piece in response.iter_content(_http.PIECE):
                place += len(piece)
                if place > self._size:
                    raise self._nonsense("more bytes than it announced of")
                part.write(piece)
                advance(place)

    def _noted(self) -> dict[str, Any]:
        try:
            noted = json.loads(self._note.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(noted, dict) or noted.get("url") != self._key():
            return {}
        whole = isinstance(noted.get("size"), int) and self._here() <= noted["size"]
        texts = all(isinstance(noted.get(key), str) for key in ("version", "validator"))
        return noted if whole and texts else {}

    def _key(self) -> str:
        # Not the address itself, which may carry a password.
        return hashlib.sha256(self._url.encode()).hexdigest()

    def _nonsense(self, what: str) -> DataError:
        self.discard()
        return DataError(
            f"{self._host} sent {what} {self._file}; nothing was kept, check the address and proxies"
        )


def check_address(url: str, *, plain_http: bool) -> None:
    """Refuse what is no web address, and http to another machine unless a checksum says what has to come.

    Raises:
        DataError: such an address.
    """
    host = _http.host_of(url)
    if host is None:
        raise DataError(f"{_http.short(url)!r} is no web address; write https://host/name.tar")
    if urlsplit(url).scheme == "http" and urlsplit(url).hostname not in _LOOPBACK and not plain_http:
        raise DataError(
            f"http://{host} is not encrypted, and anybody on the way can change the archive; use https, or give --sha256"
        )
