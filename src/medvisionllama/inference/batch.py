"""Many scans in turn: the next is read while the networks work on this one, and a bad one stops nobody."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medvisionllama._files import as_before, locked, write_text
from medvisionllama.data.formats.dicom_labels import referenced_series
from medvisionllama.data.formats.dicom_series import Series, has_grown
from medvisionllama.data.readers import SUFFIXES, ScanSource, read_header
from medvisionllama.data.volume import same_place
from medvisionllama.errors import OUT_OF_MEMORY, DataError, MedVisionLlamaError, is_out_of_memory
from medvisionllama.inference.cautions import cautions
from medvisionllama.inference.dicom_seg import write_seg
from medvisionllama.inference.inputs import Scan
from medvisionllama.inference.ledger import (
    MAPS,
    Ledger,
    Made,
    MadeBy,
    ScanChangedError,
    check_maker,
    check_scan,
    scan_sha256,
)
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.predictor import Prediction, Predictor, PreparedScan
from medvisionllama.inference.writers import label_table, write_mask, write_shares
from medvisionllama.progress import Progress

MaskFormat = Literal["auto", "nifti", "nrrd", "mha", "dicom"]
# Two huge scans would not fit side by side into a small machine, and reading one takes little of their time.
_MOST_VOXELS_AHEAD = 50_000_000
_ENDINGS = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "mha": ".mha", "dicom": ".dcm"}


class _Read(NamedTuple):
    """A scan that was read, and the SHA-256 that its files had before."""

    scan: PreparedScan
    sha256: str


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

    def files(self, scan: Scan) -> dict[str, Path]:
        """Every file that a scan leads to; the mask last, since it tells that a scan is finished."""
        wanted = {"probabilities": self.probabilities, "uncertainty": self.uncertainty}
        maps = {kind: self.map_file(scan, kind) for kind, asked in wanted.items() if asked}
        return {**maps, "mask": self.mask(scan)}

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
            masks = self.masks(scan)
            maps = {kind: file for kind, file in self.files(scan).items() if kind != "mask"}
            if self.fallback(scan) and not isinstance(scan.images[0], Series):
                raise DataError(
                    f"{scan.images[0]} is no DICOM series, so no DICOM mask can refer to it; choose --format auto, nifti, nrrd or mha"
                )
            for file in [*maps.values(), *masks]:
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
            # A map that a mask's own line does not name shows another prediction, whatever its name; so does one
            # that was written last with a mask of another format.
            finished = there and all(
                path.exists()
                and all(made[mask.name].has(kind) for mask in there)
                and owners.get((kind, path.name)) in {mask.name for mask in there}
                for kind, path in maps.items()
            )
            if not finished:
                left.append(scan)
        return left

    def still_missing(self, scan: Scan) -> bool:
        """Whether a scan that was missing is so still: another process may work for the same folder."""
        there = any(file.exists() for file in self.masks(scan))
        return not there or bool(self.missing([scan]))

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


def predict_scans(
    predictor: Predictor,
    scans: Sequence[Scan],
    outputs: Outputs,
    *,
    keep_going: bool,
    progress: Progress,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Segment scans and write what was asked for.

    Args:
        keep_going: a scan that cannot be read becomes a record with `error`, and the others go on.
        on_record: told each record as soon as its files are whole.

    Returns:
        One record for each scan, but for those that another process made meanwhile: case, mask file, volume of each
        class in millilitres, warnings, seconds.
    """
    records = []
    if scans:
        outputs.check_table(predictor.plan.mask_classes)
    with progress.track("segmenting", len(scans)) as advance, _prepared(predictor, scans) as coming:
        for number, (scan, future) in enumerate(coming):
            started = time.monotonic()

            def on_share(share: float, before: int = number, name: str = scan.case_id) -> None:
                advance(before + 0.98 * share, name)

            try:
                record = _segment(predictor, scan, future, outputs, on_share)
            except (MedVisionLlamaError, MemoryError, RuntimeError) as error:
                ours = isinstance(error, MedVisionLlamaError)
                if not keep_going or not (ours or is_out_of_memory(error)):
                    raise
                words = str(error) if ours else OUT_OF_MEMORY
                record = {"case": scan.case_id, "source": _source(scan.images[0]), "error": words}
            del future  # which holds the scan
            if record is not None:
                records.append({**record, "seconds": round(time.monotonic() - started, 2)})
                on_record(records[-1])
            advance(number + 1, scan.case_id)
    return records


def _segment(
    predictor: Predictor,
    scan: Scan,
    coming: Future[_Read],
    outputs: Outputs,
    on_share: Callable[[float], None],
) -> dict[str, Any] | None:
    """Segment one scan and write its files; nothing of it is held when the next one is read.

    Returns:
        What is told of it; nothing if another process has made its mask meanwhile.
    """
    is_due = False
    try:
        is_due = outputs.still_missing(scan)
    finally:
        if not is_due:
            coming.cancel()
    if not is_due:
        return None
    read = coming.result()
    prediction = predictor.segment(
        read.scan,
        probabilities=outputs.probabilities,
        uncertainty=outputs.uncertainty,
        on_share=on_share,
    )
    return _finish(predictor, scan, read, prediction, outputs)


