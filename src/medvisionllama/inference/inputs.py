"""Which scans a list of files and folders names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medvisionllama.data.readers import is_scan, read_header, stem_of
from medvisionllama.errors import DataError


@dataclass(frozen=True)
class Scan:
    """One image to segment: a file, or one file per channel."""

    case_id: str
    images: tuple[Path, ...]


def collect_scans(inputs: Sequence[Path], *, channels: Sequence[str]) -> list[Scan]:
    """List the scans in files and folders, and check every header before any is segmented.

    Args:
        channels: names of the channels that the run was trained on. With several, a scan is one 4-D file or, as
            nnU-Net has it, files ending in _0000, _0001 and so on.

    Raises:
        DataError: nothing there, two scans of one name, or another number of channels.
    """
    scans: dict[str, Scan] = {}
    for path in _files(inputs):
        case_id = (
            re.sub(r"_\d{4}$", "", stem_of(path))
            if _is_one_channel_of_many(path, channels)
            else stem_of(path)
        )
        known = scans.get(case_id)
        if known is None:
            scans[case_id] = Scan(case_id, (path,))
        elif known.images[0].parent == path.parent and case_id != stem_of(path):
            scans[case_id] = Scan(case_id, (*known.images, path))
        else:
            raise DataError(
                f"{path} and {known.images[0]} would both become {case_id}.nii.gz; predict them into two folders"
            )
    if not scans:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no .nii or .nii.gz file there; give scans or folders of scans"
        )
    for scan in scans.values():
        found = sum(read_header(path).num_channels for path in scan.images)
        if found != len(channels):
            raise DataError(
                f"{scan.images[0]} has {found} channels, the run was trained on {len(channels)} ({', '.join(channels)}); give scans like those"
            )
    return list(scans.values())


def _files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(child for child in path.iterdir() if is_scan(child))
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist; give scans or folders of scans")
    return files


def _is_one_channel_of_many(path: Path, channels: Sequence[str]) -> bool:
    if not re.search(r"_\d{4}$", stem_of(path)):
        return False
    # A single-channel scan may be called scan_0001; only nnU-Net's _0000 is dropped there.
    return len(channels) > 1 or (len(channels) == 1 and stem_of(path).endswith("_0000"))
