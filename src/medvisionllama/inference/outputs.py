"""Where masks and maps go, which of them are still to be made, and whether what is there may be replaced."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medvisionllama.data.formats.dicom_labels import referenced_series
from medvisionllama.data.formats.dicom_series import Series
from medvisionllama.data.readers import SUFFIXES, ScanSource, read_header
from medvisionllama.data.volume import same_place
from medvisionllama.errors import DataError
from medvisionllama.inference.inputs import Scan
from medvisionllama.inference.ledger import (
    MAPS,
    Ledger,
    Made,
    MadeBy,
    ScanChangedError,
    check_maker,
    check_scan,
)
from medvisionllama.inference.writers import label_table

MaskFormat = Literal["auto", "nifti", "nrrd", "mha", "dicom"]
_ENDINGS = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "mha": ".mha", "dicom": ".dcm"}


@dataclass(frozen=True)
class Outputs:
    """What is written, where, and what becomes of what is there."""

    folder: Path
    made_by: MadeBy
    mask_format: MaskFormat = "auto"
    probabilities: bool = False
    uncertainty: bool = False
    overwrite: bool = False
    """Masks and maps of before are replaced, maps that nobody asks for now go, and so may a table of other classes;
    with `resume`, only what that alone would refuse."""
    resume: bool = False
    """Scans whose mask is there and as it would be made now are left out."""

    @property
    def ledger(self) -> Ledger:
        """What made the masks."""
        return Ledger(self.folder)

    def mask(self, scan: Scan) -> Path:
        """File of a scan's mask; by default in the scan's own kind of file."""
        chosen = format_like(scan.images[0]) if self.mask_format == "auto" else self.mask_format
        return self.folder / f"{scan.case_id}{_ENDINGS[chosen]}"

    def maps(self, scan: Scan) -> dict[str, Path]:
        """Files of the maps of a scan that are asked for, by their kinds."""
        wanted = {"probabilities": self.probabilities, "uncertainty": self.uncertainty}
        return {kind: self.map_file(scan, kind) for kind, asked in wanted.items() if asked}

    def files(self, scan: Scan) -> dict[str, Path]:
        """Every file that a scan leads to; the mask last, since it tells that a scan is finished."""
        return {**self.maps(scan), "mask": self.mask(scan)}

    def map_file(self, scan: Scan, kind: str) -> Path:
        """File of a scan's map of a kind."""
        return self.folder / kind / f"{scan.case_id}.nii.gz"

    def fallback(self, scan: Scan) -> Path | None:
        """Where a mask goes whose scan DICOM-SEG cannot refer to."""
        return self.folder / f"{scan.case_id}.nii.gz" if self.mask(scan).name.endswith(".dcm") else None

    def masks(self, scan: Scan) -> list[Path]:
        """Wherever a scan's mask may lie."""
        fallback = self.fallback(scan)
        return [self.mask(scan), fallback] if fallback else [self.mask(scan)]

    def outdated(self, scan: Scan) -> list[Path]:
        """What goes when a mask is replaced, since it shows the prediction of before.

        Those are the mask itself, and maps that nobody asks for now, if the ledger calls them ours.
        """
        files = self.files(scan)
        unasked = {kind: self.map_file(scan, kind) for kind in MAPS if kind not in files}
        there = {kind: path for kind, path in unasked.items() if path.exists()}
        names = {mask.name for mask in self.masks(scan)}
        # Any line: a mask that was made again, with other maps, has a last one that does not name those of before.
        lines = [made for made in self.ledger.lines() if made.mask in names] if there else []
        sources = {file.resolve() for file in scan.files}
        maps = [
            path
            for kind, path in there.items()
            if any(line.has(kind) for line in lines) and path.resolve() not in sources
        ]
        return [*maps, files["mask"], *self.made_masks(scan)]

    def made_masks(self, scan: Scan, *, but: Path | None = None) -> list[Path]:
        """Masks of a scan that lie there and are ours by the ledger; others of such a name are the user's own.

        The ledger is read only if there are any, as it may be long.
        """
        there = [mask for mask in self.masks(scan) if mask != but and mask.exists()]
        made = {line.mask for line in self.ledger.lines()} if there else set()
        return [mask for mask in there if mask.name in made]

    def missing(self, scans: Sequence[Scan], *, keep_going: bool = False) -> list[Scan]:
        """Scans that are still to be segmented.

        Args:
            keep_going: list a scan that has changed since its mask was made, or whose mask is of another series, so
                that it is refused in its turn.

        Raises:
            DataError: a file would replace a scan, one that nobody said may go, or the DICOM mask of another
                series; or a mask that is there is another scan's, or was made by other networks or in another way.
        """
        if self.folder.name.endswith(SUFFIXES) or (self.folder.exists() and not self.folder.is_dir()):
            raise DataError(f"--out is a folder for masks, not a file: {self.folder}; give a folder's name")
        sources = {file.resolve() for scan in scans for file in scan.files}
        made = self.ledger.read() if self.resume else {}
        owners = self.ledger.owners() if self.resume else {}
        left = []
        for scan in scans:
            self._check_writable(scan, sources, keep_going=keep_going)
            masks = self.masks(scan)
            # Of the two files only the one that is asked for needs to be ours.
            there = [file for file in masks if file.exists()] if self.resume else []
            if any(file.name not in made for file in there):
                # Another process may have made it since.
                made, owners = self.ledger.read(), self.ledger.owners()
            there = [file for file in there if file == masks[0] or file.name in made]
            try:
                for file in there:
                    self._check_kept(file, scan, made.get(file.name))
            except DataError as error:
                if not self.overwrite and not (keep_going and isinstance(error, ScanChangedError)):
                    raise
                there = []
            if not self._is_finished(scan, there, made, owners):
                left.append(scan)
        return left

    def still_missing(self, scan: Scan) -> bool:
        """Whether a scan that was missing is so still: another process may work for the same folder."""
        there = any(file.exists() for file in self.masks(scan))
        return not there or bool(self.missing([scan]))

    def _check_writable(self, scan: Scan, sources: Container[Path], *, keep_going: bool) -> None:
        """Raise DataError if a mask or map of a scan cannot be written, or would replace what must stay."""
        if self.fallback(scan) and not isinstance(scan.images[0], Series):
            raise DataError(
                f"{scan.images[0]} is no DICOM series, so no DICOM mask can refer to it; choose --format auto, nifti, nrrd or mha"
            )
        for file in [*self.maps(scan).values(), *self.masks(scan)]:
            if file.resolve() in sources:
                raise DataError(
                    f"{file} is one of the scans and would be overwritten by its mask or map; choose another --out"
                )
            if file.exists() and not self.overwrite and not self.resume:
                raise DataError(
                    f"{file} already exists; choose another --out, or give --overwrite to replace it, --resume to keep it"
                )
            # Told in its turn where others can go on.
            if self.overwrite and file.name.endswith(".dcm") and file.exists() and not keep_going:
                _check_replaced(file, scan.images[0])

    def _check_kept(self, mask: Path, scan: Scan, made: Made | None) -> None:
        """Raise DataError unless a mask that is there is what would be made of this scan."""
        # First who made it: of other networks, that a scan has changed since says nothing.
        made = check_maker(mask, made, self.made_by)
        _check_same_scan(mask, scan)
        check_scan(mask, made, scan.files)
        if mask == self.fallback(scan) and not made.instead:
            raise DataError(
                f"{mask} is this scan's mask as NIfTI, and DICOM-SEG is asked for; give --format nifti to keep it, or another --out"
            )

    def _is_finished(
        self,
        scan: Scan,
        masks: Sequence[Path],
        made: Mapping[str, Made],
        owners: Mapping[tuple[str, str], str],
    ) -> bool:
        """Whether there are masks of a scan to keep, and with them each map that is asked for."""
        # A map that a mask's own line does not name shows another prediction, whatever its name; so does one
        # that was written last with a mask of another format.
        return bool(masks) and all(
            path.exists()
            and all(made[mask.name].has(kind) for mask in masks)
            and owners.get((kind, path.name)) in {mask.name for mask in masks}
            for kind, path in self.maps(scan).items()
        )

    @property
    def table(self) -> Path:
        """Names and colours of the classes, for viewers."""
        return self.folder / "labels.txt"

    def has_table(self, classes: Mapping[int, str]) -> bool:
        """Whether the table of these classes is there."""
        return self.table.exists() and self.table.read_text(
            encoding="utf-8", errors="replace"
        ) == label_table(classes)

    def check_table(self, classes: Mapping[int, str]) -> None:
        """Raise DataError if there is a table of other classes, or a file that is no table of ours."""
        if not self.overwrite and self.table.exists() and not self.has_table(classes):
            raise DataError(
                f"{self.table} is there and is not the table of this run's classes; choose another --out, or give --overwrite to replace it"
            )


