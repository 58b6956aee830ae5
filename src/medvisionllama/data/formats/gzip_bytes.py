"""Unpack gzip from memory, no further than asked: several members, padding and checksums as in `gzip.open`."""

import gzip
import re
import zlib

_GZIP = 31  # zlib's name for: with gzip's header and trailer
# zlib copies what it leaves of its input, so it is given this many bytes at a time and not all that are left.
_PIECE = 1 << 18
_PADDING = re.compile(rb"\0*")


class Unpacker:
    """Gives the bytes inside `content` in order."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self._used = 0
        self._stream = zlib.decompressobj(_GZIP)

    def read(self, size: int) -> bytearray:
        """The next `size` bytes, or fewer at the end.

        Raises:
            EOFError: the content stops before its end.
            gzip.BadGzipFile, zlib.error: it is damaged.
        """
        # Grows where it lies: parts that are joined at the end would need their memory twice.
        found = bytearray()
        while len(found) < size and (part := self._next(size - len(found))):
            found += part
        return found

    def drain(self) -> None:
        """Unpack to the end and forget it: the checksum stands behind the last byte."""
        while self._next(_PIECE):
            pass

    def _next(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                padding = _PADDING.match(self._content, self._used)
                self._used = padding.end() if padding else self._used
                if self._used == len(self._content):
                    return b""
                if self._content[self._used : self._used + 2] != b"\x1f\x8b":
                    raise gzip.BadGzipFile("other bytes behind the end")
                self._stream = zlib.decompressobj(_GZIP)
            piece = self._content[self._used : self._used + _PIECE]
            part = self._stream.decompress(piece, size)
            left = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            self._used += len(piece) - len(left)
            if part:
                return part
            if not self._stream.eof and self._used == len(self._content):
                raise EOFError("ended before the end-of-stream marker was reached")
