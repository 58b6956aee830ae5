"""A run, or the mean of several, measured on one of the first run's own splits."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medvisionllama._files import write_json
from medvisionllama.config import Config, read_config
from medvisionllama.data.index import Case, Dataset
from medvisionllama.data.planning import Plan
from medvisionllama.errors import CheckpointError, command
from medvisionllama.evaluation.calibrate import CalibrationTally
from medvisionllama.evaluation.cleaning import check_choosable, choose_cleaning, clean_files
from medvisionllama.evaluation.evaluate import Split, evaluate_files, open_dataset_of, write_table
from medvisionllama.evaluation.masks import Pair
from medvisionllama.evaluation.members import check_distinct, check_unseen, name_ensemble
from medvisionllama.inference.cleaning import Cleaning, cleaning_of, write_choice
from medvisionllama.inference.postprocess import clean
from medvisionllama.inference.predictor import Predictor, check_alike, unfinished
from medvisionllama.inference.writers import write_mask
from medvisionllama.progress import Progress, Silent
from medvisionllama.run_dir import RunDir


@dataclass(frozen=True)
class Scored:
    """What of a run is measured, which names its masks and tables."""

    run_dir: RunDir
    split: Split = "test"
    also: tuple[Path | str, ...] = ()
    """Further runs whose probabilities are averaged with this one's."""
    block_removed: bool = False

    @property
    def name(self) -> str:
        """`test`, `validation-block-removed`, `test-with-fold1`."""
        others = name_ensemble(self.run_dir, [RunDir(path) for path in self.also])
        return "-".join(filter(None, (self.split, "block-removed" if self.block_removed else "", others)))

    @property
    def masks(self) -> Path:
        return self.run_dir.path / "predictions" / self.name

    @property
    def table(self) -> Path:
        name = self.name
        return self.run_dir.evaluation if name == "test" else self.run_dir.path / f"evaluation-{name}.csv"

    @property
    def calibration(self) -> Path:
        """How well it is calibrated; calibration.json is of the validation cases."""
        name = self.name
        if name == "validation":
            return self.run_dir.calibration
        return self.run_dir.path / f"calibration-{name}.json"


