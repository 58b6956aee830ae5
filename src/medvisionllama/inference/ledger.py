"""`predictions.jsonl` in a folder of masks: a line per mask says which networks made it, how, and from which scan.

`predict --resume` keeps a mask by it alone. A file's name and grid do not tell: scans of one protocol share a grid,
and a folder may hold the masks of last week's run.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from medvisionllama._files import append_json, files_sha256, read_json_lines
from medvisionllama.config import InferenceConfig
from medvisionllama.errors import DataError
from medvisionllama.inference.cleaning import Cleaning

LEDGER = "predictions.jsonl"
MAPS = ("probabilities", "uncertainty")
"""Kinds of maps that may be written with a mask."""
_WAYS = "choose another --out, or give --overwrite too to replace it"


class ScanChangedError(DataError):
    """A mask that these networks made, of a scan that is another now."""


class Views(BaseModel):
    """How a run's networks look at a scan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlap: float
    flip: bool
    turn: bool

    @classmethod
    def of(cls, settings: InferenceConfig) -> "Views":
        """What settings say."""
        return Views(**{name: getattr(settings, name) for name in Views.model_fields})

    @property
    def words(self) -> str:
        """What is done, for people."""
        ways = [word for word, done in (("mirrored", self.flip), ("turned", self.turn)) if done]
        return f"{' and '.join(ways) or 'as it is alone'}, windows overlapping by {self.overlap:g}"


class MadeBy(BaseModel):
    """What a mask depends on beside the scan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_sha256: tuple[str, ...]
    """Of each run whose probabilities were averaged."""
    views: tuple[Views, ...]
    """Of each run; --fast, or somebody who edits a run's settings, changes them."""
    cleaning: Cleaning

    def difference(self, other: "MadeBy") -> str:
        """In which way a mask of another maker differs; empty if it does not."""
        if other.weights_sha256 != self.weights_sha256:
            return "by other networks"
        if other.views != self.views:
            words = dict.fromkeys(views.words for views in other.views)
            return f"from other views of each scan ({'; '.join(words)}), as --fast or a run's settings say"
        if other.cleaning != self.cleaning:
            return f"otherwise: {other.cleaning.words}"
        return ""


class Made(BaseModel):
    """A line of the ledger; it holds the volumes and the names of the maps too."""

    model_config = ConfigDict(frozen=True, extra="allow")

    mask: str
    """Name of the file."""
    scan_sha256: str
    made_by: MadeBy
    instead: bool = False
    """A NIfTI file in place of the DICOM-SEG that was asked for, which cannot say what the scan's header says."""

    @classmethod
    def of(
        cls,
        record: dict[str, Any],
        scan_sha256: str,
        made_by: MadeBy,
        *,
        instead: bool = False,
        warnings: Sequence[str] = (),
    ) -> "Made":
        """The line of a mask.

        Args:
            record: what `predict` tells of it.
            warnings: those of its record that name no file and repeat nothing of headers.
        """
        return cls(
            **_told(record),
            warnings=list(warnings),
            scan_sha256=scan_sha256,
            made_by=made_by,
            instead=instead,
        )

    def has(self, kind: str) -> bool:
        """Whether the prediction that made the mask wrote such a map too."""
        return kind in (self.model_extra or {})


class Ledger:
    """What is known of the masks in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER

    def add(self, made: Made) -> None:
        """Note a mask that is there now."""
        append_json(self.path, made.model_dump(mode="json"))

    @property
    def size(self) -> int:
        """Bytes of the file, which grows by each line."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def lines(self) -> Iterator[Made]:
        """All that was ever made here, oldest first; what is no line of ours is passed over."""
        for line in read_json_lines(self.path):
            with suppress(ValidationError):
                yield Made.model_validate(line)

    def read(self) -> dict[str, Made]:
        """The last line of each mask file, by its name."""
        return {made.mask: made for made in self.lines()}

    def owners(self) -> dict[tuple[str, str], str]:
        """With which mask each map was written last, by its kind and the name of its file."""
        return {
            (kind, str(made.model_extra[kind])): made.mask
            for made in self.lines()
            for kind in MAPS
            if made.model_extra and made.has(kind)
        }


def check_maker(mask: Path, made: Made | None, made_by: MadeBy) -> Made:
    """Return what the ledger holds of a mask that is there, made by these networks in this way.

    Raises:
        DataError: other networks made the mask, or made it otherwise, or nobody knows what did.
    """
    if made is None:
        raise DataError(f"{mask} is there, and no {LEDGER} beside it says what made it; remove it, {_WAYS}")
    if difference := made_by.difference(made.made_by):
        raise DataError(f"{mask} was made {difference}; {_WAYS}")
    return made


def check_scan(mask: Path, made: Made, scan_files: Sequence[Path]) -> None:
    """Raise ScanChangedError if what was segmented was another scan, or another version of it."""
    if made.scan_sha256 != scan_sha256(scan_files):
        raise ScanChangedError(
            f"{mask} is the mask of another scan of that name, or {scan_files[0]} has changed since; {_WAYS}"
        )


def scan_sha256(files: Sequence[Path]) -> str:
    """Hash of what a scan is read from.

    Raises:
        DataError: one of the files is not there any more.
    """
    try:
        return files_sha256(files)
    except OSError as error:
        raise DataError(
            f"{error.filename or files[0]} cannot be read any more ({error.strerror}); was the scan moved?"
        ) from None


def _told(record: dict[str, Any]) -> dict[str, Any]:
    """What may be handed on with the masks: no folder, which may be called after somebody, nothing of headers."""
    files = {kind: Path(record[kind]).name for kind in ("mask", *MAPS) if kind in record}
    return {"case": record["case"], **files, "volumes_ml": record["volumes_ml"]}
