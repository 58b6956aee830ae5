"""Rules on headers alone, written once: `train` refuses by them, and a check lists all they find."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from medvisionllama.data.check.facts import CaseFacts, FileFacts
from medvisionllama.data.check.findings import Finding
from medvisionllama.data.check.storage import read_storage
from medvisionllama.data.formats import dicom, format_of
from medvisionllama.data.formats.dicom_series import person_of
from medvisionllama.data.formats.header import channel_problem, why_unreadable
from medvisionllama.data.index import Case, Dataset
from medvisionllama.data.labels import may_be_cropped, offset_in
from medvisionllama.data.readers import read_header
from medvisionllama.data.volume import distance_at_corners, same_place, spacing_of
from medvisionllama.errors import DataError


def read_headers(case: Case) -> tuple[CaseFacts | None, list[Finding]]:
    """Read the headers of one case.

    Returns:
        The facts, with the PatientIDs of DICOM, without a label that cannot be read; None if an image cannot be.
    """
    findings: list[Finding] = []
    files: list[FileFacts | None] = []
    for path in (*case.sources, *([case.label] if case.label else [])):
        try:
            files.append(FileFacts(path, read_header(path), read_storage(path)))
        except (DataError, OSError) as error:
            findings.append(Finding("unreadable", why_unreadable(path, error), (case.case_id,), path))
            files.append(None)
    images = [file for file in files[: len(case.images)] if file is not None]
    if len(images) < len(case.images):
        return None, findings
    label = files[-1] if case.label else None
    facts = CaseFacts(case.case_id, case.patient_id, tuple(images), label, persons=persons_of(case))
    return facts, findings


def persons_of(case: Case) -> frozenset[str]:
    """SHA-256 of each PatientID in a case's DICOM series; none for other files."""
    found = {person_of(source) for source in case.sources if format_of(source) is dicom}
    return frozenset(found - {""})


def check_headers(dataset: Dataset) -> tuple[list[CaseFacts], list[Finding]]:
    """Read and check the headers of every case."""
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(read_headers, dataset.cases))
    facts = [case for case, _ in read if case is not None]
    findings = []
    for case, problems in read:
        findings += problems
        if case is not None:
            findings += grid_findings(case)
            findings += channel_findings(case, dataset.channels)
    return facts, findings


def grid_findings(case: CaseFacts) -> list[Finding]:
    """Compare the grids of channels and label, the label's in RAS: mirrored or permuted axes are no difference."""
    first = case.images[0]
    # `read_image` stacks channels as they are stored, so these must agree without being turned.
    problems = {
        image.path: channel_problem(image.path, image.header, first.path, first.header)
        for image in case.images[1:]
    }
    findings = [
        Finding("channel-grid", problem, (case.case_id,), path)
        for path, problem in problems.items()
        if problem
    ]
    if case.label is None:
        return findings
    label, found = case.label, None
    if label.header.num_channels > 1:
        found = (
            "label-channels",
            f"{label.path}: a label must be 3-D, this one has {label.header.num_channels} channels; merge them to class numbers",
        )
    elif label.ras[0] != first.ras[0] and not _is_part(label, first):
        shapes = [
            f"{file.header.shape}" + (f" in order {file.axes}" if label.axes != first.axes else "")
            for file in (label, first)
        ]
        found = (
            "label-shape",
            f"{label.path} has shape {shapes[0]}, its image {first.path.name} has {shapes[1]}; redraw or resample the label on the image's grid, or leave the case out (data.exclude)",
        )
    elif label.ras[0] == first.ras[0] and not same_place(first.ras[1], label.ras[1], first.ras[0]):
        found = (
            "label-affine",
            f"{label.path} has another affine than its image {first.path.name} ({_difference(first, label)}); if the voxels do match, copy the image's header to the label",
        )
    if found:
        findings.append(Finding(*found, (case.case_id,), label.path))
    return findings


def _is_part(label: FileFacts, image: FileFacts) -> bool:
    """A segmentation that was saved cropped, on the grid of its scan."""
    return may_be_cropped(label.path) and offset_in(*label.ras, *image.ras) is not None


def channel_findings(case: CaseFacts, channels: Sequence[str]) -> list[Finding]:
    """Compare the number of channels with the declared one."""
    if case.num_channels == len(channels):
        return []
    path, names = case.images[0].path, ", ".join(channels)
    message = f"{path} has {case.num_channels} channels, the dataset declares {len(channels)} ({names}); correct one of them"
    return [Finding("channel-count", message, (case.case_id,), path)]


def _difference(image: FileFacts, label: FileFacts) -> str:
    """What two affines differ in."""
    ours, theirs = label.header.affine, image.header.affine
    if not np.allclose(spacing_of(label.ras[1]), spacing_of(image.ras[1]), rtol=0.01):
        edges = (" × ".join(f"{edge:.4g}" for edge in spacing_of(affine)) for affine in (ours, theirs))
        return "spacing {} mm, not {}".format(*edges)
    far = distance_at_corners(image.ras[1], label.ras[1], image.ras[0])
    a_little = f"its spacing, direction or origin differs a little, {far:.2g} mm at the far corner"
    if far < min(spacing_of(image.ras[1])):
        return a_little
    if label.axes != image.axes:
        return f"axes {label.axes}, not {image.axes}"
    if not np.allclose(label.ras[1][:3, :3], image.ras[1][:3, :3], atol=0.01):
        return "rotated"
    shift = float(np.linalg.norm((label.ras[1] - image.ras[1])[:3, 3]))
    return f"shifted by {shift:.3g} mm" if shift > far / 2 else a_little