def format_like(source: ScanSource) -> str:
    """Format of a mask for a scan."""
    if isinstance(source, Series):
        return "dicom"
    suffix = source.suffix.lower()
    return {".nrrd": "nrrd", ".mha": "mha"}.get(suffix, "nifti")


def _check_same_scan(mask: Path, scan: Scan) -> None:
    """Raise DataError if the mask that is there belongs to another scan of this name."""
    source = scan.images[0]
    if mask.name.endswith(".dcm"):
        _check_series(mask, referenced_series(mask), source)
        return
    ours, theirs = read_header(source), read_header(mask)
    if ours.shape != theirs.shape or not same_place(ours.affine, theirs.affine, ours.shape):
        raise ScanChangedError(
            f"{mask} lies on another grid than {source}, so it is the mask of another scan of that name; choose another --out"
        )


def _check_replaced(mask: Path, source: ScanSource) -> None:
    """Raise DataError if a DICOM mask that may be replaced is of another series, of another patient say."""
    try:
        theirs = referenced_series(mask)
    except DataError:
        return  # damaged, so nobody's
    _check_series(mask, theirs, source)


def _check_series(mask: Path, theirs: str, source: ScanSource) -> None:
    """Raise DataError if the series that a mask refers to is another; "" is unknown, as it is of damaged scans."""
    if theirs and isinstance(source, Series) and source.series_uid not in {"", theirs}:
        raise ScanChangedError(
            f"{mask} is the mask of another series ({theirs}) than {source}, whose folder has the same name; choose another --out, or remove it first"
        )
