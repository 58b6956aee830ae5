"""Unpack gzip from memory, no further than asked: several members, padding and checksums as in `gzip.open`."""

import gzip
import zlib

_GZIP = 31  # zlib's name for: with gzip's header and trailer
_PIECE = 1 << 20


class Unpacker:
    """Gives the bytes inside `content` in order."""

    def __init__(self, content: bytes) -> None:
        self._rest = content
        self._stream = zlib.decompressobj(_GZIP)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end.

        Raises:
            EOFError: the content stops before its end.
            gzip.BadGzipFile, zlib.error: it is damaged.
        """
        parts: list[bytes] = []
        while size > 0 and (part := self._next(size)):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drain(self) -> None:
        """Unpack to the end and forget it: the checksum stands behind the last byte."""
        while self._next(_PIECE):
            pass

    def _next(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(b"\0")
                if not rest:
                    return b""
                if not rest.startswith(b"\x1f\x8b"):
                    raise gzip.BadGzipFile("other bytes behind the end")
                self._rest, self._stream = rest, zlib.decompressobj(_GZIP)
            part = self._stream.decompress(self._rest, size)
            self._rest = self._stream.unconsumed_tail
            if part:
                return part
            if not self._stream.eof and not self._rest:
                raise EOFError("ended before the end-of-stream marker was reached")
