"""`explain_run`: from a run and scans to a folder of maps, tables and pages."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from medvisionllama.config import read_config
from medvisionllama.data.planning import read_plan
from medvisionllama.data.readers import SUFFIXES
from medvisionllama.errors import CheckpointError, DataError
from medvisionllama.evaluation.evaluate import Split, write_table
from medvisionllama.evaluation.explain.job import (
    MAP_FILES,
    OTHER,
    RANDOM,
    TRAINED,
    Networks,
    explain_scan,
    open_networks,
    write_maps,
)
from medvisionllama.evaluation.explain.summary import summarise_scores
from medvisionllama.evaluation.explain.targets import ScanToExplain, scans_to_explain
from medvisionllama.progress import Progress, Silent
from medvisionllama.reports.activations import Heading, warnings_on, write_case_page, write_summary_page
from medvisionllama.run_dir import RunDir
from medvisionllama.training.seen import names_under, seen_before, seen_by

PAGE, SCORES, SUMMARY = "explain.html", "scores.csv", "summary.csv"


@dataclass(frozen=True)
class Explanation:
    """What was found; the same numbers are in scores.csv and summary.csv beside the page."""

    table: pd.DataFrame
    """One row per scan, network, map and class."""
    summary: pd.DataFrame | None
    """Means over patients; None for a single scan."""
    page: Path
    warnings: tuple[str, ...]
    """What must not be overlooked."""
    notes: tuple[str, ...]
    """Stages that the networks lack, and the like."""


def explain_run(
    run: Path,
    images: Sequence[Path],
    *,
    split: Split | None,
    label: Path | None,
    random_block: bool,
    against: Path | None,
    out: Path | None,
    maps: bool,
    overwrite: bool,
    device: str,
    progress: Progress | None,
) -> Explanation:
    """Explain scans with a run; arguments are those of `medvisionllama.explain`."""
    progress = progress or Silent()
    run_dir = RunDir(run)
    run_dir.check()
    config, plan = read_config(run_dir.config), read_plan(run_dir)
    scans = scans_to_explain(run_dir, config, plan, images, split=split, label=label)
    alone = len(scans) == 1 and split is None
    folder = out or run_dir.path / "explain" / (scans[0].case_id if alone else split or "scans")
    outputs = _outputs(folder, scans, alone=alone)
    _check_free(folder, outputs, scans, overwrite=overwrite)
    networks = open_networks(run_dir.path, random_block=random_block, against=against, device=device)
    if against is not None:
        # Each run has a pattern of its own, and by either two scans may be of one patient.
        trained = names_under(seen_by(RunDir(against))["train"], config.data.patient_pattern)
        theirs = read_config(RunDir(against).config).data.patient_pattern
        for number, scan in enumerate(scans):
            names = names_under({scan.case_id: scan.patient_id}, theirs)
            scans[number] = replace(scan, trained_other=bool(names & trained))
    here, before = _trained(run_dir)
    for number, scan in enumerate(scans):
        names = {scan.case_id, scan.patient_id}
        scans[number] = replace(
            scan,
            trained_here=not scan.part and bool(names & here),
            trained_before=bool(names & before),
        )
    heading = _heading(networks, run_dir.path, against)
    for note in networks.notes:
        progress.say(note)
    if overwrite:
        # What stayed would pass for a part of this explanation, however far it gets.
        for file in outputs:
            file.unlink(missing_ok=True)
    tables, warnings = [], list[str]()
    with progress.track("explaining", len(scans)) as advance:
        for number, scan in enumerate(scans):

            def told(share: float, before: int = number, name: str = scan.case_id) -> None:
                advance(before + share, name)

            place = folder if alone else folder / scan.case_id
            table, loud = _explain_one(networks, scan, heading, place, maps=maps, on_share=told)
            tables.append(table)
            warnings += loud
    table, summary = pd.concat(tables, ignore_index=True), None
    page = folder / PAGE
    if not alone:
        summary = summarise_scores(table)
        write_table(summary, folder / SUMMARY)
        title = f"The {split} cases" if split else "Scans"
        write_summary_page(table, summary, heading, page, title=title, loud=warnings)
        write_table(table, folder / SCORES)
    return Explanation(table, summary, page, tuple(warnings), networks.notes)


def _explain_one(
    networks: Networks,
    scan: ScanToExplain,
    heading: Heading,
    folder: Path,
    *,
    maps: bool,
    on_share: Callable[[float], None],
) -> tuple[pd.DataFrame, list[str]]:
    """Map one scan and write what belongs to it; the table last, since it tells that a scan is finished."""
    explained = explain_scan(networks, scan, on_share=lambda share: on_share(0.9 * share))
    if maps:
        write_maps(explained, folder)
    write_case_page(explained, heading, folder / PAGE)
    write_table(explained.table, folder / SCORES)
    on_share(1.0)
    return explained.table, warnings_on(explained)


def _heading(networks: Networks, run: Path, against: Path | None) -> Heading:
    block = networks.trained.config.network.block
    words = {
        TRAINED: f"the run {run.resolve().name} as it was trained",
        RANDOM: f"the same network, its block's {block.weights} weights replaced by random ones of the family's own initialiser; encoder, mappers, decoder and head unchanged",
        OTHER: f"the run {against.resolve().name}, as it was trained" if against else "",
    }
    return Heading(run.resolve().name, {name: words[name] for name in networks.members}, networks.notes)


def _trained(run_dir: RunDir) -> tuple[set[str], set[str]]:
    """Cases and patients who trained a run, and those who trained one whose weights it began with.

    None where no manifest tells.
    """
    with suppress(CheckpointError):
        seen, before = seen_by(run_dir)["train"], seen_before(run_dir.read_manifest()).get("train", {})
        own = {name: patient for name, patient in seen.items() if name not in before}
        return {*own, *own.values()}, {*before, *before.values()}
    return set(), set()


def _outputs(folder: Path, scans: Sequence[ScanToExplain], *, alone: bool) -> list[Path]:
    """Every file that an explanation of these scans may have, whatever the networks and options."""
    places = [folder] if alone else [folder, *(folder / scan.case_id for scan in scans)]
    return [folder / SUMMARY, *(place / name for place in places for name in (PAGE, SCORES, *MAP_FILES))]


def _check_free(
    folder: Path, outputs: Sequence[Path], scans: Sequence[ScanToExplain], *, overwrite: bool
) -> None:
    """Raise DataError if the folder is a file, or an output is something that nobody said may go."""
    if folder.is_file() or folder.name.endswith(SUFFIXES):
        raise DataError(f"--out is a folder for maps and page, not a file: {folder}; give a folder's name")
    sources = {file.resolve() for scan in scans for file in scan.files}
    for file in outputs:
        if file.resolve() in sources:
            raise DataError(
                f"{file} is one of the scans or masks and would be replaced by a map; choose another --out"
            )
        if file.exists() and not overwrite:
            raise DataError(f"{file} already exists; choose another --out, or give --overwrite to replace it")
