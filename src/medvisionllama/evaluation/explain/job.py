"""Maps of trained networks on scans, scored against masks: what `medvisionllama explain` computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medvisionllama.data.labels import FOREGROUND
from medvisionllama.data.readers import read_image
from medvisionllama.data.volume import Volume, from_ras, to_ras
from medvisionllama.devices import choose_device
from medvisionllama.errors import ConfigError
from medvisionllama.evaluation.explain.notes import notes_on
from medvisionllama.evaluation.explain.targets import ScanToExplain, read_truth
from medvisionllama.evaluation.pointing import Target, make_target, peak, score
from medvisionllama.inference.activations import KINDS, STAGES, MapName, native_maps, token_size
from medvisionllama.inference.cleaning import Cleaning, cleaning_of
from medvisionllama.inference.controls import with_random_block
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.predictor import Member, Predictor, check_alike
from medvisionllama.inference.writers import write_map
from medvisionllama.run_dir import RunDir
from medvisionllama.types import AffineMatrix, LabelArray, MaskArray

TRAINED, RANDOM, OTHER = "trained", "random block", "other run"
"""The networks of a comparison, in the order of the table."""


@dataclass(frozen=True)
class Networks:
    """The run, its control and the run beside it, with what has to be said about them."""

    members: dict[str, Member]
    notes: tuple[str, ...]
    cleaning: Cleaning
    """Of the run's own masks, as in `predict`."""

    @property
    def trained(self) -> Member:
        return self.members[TRAINED]


@dataclass(frozen=True)
class Explained:
    """One scan, everything in RAS but `affine`, which is the file's own."""

    scan: ScanToExplain
    image: Volume
    truth: LabelArray
    affine: AffineMatrix
    classes: dict[int, str]
    maps: dict[str, dict[MapName, np.ndarray]]
    """By network."""
    table: pd.DataFrame
    """One row per network, map and class."""


def open_networks(run: Path, *, random_block: bool, against: Path | None, device: str = "auto") -> Networks:
    """Load the run and what it is compared with.

    Args:
        random_block: set the same network around a random block beside it.
        against: another run of the same channels and classes.

    Raises:
        CheckpointError: not a finished run, or runs of different channels or classes.
        ConfigError: a run without tokens.
        BlockError: the block cannot be had.
    """
    where = choose_device(device)  # type: ignore[arg-type]
    check_alike([run] if against is None else [run, against])
    members, notes = {TRAINED: _open(run, where)}, list[str]()
    notes += notes_on(members[TRAINED])
    if random_block:
        control = with_random_block(members[TRAINED])
        if control is None:
            notes.append(
                "No random-block control: this network has no block whose weights could be replaced."
            )
        else:
            members[RANDOM] = control
    if against is not None:
        members[OTHER] = _open(against, where)
        notes += [f"Other run ({against.name}): {note}" for note in notes_on(members[OTHER])]
    cleaning, _ = cleaning_of(RunDir(run), members[TRAINED].config.inference)
    return Networks(members, tuple(notes), cleaning)


def _open(run: Path, device: Any) -> Member:
    member = Member.from_run(run, device)
    if not member.config.network.has_tokens:
        raise ConfigError(
            f"{run} was trained without tokens (network.tokens=false), so there are no tokens to map; explain a run that has them"
        )
    return member


def explain_scan(
    networks: Networks, scan: ScanToExplain, *, on_share: Callable[[float], None] = lambda share: None
) -> Explained:
    """Map one scan with every network, and score each map against each class.

    Args:
        on_share: told which share of the work on this scan is done.

    Raises:
        DataError: the scan or its mask cannot be read, or do not lie on one grid.
    """
    members = networks.members
    volume = read_image(scan.images)
    image = to_ras(volume)
    prepared = Predictor([members[name] for name in (TRAINED, OTHER) if name in members]).prepare(volume)
    del volume
    plan = networks.trained.plan
    if scan.label is None:
        predicted = Predictor([networks.trained]).segment(prepared).mask
        truth = to_ras(clean(predicted, networks.cleaning, plan.places)).array
    else:
        truth = read_truth(scan, image, plan)
    targets: dict[tuple[float, float, float], list[tuple[str, Target]]] = {}
    maps, rows = {}, list[dict[str, Any]]()
    for number, (network, member) in enumerate(members.items()):

        def told(share: float, before: int = number) -> None:
            on_share((before + 0.9 * share) / len(members))

        maps[network] = native_maps(member, prepared, on_share=told)
        token = token_size(member, prepared)
        if token not in targets:
            masks = _masks(truth, plan.mask_classes)
            targets[token] = [(name, make_target(mask, token)) for name, mask in masks]
        for map_name, values in maps[network].items():
            facts = {**_names(scan), "network": network, **map_name._asdict()}
            rows += _rows(facts, values, image.affine, targets[token])
        on_share((number + 1) / len(members))
    return Explained(scan, image, truth, prepared.affine, plan.mask_classes, maps, pd.DataFrame(rows))


def _masks(truth: LabelArray, classes: Mapping[int, str]) -> Iterator[tuple[str, MaskArray]]:
    """Mask of each class, then of all together; in turn, since each is as large as the scan."""
    for value, name in classes.items():
        yield name, truth == value
    if len(classes) > 1:
        yield FOREGROUND, truth > 0


def _names(scan: ScanToExplain) -> dict[str, str]:
    return {
        "case_id": scan.case_id,
        "patient_id": scan.patient_id,
        "part": scan.part,
        "truth": scan.truth,
    }


def _rows(
    facts: dict[str, str], values: np.ndarray, affine: AffineMatrix, targets: Sequence[tuple[str, Target]]
) -> list[dict[str, Any]]:
    """One row per class of one map."""
    place = (affine @ [*peak(values), 1])[:3]
    about = {f"peak_{axis}_mm": float(value) for axis, value in zip("xyz", place, strict=True)}
    about |= {"map_mean": float(values.mean(dtype=np.float64)), "map_max": float(values.max())}
    found = score(values, [target for _, target in targets])
    return [
        {**facts, "class": name, **asdict(scores), **about}
        for (name, _), scores in zip(targets, found, strict=True)
    ]


def map_file(network: str, name: MapName) -> str:
    """What the file of a map is called."""
    return f"{network.replace(' ', '-')}_{name.stage}_{name.kind}.nii.gz"


MAP_FILES = tuple(
    map_file(network, MapName(stage, kind))
    for network in (TRAINED, RANDOM, OTHER)
    for stage in STAGES
    for kind in KINDS
)
"""Of every map that there may be."""


def write_maps(explained: Explained, folder: Path) -> None:
    """Write every map on the scan's own grid, as NETWORK_STAGE_KIND.nii.gz."""
    for network, maps in explained.maps.items():
        for name, values in maps.items():
            own = from_ras(values, explained.affine)
            path = folder / map_file(network, name)
            write_map(path, own, explained.affine, like=explained.scan.images[0])
