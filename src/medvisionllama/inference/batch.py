"""Many scans in turn: the next is read while the networks work on this one, and a bad one stops nobody."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from medvisionllama._files import as_before, locked, write_text
from medvisionllama.data.formats.dicom_series import Series, has_grown
from medvisionllama.data.readers import ScanSource
from medvisionllama.errors import OUT_OF_MEMORY, DataError, MedVisionLlamaError, is_out_of_memory
from medvisionllama.inference.cautions import cautions
from medvisionllama.inference.dicom_seg import write_seg
from medvisionllama.inference.inputs import Scan
from medvisionllama.inference.ledger import MAPS, Made, scan_sha256
from medvisionllama.inference.outputs import Outputs
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.predictor import Prediction, Predictor, PreparedScan
from medvisionllama.inference.writers import label_table, write_mask, write_shares
from medvisionllama.progress import Progress

# Two huge scans would not fit side by side into a small machine, and reading one takes little of their time.
_MOST_VOXELS_AHEAD = 50_000_000


class _Read(NamedTuple):
    """A scan that was read, and the SHA-256 that its files had before."""

    scan: PreparedScan
    sha256: str


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
