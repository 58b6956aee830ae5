"""Watching an experiment until it is over, and options that say nothing together."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from medvisionllama._files import lock_if_free, write_json
from medvisionllama.experiments import verbs
from medvisionllama.experiments.launch import Outcome
from medvisionllama.experiments.matrix import expand
from medvisionllama.experiments.store import Experiment


@pytest.fixture
def study(phantoms, tmp_path):
    """An experiment of two runs, none of which has begun."""
    matrix = {
        "name": "mine",
        "tasks": {"phantoms": {"data": phantoms.name}},
        "models": {"small": {}},
        "arms": {"none": {"set": {"network.insert": "none"}}, "block": {}},
        "reference": "none",
        "set": {"train.max_steps": 5},
    }
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(matrix, sort_keys=False))
    return Experiment.create(tmp_path / "study", tmp_path / "matrix.yaml", data_root=phantoms.parent)


def test_watching_goes_on_while_what_failed_may_be_tried_again(study, cli, monkeypatch):
    first, second = (study.files(run.run_id) for run in expand(study.matrix))

    def happenings():
        write_json(first.done, {"test_dice": {"none": 0.5}})
        yield "one is to come"
        second.add_failure("out of memory", "Traceback ...", where="here")
        for _ in range(10):
            yield "over, unless it is tried again"
        with lock_if_free(second.lock):
            yield "as it is"
        write_json(second.done, {"test_dice": {"block": 0.5}})
        yield "over"

    ahead, waits = happenings(), []

    def sleep(seconds):
        waits.append(seconds)
        next(ahead)

    monkeypatch.setattr("medvisionllama.cli.experiment.time", SimpleNamespace(sleep=sleep))
    outcome = cli("experiment", "status", study.path, "--watch")
    assert outcome.code == 0, outcome.err
    assert len(waits) == 13
    assert min(waits) >= 1
    # First what a low screen must not lose.
    assert outcome.out.index("2 runs: 2 done") < outcome.out.index("phantoms")


@pytest.mark.parametrize(("limit", "longer"), [("train.epochs", 10), ("train.max_steps", 1)])
def test_the_time_left_is_that_of_the_training_shares_that_are_left(study, limit, longer):
    matrix = yaml.safe_load((study.path / "matrix.yaml").read_text())
    matrix |= {"set": {limit: 5}, "fractions": [0.1, 1.0]}
    (study.path / "matrix.yaml").write_text(yaml.safe_dump(matrix))
    few, other, *whole = expand(Experiment.open(study.path).matrix)
    assert [run.fraction for run in whole] == [1.0, 1.0]
    facts = {"test_dice": {"none": 0.5}, "seconds": 360.0, "evaluation_seconds": 36.0}
    write_json(study.files(few.run_id).done, facts)
    with lock_if_free(study.files(other.run_id).lock):
        left = verbs.status(study.path).seconds_left()
        # One run of a tenth of the cases, and two of all of them.
        assert left == pytest.approx(360 + 36 + 2 * (longer * 360 + 36))
        write_json(study.files(whole[0].run_id).done, {**facts, "seconds": 1000.0})
        assert verbs.status(study.path).seconds_left() == pytest.approx(360 + 36 + 1000 + 36)


def test_an_error_with_brackets_is_shown_as_it_is(study, cli, monkeypatch):
    for run in expand(study.matrix):
        study.files(run.run_id).add_failure("no [/red] in [memory]", "Traceback ...", where="here")
    waits = []
    monkeypatch.setattr("medvisionllama.cli.experiment.time", SimpleNamespace(sleep=waits.append))
    outcome = cli("experiment", "status", study.path, "--watch")
    # Nobody tries it again.
    assert 60 <= sum(waits) < 70
    assert outcome.code == 0, outcome.err
    assert "no [/red] in [memory]" in " ".join(outcome.out.split())


def test_a_table_that_is_watched_is_no_json(study, cli):
    outcome = cli("experiment", "status", study.path, "--watch", "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--watch" in outcome.err


@pytest.mark.parametrize(
    "option", [("--gpus-per-run", 1), ("--address", "anna:6379")], ids=lambda option: option[0]
)
def test_options_of_a_cluster_are_refused_on_one_machine(study, cli, option):
    outcome = cli("experiment", "run", study.path, *option)
    assert outcome.code == 2
    assert "add --backend ray" in outcome.err
    assert not (study.path / "runs").exists()


@pytest.mark.parametrize("verb", ["run", "status", "report"])
def test_a_folder_beside_an_experiment_s_own_is_refused(study, cli, verb, tmp_path):
    outcome = cli("experiment", verb, study.path, "--out", tmp_path / "elsewhere")
    assert outcome.code == 2
    assert "is an experiment's folder already" in outcome.err
    assert not (tmp_path / "elsewhere").exists()


def test_runs_that_the_matrix_dropped_meanwhile_are_told(study, cli, monkeypatch):
    ended = Outcome(done=1, dropped=2, folder=str(study.path))
    monkeypatch.setattr(verbs, "run", lambda *arguments, **options: ended)
    outcome = cli("experiment", "run", study.path)
    assert "1 done now, 0 before, 0 failed, 2 left out as the matrix changed; see: " in outcome.out


def test_refused_options_leave_no_folder(tmp_path, cli):
    matrix = Path(__file__).parents[2] / "configs" / "matrix" / "smoke.yaml"
    outcome = cli("experiment", "run", matrix, "--out", tmp_path / "new", "--gpus-per-run", 1)
    assert outcome.code == 2
    assert not (tmp_path / "new").exists()
