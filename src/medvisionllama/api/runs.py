"""What the command line does with runs: train, predict, evaluate, explain, and the demo."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvisionllama._files import check_file_name, with_home
from medvisionllama.config import ONE_VIEW, Config, load_config, read_config
from medvisionllama.config.load import limits_as_asked, parse_overrides
from medvisionllama.devices import device_words
from medvisionllama.errors import CheckpointError, ConfigError, DataError, command
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir
from medvisionllama.types import FoldName

if TYPE_CHECKING:
    import pandas as pd

    from medvisionllama.reports.explanation import Explanation
    from medvisionllama.training.fit import RunResult


def train(
    data: Path | str,
    *,
    out: Path | str,
    preset: str | None = None,
    fold: FoldName | None = None,
    fraction: float | None = None,
    cases: int | None = None,
    unlabelled: Path | str | None = None,
    start_from: Path | str | None = None,
    max_minutes: float | None = None,
    epochs: int | None = None,
    members: int | None = None,
    overrides: str | Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    test: bool = True,
    progress: Progress | None = None,
) -> "RunResult":
    """Train a run, then open the test cases once and write the report.

    Args:
        out: the run folder.
        preset: `small` by default.
        fold: which one validates; `all` trains on every labelled case, and leaves none to validate or test.
        unlabelled: folder of scans without labels to learn from too, or `unused`: the cases that `cases` or
            `fraction` leave out, without their labels.
        start_from: an earlier run, on this dataset or another, to begin with the weights of, where they fit.
        members: networks that train side by side in the same minutes; `predict` and `evaluate` average them.
        overrides: further settings, as `["network.insert=none"]`.
        resume: go on with the run in `out`, whose own settings then hold; limits, learning rate, precision and the
            like may change, what defines the run may not.
        test: False leaves the test cases unopened, for development.

    Raises:
        MedVisionLlamaError: anything the user can fix, in one line.
    """
    from medvisionllama.evaluation.evaluate_run import evaluate_run
    from medvisionllama.reports.html import write_report
    from medvisionllama.training.fit import fit, with_absolute_paths

    # No shell turns the home of `--out=~/runs` into a folder.
    out = with_home(out)
    chosen: dict[str, Any] = {"data.path": with_home(data), "out": out}
    limits = {"train.max_minutes": max_minutes, "train.epochs": epochs}
    chosen |= {key: value for key, value in limits.items() if value is not None}
    parts = {
        "data.fold": fold,
        "data.fraction": fraction,
        "data.num_cases": cases,
        "unlabelled.scans": unlabelled,
        "train.start_from": start_from,
        "train.members": members,
    }
    chosen |= {key: value for key, value in parts.items() if value is not None}
    chosen = _joined(chosen, parse_overrides(overrides))
    chosen = limits_as_asked(chosen)
    if resume:
        RunDir(out).check_resumable()
        config = read_config(RunDir(out).config, chosen)
        if preset not in (None, config.preset):
            raise ConfigError(
                f"{out} was begun with preset {config.preset}, which --resume keeps; drop --preset {preset}, or choose another --out"
            )
        _check_changeable(read_config(RunDir(out).config), with_absolute_paths(config), chosen)
    else:
        config = load_config(preset or "small", chosen)
    result = fit(config, resume=resume, progress=progress)
    if result.finished and result.is_main:
        try:
            if test and config.data.fold != "all":
                evaluate_run(result.path, split="test", progress=progress)
        except DataError as error:
            write_report(result.path)
            raise DataError(
                f"{error}; the run itself is trained: correct the test case, then give {command('evaluate', result.path, '--split', 'test')}"
            ) from None
        write_report(result.path)
    return result


def predict(
    run: Path | str,
    inputs: Path | str | Sequence[Path | str],
    *,
    out: Path | str,
    also: Path | str | Sequence[Path | str] = (),
    mask_format: str = "auto",
    probabilities: bool = False,
    uncertainty: bool = False,
    largest: bool | None = None,
    min_ml: float | None = None,
    fast: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    keep_going: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Segment scans with a trained run; one mask per scan, on the scan's own grid, named like the scan.

    Args:
        inputs: a scan, a DICOM series or a folder of them, or several.
        also: further runs of the task, folds for example; the probabilities of all are averaged.
        mask_format: `nifti`, `nrrd`, `mha` or `dicom` (DICOM-SEG, of DICOM scans); `auto` is each scan's own kind.
        probabilities: write those of every class to the folder probabilities/, as 4-D NIfTI, background first.
        uncertainty: write their entropy, from 0 to 1, to the folder uncertainty/.
        largest: keep the largest component of each class alone. Without `largest` and `min_ml`, the run's settings
            decide if they remove anything, else what `evaluate` chose on its validation cases
            (postprocessing.json); with `also`, those of the first run.
        min_ml: remove components smaller than so many millilitres.
        fast: look at each scan once, not mirrored and turned as well; a third or quarter of the time.
        overwrite: replace masks that are already there, but for DICOM masks of another series; with `resume` only
            those that these networks did not make of this scan in this way; maps of before that nobody asks for now
            go too, scans are never replaced.
        resume: leave out scans whose mask is already there; predictions.jsonl beside it must say that these
            networks made it of this scan in this way. Other masks are refused, or with `overwrite` replaced.
        keep_going: a scan that fails becomes a record with `error` instead of an exception.
        on_record: told each record as soon as its files are whole, for those who may be interrupted.

    Returns:
        One record for each scan, but for those left out: case, mask file, volume of each class in millilitres,
        warnings, seconds.

    Raises:
        MedVisionLlamaError: anything the user can fix, in one line; before the first scan is segmented where
            headers tell.
    """
    from medvisionllama.inference.batch import predict_scans
    from medvisionllama.inference.cleaning import cleaning_of
    from medvisionllama.inference.inputs import collect_scans
    from medvisionllama.inference.ledger import MadeBy, Views
    from medvisionllama.inference.outputs import Outputs
    from medvisionllama.inference.predictor import Predictor, check_alike, unfinished
    from medvisionllama.progress import Silent

    _check_choice("mask_format", mask_format, ("auto", "nifti", "nrrd", "mha", "dicom"))
    _check_choice("device", device, ("auto", "cpu", "cuda"))
    if min_ml is not None and not 0 <= min_ml < float("inf"):
        raise ConfigError(f"min_ml={min_ml} must be 0 or more millilitres")
    inputs, also = _several(inputs), _several(also)
    run_dirs = [RunDir(path) for path in (run, *also)]
    plan = check_alike([run, *also])
    scans = collect_scans([with_home(path) for path in inputs], channels=plan.channels)
    configs = [read_config(one.config, ONE_VIEW if fast else {}) for one in run_dirs]
    cleaning, reason = cleaning_of(
        run_dirs[0], configs[0].inference, largest=largest, min_ml=min_ml, num_runs=len(run_dirs)
    )
    made_by = MadeBy(
        weights_sha256=tuple(one.weights_sha256() for one in run_dirs),
        views=tuple(Views.of(one.inference) for one in configs),
        cleaning=cleaning,
    )
    outputs = Outputs(
        with_home(out),
        made_by,
        mask_format,  # type: ignore[arg-type] # checked above
        probabilities=probabilities,
        uncertainty=uncertainty,
        overwrite=overwrite,
        resume=resume,
    )
    progress = progress or Silent()
    left = outputs.missing(scans, keep_going=keep_going)
    for line in unfinished(run_dirs):
        progress.say(line)
    if len(left) < len(scans):
        progress.say(f"{len(scans) - len(left)} of {len(scans)} scans have their masks and are left out")
    progress.say(f"segmenting on {device_words(device, configs[0].train.precision)}")  # type: ignore[arg-type] # checked above
    predictor = Predictor.from_run(run, *also, device=device, fast=fast)  # type: ignore[arg-type] # checked above
    if reason:
        progress.say(reason)
    return predict_scans(
        predictor, left, outputs, keep_going=keep_going, progress=progress, on_record=on_record
    )