def evaluate_run(
    run: Path,
    *,
    split: Split = "test",
    also: Sequence[Path | str] = (),
    block_removed: bool = False,
    choose: bool = False,
    calibration: bool = False,
    tolerance_mm: float | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Segment a split with the run's best weights, measure it on the scans' own grids, and write the table.

    The masks are kept in the run's `predictions/` folder; the test split's table is evaluation.csv, and
    evaluation.json beside it says which weights made it and what was removed.

    Args:
        also: further runs whose probabilities are averaged with this one's; masks and table get names of their own.
        block_removed: leave the frozen block out of the trained network; masks and table get names of their own.
        choose: find out which components to remove, and write postprocessing.json; on validation only.
        calibration: write how far the probabilities can be believed; see `Scored.calibration`.
        tolerance_mm: of NSD; by default the run's own setting.

    Raises:
        CheckpointError: not a finished run, or runs of other classes.
        ConfigError: a choice that would be unfair or of no effect, or a run twice.
        DataError: the dataset has moved, has patients that the run's splits do not know, or patients that one of
            several runs was trained or chosen by.
    """
    progress = progress or Silent()
    run_dir = RunDir(run)
    run_dir.check()
    members = [run_dir, *(RunDir(path) for path in also)]
    check_distinct(members)
    config = read_config(run_dir.config)
    scored = Scored(run_dir, split, tuple(also), block_removed)
    cleaning = _cleaning(scored, config, choose=choose, progress=progress)
    check_alike([member.path for member in members])
    _check_finished(members, split, progress)
    dataset, cases = _cases(run_dir, config, split)
    if also:
        check_unseen(members, dataset, cases, split=split)
    # Of the weights that are about to be loaded: a run that goes on beside this may replace them meanwhile.
    weights = [member.weights_sha256() for member in members]
    predictor = Predictor.from_run(
        *(member.path for member in members),
        # A run that was kept off the GPU is scored off it; one of a GPU may be scored where there is none.
        device="cpu" if config.train.device == "cpu" else "auto",
        block_removed=block_removed,
    )
    tally = CalibrationTally(predictor.plan) if calibration else None
    with progress.track(f"segmenting the {split} cases", len(cases)) as advance:
        declared = bool(dataset.classes)
        pairs = segment_cases(
            predictor, cases, scored.masks, cleaning, declared=declared, tally=tally, advance=advance
        )
    if tally is not None:
        tally.write(scored.calibration, members, weights, split)
    if choose:
        _choose(run_dir, pairs, predictor.plan, weights[0], progress)
    table = evaluate_files(
        pairs,
        predictor.plan.mask_classes,
        merged=predictor.plan.merged,
        tolerance_mm=config.inference.tolerance_mm if tolerance_mm is None else tolerance_mm,
        progress=progress,
    )
    write_table(table, scored.table)
    if scored.table == run_dir.evaluation:
        write_json(run_dir.scored, {"weights_sha256": weights[0], "cleaning": cleaning.model_dump()})
    return table


def out_of_date(run_dir: RunDir, config: Config) -> str:
    """With what the test cases were measured, if not with what predicts now; "" if so, or if nothing tells."""
    try:
        scored = json.loads(run_dir.scored.read_text(encoding="utf-8"))
        if scored["weights_sha256"] != run_dir.weights_sha256():
            return "earlier weights"
    except CheckpointError:
        return "fewer networks"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    now = cleaning_of(run_dir, config.inference)[0].model_dump()
    return "" if scored.get("cleaning") == now else "another removal of components"


def segment_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    folder: Path,
    cleaning: Cleaning,
    *,
    declared: bool,
    tally: CalibrationTally | None = None,
    advance: Callable[[int], None],
) -> list[Pair]:
    """Write a mask of each labelled case into a folder, and pair it with its label; `declared` as in `Pair`."""
    pairs = []
    for number, case in enumerate(cases, start=1):
        assert case.label is not None, "datasets list labelled cases"
        path = folder / f"{case.case_id}.nii.gz"
        scan = predictor.prepare(case.images)
        on_slab = None if tally is None else tally.watch(case, scan)
        mask = clean(predictor.segment(scan, on_slab=on_slab).mask, cleaning, predictor.plan.places)
        write_mask(path, mask.array, mask.affine, like=case.images[0])
        pairs.append(Pair(case.case_id, case.patient_id, path, case.label, by_value=True, declared=declared))
        advance(number)
    return pairs


def _cleaning(scored: Scored, config: Config, *, choose: bool, progress: Progress) -> Cleaning:
    """Which components are removed from the masks; none where the masks are to choose that.

    Raises:
        ConfigError: a choice that would be unfair or of no effect.
    """
    num_runs = 1 + len(scored.also)
    if choose:
        check_choosable(
            scored.run_dir,
            config.inference,
            split=scored.split,
            num_runs=num_runs,
            block_removed=scored.block_removed,
        )
        return Cleaning()
    cleaning, reason = cleaning_of(scored.run_dir, config.inference, num_runs=num_runs)
    if reason:
        progress.say(reason)
    return cleaning


def _check_finished(members: Sequence[RunDir], split: Split, progress: Progress) -> None:
    """Say which runs have not ended; refuse them on test cases.

    Raises:
        CheckpointError: such a run, and the split is test.
    """
    for line in unfinished(members):
        if split == "test":
            # Whoever has seen its test would choose by it whether the run goes on.
            raise CheckpointError(line)
        progress.say(line)


def _choose(run_dir: RunDir, pairs: Sequence[Pair], plan: Plan, weights: str, progress: Progress) -> None:
    """Choose which components go, clean the masks so, and write the choice.

    Raises:
        CheckpointError: other weights than those that made the masks are there by now.
    """
    choice = choose_cleaning(run_dir, pairs, plan, progress)
    if choice.weights_sha256 != weights:
        raise CheckpointError(f"{run_dir.path} was trained further meanwhile; choose again when it has ended")
    clean_files(pairs, choice, plan.places)
    write_choice(run_dir, choice)


def _cases(run_dir: RunDir, config: Config, split: Split) -> tuple[Dataset, list[Case]]:
    """The run's dataset, and its cases of a split."""
    masks = command("evaluate", "MASKS", "LABELS")
    dataset = open_dataset_of(
        run_dir,
        config,
        split,
        instead=f"score a run of a fold by its number, or masks of new scans: {masks}",
    )
    names = run_dir.cases_of(split, dataset.patients, otherwise="train a run without it")
    return dataset, [case for case in dataset.cases if case.case_id in names]
