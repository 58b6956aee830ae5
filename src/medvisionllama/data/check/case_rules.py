"""Rules on the voxels of one case."""

from collections.abc import Mapping, Sequence

from medvisionllama.data.check.facts import CaseFacts, ChannelFacts
from medvisionllama.data.check.findings import Finding
from medvisionllama.data.formats import ScanSource
from medvisionllama.data.planning import is_ct


def value_findings(case: CaseFacts, channels: Sequence[str], classes: Mapping[int, str]) -> list[Finding]:
    """Everything that is wrong with the values of one case.

    Args:
        channels: their declared names.
        classes: declared names by label value, without the background; empty if none are declared.
    """
    return [*image_findings(case, channels), *label_findings(case, classes)]


def image_findings(case: CaseFacts, channels: Sequence[str]) -> list[Finding]:
    """NaN, constant and suspicious images."""
    findings: list[Finding] = []

    def add(code: str, message: str, path: ScanSource) -> None:
        findings.append(Finding(code, f"{path}{message}", (case.case_id,), path))

    named = _named(case, channels)
    first_path, several_files = case.images[0].path, len(case.images) > 1
    for path, name, channel in named:
        if channel.num_bad:
            voxels = "voxels are" if channel.num_bad > 1 else "voxel is"
            add(
                "image-not-finite",
                f"{name}: {channel.num_bad} {voxels} NaN or infinite, the first at {channel.first_bad} (in RAS order); repair the file or leave the case out",
                path,
            )
    constant = [(path, name) for path, name, channel in named if channel.constant]
    if case.channels and len(constant) == len(case.channels):
        value = case.channels[0].low
        message = f": every voxel is {value:g}; export the scan again or leave the case out"
        add("image-constant", message, first_path)
    else:
        for path, name in constant:
            add("channel-constant", f"{name}: every voxel is equal; is the channel missing?", path)
        for path, name, channel in named:
            if channel.mostly_one_value and not channel.constant and not channel.num_bad:
                add(
                    "image-nearly-constant",
                    f"{name}: at least 99 % of the voxels have one value ({channel.low:g} to {channel.high:g}); look at the scan",
                    path,
                )
    first: dict[str, str] = {}
    for path, name, channel in named:
        if channel.sha256 in first and not channel.constant:
            add(
                "duplicate-channel",
                f":{name} and{first[channel.sha256]} hold the same voxels; was one exported twice?",
                path,
            )
        first.setdefault(channel.sha256, name)
    if case.image_is_mask:
        add(
            "image-is-mask",
            f"{' or another of its channels' if several_files else ''} has the few values of a mask; are image and label exchanged, or is the label an image?",
            first_path,
        )
    for declared, (path, _, channel) in zip(channels, named, strict=False):
        if is_ct(declared) and not channel.num_bad and not channel.constant:
            findings += _ct_findings(case, channel, path)
    return findings


def label_findings(case: CaseFacts, classes: Mapping[int, str]) -> list[Finding]:
    """Values that are not class numbers of this dataset, empty labels and stray voxels."""
    findings: list[Finding] = []
    mask, label = case.mask, case.label
    if mask is None or label is None:
        return findings
    path = label.path

    def add(code: str, message: str) -> None:
        findings.append(Finding(code, message, (case.case_id,), path))

    if mask.num_bad:
        add(
            "label-not-finite",
            f"{path}: {mask.num_bad} voxels are NaN or infinite; labels are whole numbers, correct or redraw the label",
        )
    if mask.num_fractional:
        add(
            "label-fractional",
            f"{path}: labels must be whole numbers, found {mask.fraction:g} and {mask.num_fractional} such voxels; resample the label with nearest neighbour",
        )
    if mask.low < 0 or mask.high > 65_535:
        add(
            "label-range",
            f"{path}: labels must lie in 0..65535, found {mask.low:g}..{mask.high:g}; renumber the classes",
        )
    if not mask.countable:
        return findings
    unknown = sorted(set(mask.voxels) - set(classes)) if classes else []
    if unknown:
        declared = ", ".join(f"{value} {name}" for value, name in classes.items())
        shown = ", ".join(map(str, unknown[:8])) + (" and more" if len(unknown) > 8 else "")
        values = "the label values" if len(unknown) > 1 else "the label value"
        add(
            "label-undeclared",
            f"{path} holds {values} {shown}, which the dataset does not declare (0 background, {declared}); declare it too (dataset.json or names.json) or correct the label",
        )
    if not mask.voxels:
        add(
            "label-empty",
            f"{path}: no voxel is labelled; right only if the structure is absent, else label it or leave the case out",
        )
    if mask.dtype.startswith("float"):
        add("label-float", f"{path} stores whole labels as {mask.dtype}; read as integers, nothing to do")
    if mask.specks:
        count = sum(mask.specks.values())
        names = ", ".join(str(classes.get(value, value)) for value in mask.specks)
        islands = "islands" if count > 1 else "island"
        add("specks", f"{path}: {count} {islands} of at most 3 voxels ({names}); slips of the pen?")
    return findings


def _ct_findings(case: CaseFacts, channel: ChannelFacts, path: ScanSource) -> list[Finding]:
    """Air is -1000, metal a few thousand: a CT that starts at 0 was shifted, one in the ten thousands scaled."""
    if -5000 <= channel.low < 0 and channel.high <= 50_000:
        return []
    message = f"{path}: values from {channel.low:g} to {channel.high:g} are no Hounsfield units (air is -1000); apply slope and intercept, or declare the channel as something other than CT"
    return [Finding("ct-not-hu", message, (case.case_id,), path)]


def _named(case: CaseFacts, channels: Sequence[str]) -> list[tuple[ScanSource, str, ChannelFacts]]:
    """Each channel with its file and the words that name it in a message; none where there is one channel only."""
    paths = [file.path for file in case.images for _ in range(file.header.num_channels)]
    if len(case.channels) == 1:
        return [(paths[0], "", case.channels[0])]
    names = channels if len(channels) == len(case.channels) else [str(n) for n in range(len(case.channels))]
    return [
        (path, f" channel {number} ({name})", channel)
        for number, (path, name, channel) in enumerate(zip(paths, names, case.channels, strict=True))
    ]