def evaluate(
    predictions: Path | str,
    labels: Path | str | None = None,
    *,
    split: str | None = None,
    also: Path | str | Sequence[Path | str] = (),
    block_removed: bool = False,
    choose_cleaning: bool = False,
    calibration: bool = False,
    merged: bool = False,
    tolerance_mm: float | None = None,
    patient_pattern: str | None = None,
    out: Path | str | None = None,
    progress: Progress | None = None,
) -> "pd.DataFrame":
    """Measure masks against labels, or a run on one of its own splits.

    Args:
        predictions: a folder of masks; or, without `labels`, a run folder.
        split: `test` (by default) or `validation`, of a run.
        also: further runs of the task; the mean of all probabilities is measured on the first run's split. None may
            have seen its patients. The table is evaluation-SPLIT-with-NAMES.csv.
        block_removed: leave the frozen block out of a trained run: what does it lose?
        choose_cleaning: compare ways to remove components on the validation cases of a run, and keep the one that
            gains most in postprocessing.json, or none; `predict` and `evaluate` use it from then on.
        calibration: write how far the probabilities can be believed (expected calibration error, Brier score and
            the bins behind them) to calibration.json for the validation split, else calibration-SPLIT.json.
        merged: the masks know one foreground only; the labels' classes are merged before comparing.
        tolerance_mm: of NSD; by default 1, or a run's own setting.
        patient_pattern: a regular expression whose first group is the patient in a mask's file name; a run has its
            own. Means and intervals are over patients.
        out: where to write the table; a run's goes to its folder too.

    Returns:
        One row per case and class, and of several classes one more per case, `class == "foreground"`, all merged;
        leave it out of means over classes. Columns: case_id, patient_id, class, dice, iou, precision, recall, nsd
        (0 to 1), hd95_mm, volume_ml (of the label), predicted_ml, empty (`both`, `truth`, `prediction` or ""),
        tolerance_mm.

    Raises:
        MedVisionLlamaError: anything the user can fix, in one line.
    """
    from medvisionllama.evaluation.evaluate import Split, evaluate_folders, write_table
    from medvisionllama.evaluation.evaluate_run import evaluate_run
    from medvisionllama.reports.html import write_report

    _check_choice("split", split or "test", ("test", "validation"))
    if tolerance_mm is not None and not 0 <= tolerance_mm < float("inf"):
        raise ConfigError(f"tolerance_mm={tolerance_mm} must be 0 or more millimetres")
    also = _several(also)
    of_run = {
        "split": split,
        "also": also,
        "block_removed": block_removed,
        "choose_cleaning": choose_cleaning,
        "calibration": calibration,
    }
    for name, given in of_run.items():
        if labels is not None and given:
            raise ConfigError(f"{name} needs a run folder, not masks and labels; leave out the labels")
    for name, given in {"merged": merged, "patient_pattern": patient_pattern}.items():
        if labels is None and given:
            raise ConfigError(f"{name} is for masks and labels, a run has its own; leave it out")
    if out is not None:
        check_file_name(with_home(out), "evaluation.csv")
    if labels is None:
        run_dir = RunDir(predictions)
        if run_dir.path.is_dir() and not run_dir.config.is_file():
            raise CheckpointError(
                f"{predictions} is not a run folder (no config.yaml); to measure masks give their labels too: {command('evaluate', predictions, 'LABELS')}"
            )
        part: Split = "validation" if split == "validation" else "test"
        table = evaluate_run(
            run_dir.path,
            split=part,
            also=also,
            block_removed=block_removed,
            choose=choose_cleaning,
            calibration=calibration,
            tolerance_mm=tolerance_mm,
            progress=progress,
        )
        write_report(run_dir.path)
    else:
        table = evaluate_folders(
            with_home(predictions),
            with_home(labels),
            merged=merged,
            patient_pattern=patient_pattern,
            tolerance_mm=1.0 if tolerance_mm is None else tolerance_mm,
            progress=progress,
        )
    if out is not None:
        write_table(table, with_home(out))
    return table