def _finish(
    predictor: Predictor,
    scan: Scan,
    read: _Read,
    prediction: Prediction,
    outputs: Outputs,
) -> dict[str, Any] | None:
    """Clean, describe and write one prediction, unless another process has made the scan's mask meanwhile."""
    names = predictor.plan.mask_classes
    mask = clean(prediction.mask, outputs.made_by.cleaning, predictor.plan.places)
    prediction = replace(prediction, mask=mask)
    # Counting takes a while, and must not stand between a mask and the line that says what made it.
    volumes = prediction.volumes_ml
    found = {
        # By digits and not by decimals: a few small voxels are not nothing.
        "volumes_ml": {name: float(f"{volumes.get(value, 0.0):.6g}") for value, name in names.items()},
        "warnings": cautions(read.scan, prediction, predictor.plan),
    }
    _check_unchanged(scan, read.sha256)
    with locked(outputs.ledger.path):
        outputs.check_table(names)
        if not outputs.still_missing(scan):
            return None
        before = outputs.outdated(scan) if outputs.overwrite else []
        return _write(scan, read.sha256, prediction, found, outputs, names, before)


def _write(
    scan: Scan,
    sha256: str,
    prediction: Prediction,
    found: dict[str, Any],
    outputs: Outputs,
    names: dict[int, str],
    before: Sequence[Path],
) -> dict[str, Any]:
    """Write maps, mask and the line that says what made it, and return what is told of them.

    Args:
        before: what the prediction of before has left and must go; all is as it was if a file cannot be written.
    """
    masks, files = outputs.masks(scan), outputs.files(scan)
    maps = {*files.values(), *before} - {*masks}
    with as_before({*masks, *maps}) as undo:
        # Where maps come or go, a process that is killed must leave no mask of before beside them.
        for file in before if maps else ():
            file.unlink(missing_ok=True)
        files["mask"], refused = _write_files(scan, prediction, outputs, names)
        record = {
            "case": scan.case_id,
            "source": _source(scan.images[0]),
            **{kind: str(path) for kind, path in files.items()},
            **found,
            "warnings": [*found["warnings"], *refused],
        }
        made = Made.of(record, sha256, outputs.made_by, instead=bool(refused), warnings=found["warnings"])
        size = outputs.ledger.size
        try:
            outputs.ledger.add(made)
        except BaseException:
            # Of a mask without a line --resume would not know what made it, and stop at it. A signal may come when
            # the line is written already, and the mask is finished then; an equal line may be there from before.
            if outputs.ledger.size > size and outputs.ledger.read().get(files["mask"].name) == made:
                undo.pop_all()
            raise
        undo.pop_all()
    # Whoever overwrites may have had the other of the two before, and two masks of one scan are one too many.
    for other in {*before, *outputs.made_masks(scan, but=files["mask"])} - {files["mask"]}:
        other.unlink(missing_ok=True)
    if not outputs.has_table(names):
        write_text(outputs.table, label_table(names))
    return record


def _write_files(
    scan: Scan, prediction: Prediction, outputs: Outputs, names: dict[int, str]
) -> tuple[Path, list[str]]:
    """Write maps and mask; returns the file of the mask, and why it is not the kind that was asked for."""
    mask, files, refused = prediction.mask, outputs.files(scan), []
    for kind in MAPS:
        shares = getattr(prediction, kind)
        if shares is not None:
            write_shares(files[kind], shares, mask.affine, like=scan.images[0])
    first, place = scan.images[0], files["mask"]
    if isinstance(first, Series) and outputs.fallback(scan):
        try:
            write_seg(place, mask.array, first, names)
        except DataError as error:
            refused = [f"written as NIfTI: {error}"]
            # The work of the network must not be lost for a header that the standard does not like.
            place = outputs.fallback(scan) or place
            if place.exists() and place not in outputs.made_masks(scan):
                raise DataError(
                    f"{error}; and {place}, where it would go as NIfTI, is no mask of ours: choose another --out"
                ) from None
    if not place.name.endswith(".dcm"):
        write_mask(place, mask.array, mask.affine, like=first, classes=names)
    return place, refused


def _check_unchanged(scan: Scan, sha256: str) -> None:
    """Raise DataError if a scan is not what was segmented any more: its mask would be told to be of the new one."""
    # The hash first, which says whether the files are there at all.
    if scan_sha256(scan.files) != sha256 or any(
        isinstance(source, Series) and has_grown(source) for source in scan.images
    ):
        raise DataError(f"{scan.images[0]} changed while it was segmented; give the same command again")


def _source(source: ScanSource) -> dict[str, str]:
    """Where a scan came from; of DICOM, which series it is."""
    if not isinstance(source, Series):
        return {"file": str(source)}
    return {
        "folder": str(source.folder),
        "series_uid": source.series_uid,
        "study_uid": source.study_uid,
        "description": source.description,
    }


def _read(predictor: Predictor, scan: Scan) -> _Read:
    # The hash first: a change that comes after it is found out.
    sha256 = scan_sha256(scan.files)
    return _Read(predictor.prepare(scan.images), sha256)


@contextmanager
def _prepared(predictor: Predictor, scans: Sequence[Scan]) -> Iterator[Iterator[tuple[Scan, Future[_Read]]]]:
    """Read each scan in a thread of its own, at most one ahead of the scan that is asked for."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def coming() -> Iterator[tuple[Scan, Future[_Read]]]:
            waiting: Future[_Read] | None = None
            for number, scan in enumerate(scans):
                future = waiting or pool.submit(_read, predictor, scan)
                following = scans[number + 1] if number + 1 < len(scans) else None
                ahead = following is not None and following.num_voxels <= _MOST_VOXELS_AHEAD
                waiting = pool.submit(_read, predictor, following) if following and ahead else None
                yield scan, future
                del future  # and with it the scan, before the next one is read

        try:
            yield coming()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
