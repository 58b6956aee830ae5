"""Downloads over HTTP, as far as they are the same for everything fetched: tries, versions, and what to say.

`requests` is imported when a connection is opened, not with this module.
"""

import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from medvisionllama.errors import MedVisionLlamaError

if TYPE_CHECKING:
    from requests import Response, Session

T = TypeVar("T")
WAITS_S = (0.5, 1.0, 2.0)
"""Before each further try; a try that brought something does not count."""
TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two pieces of an answer."""
PIECE = 1 << 16
"""Bytes that are lost at most when a connection breaks."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class Again(Exception):  # noqa: N818 - not an error yet
    """The server is busy or ended early; a further try may succeed."""


def new_session() -> "Session":
    """Open a session whose answers come as the bytes that lie on the server."""
    import requests

    session = requests.Session()
    # Compressed answers would have other ranges.
    session.headers["Accept-Encoding"] = "identity"
    return session


def tries(
    attempt: Callable[[], T],
    *,
    lost: Callable[[str], MedVisionLlamaError],
    unusable: Callable[[str], MedVisionLlamaError],
    done: Callable[[], int] = lambda: 0,
) -> T:
    """Repeat `attempt` while the connection fails and a few waits have not helped.

    Args:
        lost: makes the error of a connection that stays broken, from its cause.
        unusable: makes the error of an address that cannot be asked at all.
        done: how much has come; a try that brought something starts the waits anew.
    """
    import requests
    from urllib3.exceptions import HTTPError

    failures, before = 0, done()
    while True:
        try:
            return attempt()
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            Again,
        ) as error:
            reason: Exception = error
        except MedVisionLlamaError:
            raise
        # Addresses, of settings or of a redirect, that are none make urllib3 and urllib raise their own.
        except (requests.RequestException, HTTPError, ValueError) as error:
            raise unusable(short(error)) from None
        if done() > before:
            failures, before = 0, done()
        if failures == len(WAITS_S):
            raise lost(cause(reason)) from None
        time.sleep(WAITS_S[failures])
        failures += 1


def content_range(response: "Response") -> tuple[int, int, int] | None:
    """First byte, byte after the last, and size of the whole file, if an answer is a range and says so."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not match:
        return None
    start, last, size = (int(number) for number in match.groups())
    return start, last + 1, size


def version_of(response: "Response") -> tuple[str, str]:
    """What tells one version of a file from another, and what to send as If-Range.

    The Hub names the content when it redirects; the host that then delivers it may say something else each time.
    """
    for answer in response.history:
        if answer.headers.get("X-Linked-Etag"):
            return answer.headers["X-Linked-Etag"], ""
    tag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    weak = tag.startswith("W/")
    return tag or date, date if weak or not tag else tag


def host_of(address: str) -> str | None:
    """Host and port, without the name and password that an address may carry; None if it is no web address."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or parts.scheme not in {"http", "https"}:
        return None
    return f"{host}:{port}" if port else host


def cause(error: object) -> str:
    """What lies behind an error of `requests`, whose own text repeats the address."""
    found = re.search(r"Caused by (.*)", str(error))
    return short(re.sub(r"<[^>]*>|HTTPS?Connection\([^)]*\):?", "", found[1] if found else str(error)))


def short(error: object) -> str:
    """An error's text on one line, without passwords of addresses."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:120]


def is_offline(offline: bool | None) -> bool:  # noqa: FBT001 - its own name says what it is
    """Whether downloads are off: as the caller says, or as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says now."""
    if offline is not None:
        return offline
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
