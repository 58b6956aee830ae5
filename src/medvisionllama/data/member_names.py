"""Names inside an archive: which of them may become files, on every system we run on."""

import re
import unicodedata

_MAX_PART_BYTES, _MAX_NAME_BYTES, _MAX_DEPTH = 255, 1024, 32
_RESERVED = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)


class Names:
    """The names of one archive so far."""

    def __init__(self) -> None:
        self.num_files = 0
        self._files: set[tuple[str, ...]] = set()
        self._spelling: dict[tuple[str, ...], tuple[tuple[str, ...], bool]] = {}

    def add(self, name: str, *, is_folder: bool) -> tuple[str, ...]:
        """Check a name and split it; empty if the entry is left out.

        Raises:
            ValueError: with what is wrong.
        """
        parts = _parts(name)
        if _is_left_out(parts):
            return ()
        if not parts:
            if is_folder:
                return ()  # "./", the archive's own root
            raise ValueError(f"{self.shown(name)} names no file")
        for depth in range(1, len(parts)):
            self._enter(name, parts[:depth], is_folder=True)
        self._enter(name, parts, is_folder=is_folder)
        self.num_files += not is_folder
        return parts

    @staticmethod
    def shown(name: str) -> str:
        """A name for a message: one line, no control characters, not too long."""
        text = ascii(name)
        return text if len(text) <= 80 else f"{text[:60]}…{text[-16:]}"

    def _enter(self, name: str, parts: tuple[str, ...], *, is_folder: bool) -> None:
        # What a disk that ignores case, or one that composes accents, takes for the same name.
        key = tuple(unicodedata.normalize("NFC", unicodedata.normalize("NFC", p).casefold()) for p in parts)
        before = self._spelling.setdefault(key, (parts, is_folder))
        if before[0] != parts:
            raise ValueError(
                f"{self.shown(name)} and {self.shown('/'.join(before[0]))} are one name where case does not count"
            )
        if before[1] != is_folder:
            raise ValueError(f"{self.shown('/'.join(parts))} is both a file and a folder")
        if not is_folder:
            if key in self._files:
                raise ValueError(f"{self.shown(name)} occurs twice")
            self._files.add(key)


def _parts(name: str) -> tuple[str, ...]:
    shown = Names.shown(name)
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the name {shown} is not UTF-8") from None
    if length > _MAX_NAME_BYTES:
        raise ValueError(f"the name {shown} has {length:,} bytes, more than {_MAX_NAME_BYTES:,}")
    if name.startswith("/"):
        raise ValueError(f"{shown} is an absolute path")
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in parts:
        raise ValueError(f"{shown} leads out of the folder")
    if len(parts) > _MAX_DEPTH:
        raise ValueError(f"{shown} lies {len(parts)} folders deep, more than {_MAX_DEPTH}")
    for part in parts:
        if any(letter in '\\:*?"<>|' or unicodedata.category(letter).startswith("C") for letter in part):
            raise ValueError(
                f"{shown} has a backslash, a colon or another sign that file names must not have"
            )
        if len(part.encode()) > _MAX_PART_BYTES:
            raise ValueError(f"the name {shown} has a part of more than {_MAX_PART_BYTES} bytes")
        if part.endswith((".", " ")) or _RESERVED.fullmatch(part):
            raise ValueError(f"{shown} is a name that Windows reads as another one")
    return parts


def _is_left_out(parts: tuple[str, ...]) -> bool:
    """True for what macOS adds to archives: twins that hold a file's attributes, and its own folders' files."""
    return bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store" or parts[0] == "__MACOSX")
