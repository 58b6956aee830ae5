"""Names that nearly fit a layout: folders with a slip in their name, and labels that carry an ending."""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path

_SIMILAR = 0.7
_UNREAD = (".mhd", ".nhdr", ".hdr", ".img", ".mgz", ".mgh", ".mnc", ".nii.bz2")
"""Scans in formats that are not read."""
_WORDS = {
    "images": ("images", "image", "imgs", "scans"),
    "labels": ("labels", "label", "masks", "mask", "segmentations", "segmentation"),
}


def datasets_in(root: Path) -> list[str]:
    """Names of the folders in a folder that are datasets themselves."""
    return [
        path.name
        for path in _folders(root)
        if (path / "dataset.json").is_file() or all((path / name).is_dir() for name in _WORDS)
    ]


def misnamed_folders(root: Path) -> str:
    """What the folders for images and labels are called, and should be; "" where there are no such two."""
    names = [path.name for path in _folders(root)]
    found = {wanted: _nearest(wanted, names) for wanted in _WORDS}
    if not all(found.values()) or len(set(found.values())) < len(_WORDS):
        return ""
    wrong = " and ".join(f"{wanted}/" for wanted, name in found.items() if name != wanted)
    shown = " and ".join(f"{name}/" for name in found.values())
    listed = ", or is dataset.json missing" if found == {"images": "imagesTr", "labels": "labelsTr"} else ""
    return f"found {shown}; did you mean {wrong}{listed}?" if wrong else ""


def unread_files(folder: Path) -> dict[str, str]:
    """Names of scans in formats that are not read, by their case; the folder need not exist."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        file.name[: -len(ending)]: file.name
        for file in files
        for ending in _UNREAD
        if file.name.lower().endswith(ending) and not file.name.startswith(".")
    }


def constant_ending(names: Collection[str], stems: Collection[str]) -> str:
    """The one ending that makes each name out of one of the stems; "" where there is none."""
    common: set[str] | None = None
    for name in names:
        # Of case_1 and case_10, both begin case_10-label.
        endings = {name[length:] for length in range(1, len(name)) if name[:length] in stems}
        common = endings if common is None else common & endings
        if not common:
            return ""
    return min(common or {""}, key=len)


def why_none_meets(images: Mapping[str, Path], labels: Mapping[str, Path]) -> str:
    """Say why no image has the name of a label, and what to rename.

    Args:
        images: one file of each case, by its name; `labels` likewise. Neither is empty.
    """
    for ours, theirs, kind, other in (
        (labels, images, "labels", "images"),
        (images, labels, "images", "labels"),
    ):
        ending = constant_ending(ours, theirs)
        if ending:
            case_id = min(ours, key=lambda name: (len(name), name))
            old = ours[case_id].name
            new = case_id[: -len(ending)] + old[len(case_id) :]
            return f"the {kind} end in {ending!r}, the {other} do not; rename {old} to {new}, and so on"
    shown = "; ".join(
        f"{kind} " + ", ".join(list(files)[:2]) for kind, files in (("images", images), ("labels", labels))
    )
    return f"no image has the name of a label ({shown}); give each label the name of its image"


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _nearest(wanted: str, names: list[str]) -> str | None:
    """The folder with the name that is meant, or with the one most like it."""
    if wanted in names:
        return wanted
    lower = {name.lower(): name for name in names}
    near = [word for word in _WORDS[wanted] if word in lower]
    near = near or difflib.get_close_matches(wanted, lower, cutoff=_SIMILAR)
    return lower[near[0]] if near else None