def explain(
    run: Path | str,
    images: Path | str | Sequence[Path | str] = (),
    *,
    split: str | None = None,
    label: Path | str | None = None,
    control: str = "random",
    against: Path | str | None = None,
    out: Path | str | None = None,
    maps: bool = True,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> "Explanation":
    """Map token norms and attention after each stage of a trained network, and score the maps against masks.

    Of a run of several networks that is the first one.

    Args:
        images: a scan or several, instead of `split`.
        split: `test` or `validation`: every case of the run's own.
        label: the image's mask; by default the dataset's, if the image is one of the run's cases, else the run's
            own prediction.
        control: `random` sets the same network around a random block beside it, `none` does not.
        against: another run of the task to set beside it.
        out: folder for maps, tables and page; by default explain/CASE in the run folder, or explain/SPLIT.
        maps: False writes no maps, only tables and pages.
        overwrite: replace an explanation that is already there.

    Returns:
        Scores, their means if there are several scans, and where the page is.

    Raises:
        MedVisionLlamaError: anything the user can fix, in one line.
    """
    from medvisionllama.reports.explanation import explain_run

    _check_choice("device", device, ("auto", "cpu", "cuda"))
    _check_choice("control", control, ("random", "none"))
    if split is not None:
        _check_choice("split", split, ("test", "validation"))
    return explain_run(
        with_home(run),
        [with_home(image) for image in _several(images)],
        split="validation" if split == "validation" else "test" if split else None,
        label=None if label is None else with_home(label),
        random_block=control == "random",
        against=None if against is None else with_home(against),
        out=None if out is None else with_home(out),
        maps=maps,
        overwrite=overwrite,
        device=device,
        progress=progress,
    )


def demo(
    *, out: Path | str = "demo", minutes: float = 1.25, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Do the whole job on phantoms: generate, train, predict, evaluate, report.

    Args:
        out: a folder that gets one numbered folder per demo.

    Returns:
        Path of the report.
    """
    from medvisionllama.data.phantom import write_phantoms
    from medvisionllama.networks.factory import check_insert

    settings = {"train.num_validations": 4, "train.seed": seed, "train.members": 1}
    # Before phantoms lie there for nothing.
    config = load_config("small", {"train.max_minutes": minutes, **settings})
    # The first one is fetched, which may take longer than the training, and is no part of its minutes.
    check_insert(config.network)
    root = _next_folder(with_home(out))
    data = write_phantoms(root / "phantoms", num_cases=30, seed=seed)
    run = root / "run"
    result = train(
        data,
        out=run,
        preset="small",
        max_minutes=minutes,
        overrides=settings,
        progress=progress,
    )
    if not result.finished:
        raise KeyboardInterrupt
    new = write_phantoms(root / "new", num_cases=3, seed=seed + 1)
    predict(run, [new / "imagesTr"], out=root / "masks", progress=progress)
    evaluate(root / "masks", new / "labelsTr", out=root / "masks" / "evaluation.csv", progress=progress)
    return RunDir(run).report


def _several(given: Path | str | Sequence[Path | str]) -> Sequence[Path | str]:
    """One path is a list of one, and not of its letters."""
    return [given] if isinstance(given, str | Path) else given


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} does not exist; allowed: {', '.join(allowed)}")


def _joined(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a command with the settings given beside them.

    Raises:
        ConfigError: one says this, the other that.
    """
    for key in options.keys() & settings.keys():
        if str(options[key]) != str(settings[key]):
            raise ConfigError(
                f"{key} is given twice, as {options[key]} by an option and as {settings[key]} by --set; give it once"
            )
    return {**options, **settings}


def _check_changeable(before: Config, after: Config, chosen: Iterable[str]) -> None:
    """Refuse to resume with settings that would make it another run."""
    fixed = {
        "train.seed",
        "train.start_from",
        "train.optimizer",
        "train.ema_decay",
        "train.batch_size",
        "train.accumulate",
    }
    for key in set(chosen) - {"data.path", "out"}:
        was, now = (reduce(getattr, key.split("."), config) for config in (before, after))
        if was != now and (key in fixed or not key.startswith(("train.", "inference."))):
            raise ConfigError(
                f"{key} is fixed when a run begins ({was}) and cannot change by --resume (to {now}); start a new run"
            )


def _next_folder(root: Path) -> Path:
    number = 1
    while (root / f"{number:03d}").exists():
        number += 1
    return root / f"{number:03d}"
