"""Many scans in turn: the next is read while the networks work on this one, and a bad one stops nobody."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medvisionllama.config import InferenceConfig
from medvisionllama.data.readers import SUFFIXES, ScanSource
from medvisionllama.errors import DataError, MedVisionLlamaError
from medvisionllama.inference.cautions import cautions
from medvisionllama.inference.inputs import Scan
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.predictor import Prediction, Predictor, PreparedScan
from medvisionllama.inference.writers import write_label_table, write_mask, write_shares
from medvisionllama.progress import Progress

MaskFormat = Literal["auto", "nifti", "nrrd", "mha"]
# Two huge scans would not fit side by side into a small machine, and reading one takes little of their time.
_MOST_VOXELS_AHEAD = 50_000_000
_ENDINGS = {"nifti": ".nii.gz", "nrrd": ".seg.nrrd", "mha": ".mha"}


@dataclass(frozen=True)
class Outputs:
    """What is written, and where."""

    folder: Path
    mask_format: MaskFormat = "auto"
    probabilities: bool = False
    uncertainty: bool = False

    def mask(self, scan: Scan) -> Path:
        """File of a scan's mask; by default in the scan's own kind of file."""
        chosen = format_like(scan.images[0]) if self.mask_format == "auto" else self.mask_format
        return self.folder / f"{scan.case_id}{_ENDINGS[chosen]}"

    def missing(self, scans: Sequence[Scan], *, overwrite: bool, resume: bool) -> list[Scan]:
        """Scans that are still to be segmented.

        Raises:
            DataError: a mask would replace a scan, or a mask that nobody said may go.
        """
        if self.folder.name.endswith(SUFFIXES):
            raise DataError(f"--out is a folder for masks, not a file: {self.folder}; give a folder's name")
        sources = {source.resolve() for scan in scans for source in scan.images}
        left = []
        for scan in scans:
            target = self.mask(scan)
            if target.resolve() in sources:
                raise DataError(
                    f"{target} is one of the scans and would be overwritten by its mask; choose another --out"
                )
            if target.exists() and not overwrite and not resume:
                raise DataError(
                    f"{target} already exists; choose another --out, or give --overwrite to replace masks, --resume to keep them"
                )
            if overwrite or not target.exists():
                left.append(scan)
        return left


def format_like(source: ScanSource) -> str:
    """Format of a mask for a scan."""
    suffix = source.suffix.lower()
    return {".nrrd": "nrrd", ".mha": "mha"}.get(suffix, "nifti")


def predict_scans(
    predictor: Predictor,
    scans: Sequence[Scan],
    outputs: Outputs,
    *,
    cleaning: InferenceConfig,
    keep_going: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Segment scans and write what was asked for.

    Args:
        cleaning: its settings on components hold for all masks.
        keep_going: a scan that cannot be read becomes a record with `error`, and the others go on.

    Returns:
        One record per scan: case, mask file, volume of each class in millilitres, warnings, seconds.
    """
    records = []
    if scans:
        write_label_table(outputs.folder / "labels.txt", predictor.plan.mask_classes)
    with progress.track("segmenting", len(scans)) as advance, _prepared(predictor, scans) as coming:
        for number, (scan, future) in enumerate(coming):
            started = time.monotonic()

            def on_share(share: float, before: int = number, name: str = scan.case_id) -> None:
                advance(before + 0.98 * share, name)

            try:
                prepared = future.result()
                prediction = predictor.segment(
                    prepared,
                    probabilities=outputs.probabilities,
                    uncertainty=outputs.uncertainty,
                    on_share=on_share,
                )
                record = _finish(predictor, scan, prepared, prediction, outputs, cleaning)
            except MedVisionLlamaError as error:
                if not keep_going:
                    raise
                record = {"case": scan.case_id, "error": str(error)}
            records.append({**record, "seconds": round(time.monotonic() - started, 2)})
            advance(number + 1, scan.case_id)
    return records


def _finish(
    predictor: Predictor,
    scan: Scan,
    prepared: PreparedScan,
    prediction: Prediction,
    outputs: Outputs,
    cleaning: InferenceConfig,
) -> dict[str, Any]:
    """Clean, write and describe one prediction."""
    mask = clean(prediction.mask, cleaning)
    prediction = replace(prediction, mask=mask)
    names = predictor.plan.mask_classes
    target = outputs.mask(scan)
    # Maps first: a mask that is there tells --resume that its scan is finished.
    files = {}
    for kind in ("probabilities", "uncertainty"):
        shares = getattr(prediction, kind)
        if shares is not None:
            path = outputs.folder / kind / f"{scan.case_id}.nii.gz"
            write_shares(path, shares, mask.affine)
            files[kind] = str(path)
    write_mask(target, mask.array, mask.affine, like=scan.images[0], classes=names)
    return {
        "case": scan.case_id,
        "mask": str(target),
        **files,
        "volumes_ml": {names[value]: round(volume, 4) for value, volume in prediction.volumes_ml.items()},
        "warnings": cautions(prepared, prediction, predictor.plan),
    }


@contextmanager
def _prepared(
    predictor: Predictor, scans: Sequence[Scan]
) -> Iterator[Iterator[tuple[Scan, Future[PreparedScan]]]]:
    """Read each scan in a thread of its own, at most one ahead of the scan that is asked for."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def coming() -> Iterator[tuple[Scan, Future[PreparedScan]]]:
            waiting: Future[PreparedScan] | None = None
            for number, scan in enumerate(scans):
                future = waiting or pool.submit(predictor.prepare, scan.images)
                following = scans[number + 1] if number + 1 < len(scans) else None
                ahead = following is not None and following.num_voxels <= _MOST_VOXELS_AHEAD
                waiting = pool.submit(predictor.prepare, following.images) if following and ahead else None
                yield scan, future
                del future  # and with it the scan, before the next one is read

        try:
            yield coming()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
