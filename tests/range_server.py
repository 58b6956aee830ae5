"""A web server on this machine with the Hub's addresses, which counts what it serves and can misbehave."""

import mmap
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Asked:
    """One request."""

    file: str
    revision: str
    range: str | None
    if_range: str | None
    authorization: str | None
    status: int = 0
    served: int = 0


@dataclass
class RangeServer:
    """What a test sets and reads; files lie in `root`/organisation/name."""

    root: Path
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    ignores_ranges: bool = False
    cut_after: int | None = None
    """Body bytes until every connection breaks, for good."""
    hang_up_once_after: int | None = None
    """Body bytes until one connection breaks."""
    hang_after: int | None = None
    """Body bytes until the answer pauses, for as long as this stays set."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Statuses with which the next requests for a file are refused."""
    redirect_to: str | None = None
    etags: bool = True
    etag_suffix: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    honours_if_range: bool = True
    shift: int = 0
    """Added to the first byte of every answered range."""
    claimed_size: int | str | None = None
    longer: int = 0
    """Bytes that follow every answered range, announced by Content-Length alone."""

    @property
    def served(self) -> int:
        """Body bytes that were sent, of all files."""
        return sum(asked.served for asked in self.asked)

    def of(self, file: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.file == file]


def _mapped(path: Path) -> bytes | mmap.mmap:
    """A file's bytes, of which only those that are served are read: benchmarks serve files of gigabytes."""
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: RangeServer

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        state = self.state
        match = re.fullmatch(
            r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?", self.path
        )
        asked = Asked(
            match["file"] if match else self.path,
            match["revision"] if match else "",
            self.headers["Range"],
            self.headers["If-Range"],
            self.headers["Authorization"],
        )
        state.asked.append(asked)
        if state.cut_after is not None and state.served >= state.cut_after:
            self.close_connection = True
            self.connection.close()
            return
        waiting = state.statuses.get(asked.file) or state.statuses.get("*")
        if waiting:
            self._answer(asked, waiting.pop(0), b"")
            return
        path = state.root / match["repo"] / match["file"] if match else None
        if path is None or not path.is_file():
            self._answer(asked, 404, b"")
            return
        if state.redirect_to:
            self._answer(asked, 302, b"", Location=state.redirect_to + self.path)
            return
        content = _mapped(path)
        tag = f'"{len(content)}-{path.stat().st_mtime_ns}{state.etag_suffix}"'
        extra = {"ETag": tag} if state.etags else {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.range or "")
        stale = state.honours_if_range and asked.if_range not in (None, tag)
        if wanted is None or state.ignores_ranges or stale:
            self._answer(asked, 200, content, **extra)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if first >= len(content):
            self._answer(asked, 416, b"")
            return
        first += state.shift
        size = state.claimed_size or len(content)
        extra["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(asked, 206, content[first : last + 1] + bytes(state.longer), **extra)

    def _answer(self, asked: Asked, status: int, body: bytes | mmap.mmap, **headers: str) -> None:
        state = self.state
        asked.status = status
        self.send_response(status)
        for name, value in (headers | state.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for start in range(0, len(body), 4096):
                limit = min(
                    (n for n in (state.cut_after, state.hang_up_once_after) if n is not None), default=None
                )
                if limit is not None and state.served >= limit:
                    state.hang_up_once_after = None
                    self.close_connection = True
                    return
                while state.hang_after is not None and state.served >= state.hang_after:
                    time.sleep(0.01)
                piece = body[start : start + 4096]
                self.wfile.write(piece)
                asked.served += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """Serve `root` until the block ends."""
    state = RangeServer(root)
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
