"""The few-shot table: what is compared with what, and how a rival chooses its learning rate."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from medvisionllama import api
from medvisionllama.config import load_config, read_config, write_config
from medvisionllama.data.index import open_dataset
from medvisionllama.data.phantom import write_phantoms
from medvisionllama.evaluation.evaluate import write_table
from medvisionllama.evaluation.statistics import bootstrap_interval
from medvisionllama.progress import Silent
from medvisionllama.run_dir import RunDir

FAST = {"processor": "CPU", "instructions": "AVX512", "threads": 2, "gpu": None}
SLOW = FAST | {"instructions": "AVX2"}


def write_cell(where: Path, arm: str, seed: int, dice: float, hardware: dict) -> None:
    path = where / hardware["instructions"] / f"{arm}-s{seed}.json"
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"case_id": f"p{patient}_{frame}", "patient_id": f"p{patient}", "class": "organ", "dice": dice}
        for patient in range(3)
        for frame in ("a", "b")
    ]
    write_table(pd.DataFrame(rows).assign(empty="no"), path.with_suffix(".csv"))
    facts = {"arm": arm, "seed": seed, "test_dice": dice, "steps": 10, "trainable": 5}
    facts["trained_at"] = [f"{seed}234567890", None]
    path.write_text(json.dumps(facts | {"mean_cores_used": 1.9, "hardware": hardware}))


def trained_run(path: Path, dice: float, **facts) -> SimpleNamespace:
    network = {"trainable_parameters": 1, "frozen_parameters": 0}
    manifest = {"network": network, "precision": "no", "splits_sha256": "", "cases": {"train": []}}
    manifest |= {"git_revision": "a", "resumed": [], **facts}
    record = {"step": 1, "seconds": 1.0, "dice": dice}
    return SimpleNamespace(
        path=path,
        read_history=lambda: [record],
        kept_record=lambda: record,
        read_manifest=lambda: manifest,
    )


def test_arms_are_compared_on_one_machine_only(module, tmp_path):
    write_cell(tmp_path, "no-tokens", 0, 0.8, FAST)
    write_cell(tmp_path, "block", 0, 0.75, FAST)
    write_cell(tmp_path, "unet-16", 0, 0.5, SLOW)
    table = module("few_shot_summary").summarise(tmp_path).set_index("arm")
    assert table.loc["block", "minus_no_tokens"] == pytest.approx(-0.05)
    assert table.loc["no-tokens", "test_minus_block"] == pytest.approx(0.05)
    assert pd.isna(table.loc["unet-16", "minus_no_tokens"])
    assert table.loc["unet-16", "machine"] != table.loc["block", "machine"]


def test_cells_that_would_repeat_another_are_left_out(module):
    few_shot = module("few_shot_arms")

    def left_out(preset):
        return {
            (row, arm)
            for row in few_shot.TABLES[preset]
            for arm in few_shot.ARMS
            if few_shot.says_nothing(few_shot.ROWS[row], arm, preset)
        }

    # No other hospital's hippocampi are at hand to begin with.
    begun = {arm for arm, spec in few_shot.ARMS.items() if spec.begun}
    assert "block-begun" in begun
    assert left_out("small") == {
        *((row, arm) for row in ("hippocampus-14", "hippocampus-all") for arm in begun),
        *(
            (row, arm)
            for row in ("hippocampus-14", "hippocampus-all")
            for arm in ("join-2", "native-spacing")
        ),
        *((row, "join-1") for row in ("acdc-4", "sunnybrook-5")),
        ("hippocampus-all", "self-training"),
    }
    # `large` is one network, and its stem has other widths.
    assert {arm for row, arm in left_out("large") if row == "acdc-all"} == {
        "self-training",
        "join-1",
        "one-network",
        "half",
        "fine-16",
        *begun,
    }


def test_seeds_of_another_machine_make_a_line_of_their_own(module, tmp_path):
    write_cell(tmp_path, "no-tokens", 0, 0.8, FAST)
    write_cell(tmp_path, "no-tokens", 1, 0.6, SLOW)
    table = module("few_shot_summary").summarise(tmp_path)
    assert sorted(table["dice"]) == [0.6, 0.8]
    assert sorted(table["trained_at"]) == ["0234567 unknown", "1234567 unknown"]
    assert set(table["seeds"]) == {1}


@pytest.mark.parametrize(("hardware", "skipped"), [(FAST, True), (SLOW, False)])
def test_a_cell_of_another_machine_is_made_again(module, monkeypatch, tmp_path, hardware, skipped):
    few_shot, made = module("few_shot"), []
    arguments = ["--rows", "acdc-4", "--arms", "no-tokens", "--seeds", "0", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *arguments])
    monkeypatch.setattr(few_shot, "summarise", lambda _: pd.DataFrame())
    monkeypatch.setattr("medvisionllama.run_dir.machine_facts", lambda: {"hardware": hardware})
    parsed = few_shot.parse()
    parsed.machine = few_shot.machine_slug(FAST | {"threads": parsed.threads})
    done = few_shot.cell_path(parsed, "acdc-4", "no-tokens", 0)
    done.parent.mkdir(parents=True)
    done.touch()
    monkeypatch.setattr(few_shot, "run_to_end", lambda _: made.append(1) or 0)
    few_shot.main()
    assert bool(made) is not skipped


@pytest.mark.parametrize(("arm", "minutes"), [("unet-16-tuned", [5, 5, 5, 20]), ("unet-16", [20])])
def test_a_tuned_rival_takes_the_rate_that_validates_best(module, monkeypatch, tmp_path, arm, minutes):
    few_shot = module("few_shot_cell")
    dice, trained = {7e-4: 0.3, 2e-3: 0.2, 6e-3: 0.1}, []

    def train_run(arguments, row, arm, seed, path, minutes, more):
        trained.append((path.name, minutes, more.get("train.learning_rate")))
        return trained_run(
            path, dice.get(more.get("train.learning_rate"), 0.5), resumed=[{"git_revision": "b"}]
        )

    monkeypatch.setattr(few_shot, "train_run", train_run)
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: pd.DataFrame())
    monkeypatch.setattr(few_shot, "score_unused", lambda *_: pd.DataFrame())
    arguments = argparse.Namespace(runs=tmp_path, preset="small", minutes=None, machine="here")
    _, facts = few_shot.train_ours(arguments, "acdc-4", arm, 0)
    assert [length for _, length, _ in trained] == minutes
    assert len({name for name, _, _ in trained}) == len(trained), "each run has a folder of its own"
    assert trained[-1][2] == (7e-4 if "tuned" in arm else None)
    assert facts.get("rates", {}) == (dice if "tuned" in arm else {})
    assert facts["trained_at"] == ["a", "b"], "a run that went on at another revision says so"


def test_an_arm_may_begin_with_a_run_on_another_hospitals_scans(module, monkeypatch, tmp_path):
    few_shot, trained = module("few_shot_cell"), []

    def train_run(arguments, row, arm, seed, path, minutes, more):
        trained.append((row, seed, path, minutes, more))
        started = {"weights_sha256": "ab", "kept_parameters": 1, "seen": {"train": {"SC-1": "SC-1"}}}
        return trained_run(path, 0.5, started_from=started)

    monkeypatch.setattr(few_shot, "train_run", train_run)
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: pd.DataFrame())
    monkeypatch.setattr(few_shot, "score_unused", lambda *_: pd.DataFrame())
    arguments = argparse.Namespace(runs=tmp_path, preset="small", minutes=None, machine="here")
    _, facts = few_shot.train_ours(arguments, "acdc-4", "block-begun", 1)
    few_shot.train_ours(arguments, "acdc-4", "block-begun", 2)
    first, own, again, other = trained
    assert first[:2] == ("sunnybrook-all", 0)
    assert again == first, "all seeds begin with the same run"
    assert own[:2] == ("acdc-4", 1)
    assert own[2] != other[2]
    assert own[4] == other[4] == {"train.start_from": str(first[2])}
    assert facts["begun_with"] == {
        "row": "sunnybrook-all",
        "minutes": 15,
        "weights_sha256": "ab",
        "kept_parameters": 1,
    }


@pytest.mark.parametrize("arm", ["no-tokens", "unet-16-tuned"])
def test_every_arm_trains_for_the_minutes_it_is_given(module, monkeypatch, tmp_path, arm):
    few_shot, seen = module("few_shot_cell"), []

    def train(data, *, out, preset, cases, max_minutes, overrides, **_):
        shortcuts = {"data.path": "d", "out": str(out), "train.max_minutes": max_minutes}
        config = load_config(preset, shortcuts | overrides)
        seen.append((config.train.max_minutes, config.data.exclude))
        return SimpleNamespace(finished=True)

    monkeypatch.setattr(api, "train", train)
    arguments = argparse.Namespace(data=tmp_path, preset="small", minutes=None, published=False)
    few_shot.train_run(arguments, "acdc-4", arm, 0, tmp_path / "run", 5, {"train.learning_rate": 7e-4})
    # Whose images are also patient074's.
    assert seen == [(5, ("patient076",))]


def test_the_scans_of_our_tables_can_be_had_of_a_larger_dataset(module, monkeypatch, tmp_path):
    few_shot = module("few_shot_cell")
    ours = json.loads(few_shot.CASES.read_text())["Task101_ACDC"]
    patients = {case: case.partition("_")[0] for case in [*ours, "patient999_frame01", "patient003_frame99"]}
    monkeypatch.setattr(
        "medvisionllama.data.index.open_dataset", lambda _: SimpleNamespace(patients=patients)
    )
    arguments = argparse.Namespace(data=tmp_path, published=True)
    assert few_shot.excluded(arguments, "acdc-4") == [
        "patient076",
        "patient003_frame99",
        "patient999_frame01",
    ]
    arguments.published = False
    assert few_shot.excluded(arguments, "acdc-4") == ["patient076"]
    arguments.published = True
    del patients[ours[0]]
    with pytest.raises(SystemExit, match="lacks 1 of the scans of our tables"):
        few_shot.excluded(arguments, "acdc-4")


def test_a_training_that_was_cut_off_is_not_scored(module, monkeypatch, tmp_path):
    few_shot = module("few_shot_cell")
    monkeypatch.setattr(api, "train", lambda *_, **__: SimpleNamespace(finished=False))
    arguments = argparse.Namespace(data=tmp_path, preset="small", minutes=None, published=False)
    with pytest.raises(SystemExit) as end:
        few_shot.train_run(arguments, "acdc-4", "no-tokens", 0, tmp_path / "run", 5, {})
    assert end.value.code == few_shot.INTERRUPTED


def test_a_cell_that_was_cut_off_stops_the_others(module, monkeypatch, tmp_path):
    few_shot, begun = module("few_shot"), []
    arguments = ["--rows", "acdc-4", "--seeds", "0", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *arguments])
    monkeypatch.setattr("medvisionllama.run_dir.machine_facts", lambda: {"hardware": FAST})
    monkeypatch.setattr(few_shot, "run_to_end", lambda _: begun.append(1) or few_shot.INTERRUPTED)
    with pytest.raises(SystemExit):
        few_shot.main()
    assert len(begun) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop_waits_for_its_cell(module, tmp_path, number):
    cell, driver = tmp_path / "cell.py", tmp_path / "driver.py"
    cell.write_text(
        "import pathlib, signal, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    raise SystemExit(7)\n"
        "signal.signal(signal.SIGINT, save), signal.signal(signal.SIGTERM, save)\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    where = Path(module("few_shot").__file__).parent
    driver.write_text(
        # A job in the background, as tests may be, ignores Ctrl-C, and so do the processes that it starts.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.path.insert(0, {str(where)!r})\n"
        "from few_shot import run_to_end\n"
        f"sys.exit(run_to_end([sys.executable, {str(cell)!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "begun\n"
    # A terminal tells all of its processes; a queue may tell the first alone.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(30) == module("few_shot").INTERRUPTED
    assert (tmp_path / "saved").is_file()


@pytest.mark.parametrize("arm", ["block", "unet-16-tuned"])
def test_a_run_of_an_earlier_preset_is_not_scored_as_todays(module, monkeypatch, tmp_path, arm):
    few_shot, run, resumed = module("few_shot_cell"), RunDir(tmp_path / "run"), []

    def train(data, *, out, preset, cases, max_minutes, overrides, resume, **_):
        resumed.append(resume)
        limits = {"data.path": str(data), "data.num_cases": cases, "train.max_minutes": max_minutes}
        run.path.mkdir(exist_ok=True)
        write_config(load_config(preset, limits | {"out": str(out)} | overrides), run.config)
        return SimpleNamespace(finished=True)

    monkeypatch.setattr(api, "train", train)
    arguments = argparse.Namespace(data=tmp_path, preset="small", minutes=None, published=False)
    few_shot.train_run(arguments, "acdc-4", arm, 0, run.path, 5, {})
    few_shot.train_run(arguments, "acdc-4", arm, 0, run.path, 5, {})
    assert resumed == [False, True]
    write_config(read_config(run.config, {"train.optimizer": "adamw"}), run.config)
    with pytest.raises(SystemExit, match="optimizer=adamw and not muon"):
        few_shot.train_run(arguments, "acdc-4", arm, 0, run.path, 5, {})


def test_runs_of_two_machines_have_folders_of_their_own(module, tmp_path):
    few_shot = module("few_shot_cell")
    folders = {
        few_shot.run_folder(
            argparse.Namespace(runs=tmp_path, preset="small", minutes=None, machine=machine),
            "acdc-4",
            "block",
            0,
        )
        for machine in ("fast", "slow")
    }
    assert len(folders) == 2


def test_a_difference_is_the_mean_over_patients(module, tmp_path):
    # One patient of two scans who gains nothing, one of one scan who gains 0.3.
    for arm, dice in (("no-tokens", (0.5, 0.5, 0.5)), ("block", (0.5, 0.5, 0.8))):
        write_cell(tmp_path, arm, 0, 0.5, FAST)
        rows = zip(("a_1", "a_2", "b_1"), ("a", "a", "b"), dice, strict=True)
        table = pd.DataFrame(rows, columns=["case_id", "patient_id", "dice"]).assign(empty="no")
        table["class"] = "organ"
        write_table(table, tmp_path / "AVX512" / f"{arm}-s0.csv")
    summary = module("few_shot_summary").summarise(tmp_path).set_index("arm")
    assert summary.loc["block", "minus_no_tokens"] == pytest.approx(0.15)


def test_cells_of_other_scans_are_no_pair(module):
    difference = module("few_shot_summary").difference
    dice = pd.Series({"a": 0.5, "b": 0.7})
    scores = {("m", "block", 0): dice, ("m", "x", 0): dice.rename({"b": "c"})}
    with pytest.raises(SystemExit, match="x and block of seed 0 were not scored on the same scans"):
        difference(scores, {name: name for name in "abc"}, "m", "x", "block")


def test_seeds_count_the_same_however_many_patients_they_share(module):
    summary = module("few_shot_summary")
    # Two seeds share half of their patients, who gain nothing; the mean over patients would be 0.2.
    shared = {f"a{number}": 0.01 * number - 0.02 for number in range(5)}
    seeds = [
        pd.Series(shared | {f"{seed}{number}": 0.28 + 0.01 * number for number in range(5)}) for seed in "bc"
    ]
    patients = {f"{name}_1": name for values in seeds for name in values.index}
    scores = {}
    for seed, values in enumerate(seeds):
        scores["here", "arm", seed] = values.rename(lambda name: f"{name}_1")
        scores["here", "block", seed] = 0 * values.rename(lambda name: f"{name}_1")
    found = summary.difference(scores, patients, "here", "arm", "block")
    assert found["minus_block"] == pytest.approx(0.15)
    assert found["by_seed"] == "0.15 0.15"
    assert 0 < found["low"] < 0.15 < found["high"] < 0.3


def test_seeds_of_few_patients_have_an_interval(module):
    seeds = [pd.Series({f"{seed}{number}": 0.1 * number for number in range(4)}) for seed in "ab"]
    low, high = module("few_shot_summary").mean_of_seeds_interval(seeds)
    assert 0 < low < 0.15 < high < 0.3


def test_seeds_that_all_differ_by_the_same_have_no_width(module):
    seeds = [pd.Series({"b": 0.25}), pd.Series({"a": 0.25, "c": 0.25})]
    assert module("few_shot_summary").mean_of_seeds_interval(seeds) == (0.25, 0.25)


def test_an_interval_of_one_seed_is_that_over_its_patients(module):
    values = pd.Series(np.random.default_rng(0).normal(0.02, 0.01, 20), index=[f"p{n}" for n in range(20)])
    found = module("few_shot_summary").mean_of_seeds_interval([values, values.copy()])
    assert found == pytest.approx(bootstrap_interval(values.tolist(), values.index.tolist()), abs=1e-3)


def test_patients_that_were_left_out_are_compared_with_the_preset(module, tmp_path):
    for arm, dice in (("block", 0.7), ("unet-16", 0.6)):
        write_cell(tmp_path, arm, 0, 0.5, FAST)
        write_cell(tmp_path, f"{arm}-left-out", 0, dice, FAST)
        cell = tmp_path / "AVX512" / f"{arm}-s0.json"
        left_out = cell.with_name(f"{arm}-left-out-s0.json")
        left_out.with_suffix(".csv").rename(module("few_shot_summary").unused_table(cell))
        left_out.unlink()
    summary = module("few_shot_summary").summarise(tmp_path).set_index("arm")
    assert summary.loc["unet-16", "unused_minus_block"] == pytest.approx(-0.1)
    assert pd.isna(summary.loc["block", "unused_minus_block"])


def test_a_picture_has_a_line_for_each_training_of_both_on_one_machine(module, tmp_path):
    figure, summary = module("few_shot_figure"), module("few_shot_summary")
    row = tmp_path / "acdc-4-20min"
    row.mkdir()
    for arm, dice in (("block", 0.7), ("dynunet-16-one-network", 0.55)):
        write_cell(row, arm, 0, dice, FAST)
        cell = row / "AVX512" / f"{arm}-s0.csv"
        shutil.copy(cell, summary.unused_table(cell))
    write_cell(row, "block", 1, 0.7, FAST)
    write_cell(row, "dynunet-16-one-network", 1, 0.7, SLOW)
    [(name, parts)] = figure.pairs(tmp_path)
    assert name.startswith("4 hearts (ACDC), seed 0\n")
    assert parts["test"].to_dict() == pytest.approx(dict.fromkeys(("p0", "p1", "p2"), 0.15))
    # None is on the axis, so their numbers are there in letters.
    left_out, tested = figure.draw([(name, parts), (name, {"test": -parts["test"]})]).axes
    assert [text.get_text() for text in left_out.texts] == ["+0.15, +0.15, +0.15 →"]
    assert [text.get_text() for text in tested.texts][1] == "← -0.15, -0.15, -0.15"


@pytest.mark.usefixtures("one_thread")
def test_patients_that_were_left_out_are_in_no_part_of_the_run(module, tmp_path):
    data = write_phantoms(tmp_path / "phantoms", num_cases=12, shape=(20, 24, 16))
    run = tmp_path / "run"
    settings = {"network.tokens": False, "train.max_steps": 2, "train.num_validations": 1}
    api.train(data, out=run, cases=3, overrides=settings, test=False)
    unused, parts = module("few_shot_unused"), RunDir(run).read_manifest()["cases"]
    seen = {name for part in parts.values() for name in part}
    cases = {case.case_id for case in unused.unused_cases(RunDir(run), open_dataset(data))}
    assert cases == {case.case_id for case in open_dataset(data).cases} - seen
    table = unused.score_unused(RunDir(run), Silent())
    assert set(table["case_id"]) == cases


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("arm", ["no-tokens", "unet-16"])
def test_the_timing_of_a_step_takes_one_of_ours_and_of_a_rival(module, tmp_path, arm):
    step = module("step")
    data = write_phantoms(tmp_path / "phantoms", num_cases=8, shape=(20, 24, 16))
    config = step.load_config(overrides={"data.path": str(data)})
    prepared = step.prepare_data(config, drawn=None, progress=step.Silent())
    timed = step.Trained(arm, prepared, argparse.Namespace(data=data))
    timed.step(0)
    assert step.line(arm, timed, 0)["seconds"] > 0
