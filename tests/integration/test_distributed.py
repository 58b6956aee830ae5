"""One run by two processes on gloo: what one process would have done with the same batch, to rounding."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from medvisionllama import api
from medvisionllama.checkpoint import load_tensors
from medvisionllama.run_dir import RunDir
from medvisionllama.training.loop import TrainingLoop

from .conftest import HANG_SECONDS, TINY

pytestmark = pytest.mark.usefixtures("one_thread")

BIN = Path(sys.executable).parent
ACCELERATE = [
    *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0),
]
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node", 2]
# Ten passes over five cases, four crops a step.
STEPS, EPOCHS = 12, 10
SETTINGS = {
    **TINY,
    "train.precision": "fp32",
    # Each makes rounding grow to several times the tolerances in these few steps. The batches of ranks are
    # compared bit for bit in the sampler's own tests.
    "network.context_channels": None,
    "network.refine": False,
    "network.join_convolutions": 1,
    "augment.elastic": 0.0,
    "augment.bias_field": 0.0,
    # Five cases train, so batches of two cross the ends of epochs; two such batches make a step.
    "train.batch_size": 2,
    "train.accumulate": 2,
    "train.warmup_steps": 5,
    # The preset's rate makes rounding grow as well, where batches of one and of two take different kernels (AVX2):
    # over four training seeds losses differed by up to 2e-3 there, and by 2e-7 at this one.
    "train.learning_rate": 5e-4,
    # Every step has its line in history.jsonl.
    "train.num_validations": STEPS,
}


@pytest.fixture
def start():
    """Start a run; one that a failed test leaves behind is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(launcher: list, program: list, data: Path, out: Path, *more: object) -> subprocess.Popen[str]:
        command = [*launcher, *program, "train", data, "--out", out, *more]
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for the end and return what was printed."""
    try:
        return process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail("the run hung")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(20 * HANG_SECONDS):
        if path.is_file():
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended before its first save: {process.communicate()[1]}")
        time.sleep(0.05)
    pytest.fail("the run saved nothing")


def settings(**extra: object) -> list[str]:
    values = {**SETTINGS, **{key.replace("__", "."): value for key, value in extra.items()}}
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """Process id of a rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"no process of rank {rank} among {children}")


def assert_same_run(run: RunDir, other: RunDir) -> None:
    ours, theirs = run.read_history(), other.read_history()
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for key, tolerance in (("loss", 2e-5), ("dice", 2e-4), ("gate_rms", 1e-6)):
        found, expected = ([record[key] for record in records] for records in (ours, theirs))
        assert found == pytest.approx(expected, abs=tolerance, rel=0), key
    for path in ("best", "state"):
        found, expected = (load_file(getattr(which, path)) for which in (run, other))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # A key's bias cancels in attention: its gradient is rounding alone, which Adam makes as large as any.
            tolerance = 1e-3 if name.endswith("qkv.bias") else 2e-5
            difference = float((found[name] - tensor).abs().max())
            assert difference < tolerance, f"{name} differs by {difference}"


@pytest.fixture(scope="module")
def alone(phantoms, tmp_path_factory):
    """The run of one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    api.train(phantoms, out=path, epochs=EPOCHS, overrides=SETTINGS)
    history = RunDir(path).read_history()
    assert len(history) == STEPS
    assert history[-1]["loss"] < 0.97 * history[0]["loss"], "the run must learn, or equality says little"
    return RunDir(path)


def test_two_processes_train_validate_and_test_as_one_does(start, alone, phantoms, tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(ACCELERATE, ["-m", "medvisionllama"], phantoms, run.path, "--epochs", EPOCHS, *settings())
    out, errors = finish(process)
    assert process.returncode == 0, errors
    assert_same_run(run, alone)
    assert run.evaluation.read_text() == alone.evaluation.read_text()
    assert errors.count("kept for the test") == 1
    assert out.splitlines()[-1] == str(run.report)
    assert not re.search(r"warning|error|destroy_process_group", errors, re.IGNORECASE)


BROKEN_SECOND = """
import os
from medvisionllama.cli.main import main
from medvisionllama.training.loop import TrainingLoop

step = TrainingLoop._step


def broken(self):
    if self.state.step == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("the second process broke")
    return step(self)


TrainingLoop._step = broken
main()
"""

SAYS_ITS_THREADS = """
import atexit
import sys
from pathlib import Path

from medvisionllama.cli.main import main


def say() -> None:
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    sys.stderr.write(f"threads at the end: {sorted(names)}\\n")


atexit.register(say)
main()
"""

SAYS_WHAT_IT_HOLDS = """
from accelerate import Accelerator

from medvisionllama.checkpoint import frozen
from medvisionllama.cli.main import main
from medvisionllama.training import sharding

shard = sharding.shard_frozen_block


def shard_and_say(model, processes):
    whole = {name: tensor.numel() for name, tensor in frozen(model).items() if ".layers." in name}
    shard(model, processes)
    held = sum(frozen(model)[name].to_local().numel() for name in whole)
    print("process", processes.index, "holds", held / sum(whole.values()), flush=True)


sharding.shard_frozen_block = shard_and_say
# With several GPUs Accelerate refuses to wrap shards; here it takes them for such.
Accelerator.multi_device = property(lambda self: True)
main()
"""


@pytest.fixture
def program(tmp_path):
    """Write a program that is the command line with something changed."""

    def write(text: str) -> list[object]:
        path = tmp_path / "program.py"
        path.write_text(text)
        return [path]

    return write


def test_ctrl_c_stops_both_processes_and_one_process_goes_on_to_the_same_end(
    start, alone, phantoms, tmp_path
):
    run = RunDir(tmp_path / "run")
    process = start(TORCHRUN, ["-m", "medvisionllama"], phantoms, run.path, "--epochs", EPOCHS, *settings())
    wait_for(run.state, process)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = finish(process)
    assert process.returncode != 0
    step = load_tensors(run.state)[1]["state"]["step"]
    assert 0 < step < STEPS
    assert errors.count(f"stopped at step {step}; go on with") == 1
    assert str(run.report) not in out
    assert api.train(phantoms, out=run.path, resume=True, test=False).finished
    assert_same_run(run, alone)


def test_an_exception_in_one_process_ends_the_run(start, phantoms, tmp_path, program):
    run = RunDir(tmp_path / "run")
    process = start(TORCHRUN, program(BROKEN_SECOND), phantoms, run.path, "--epochs", EPOCHS, *settings())
    _, errors = finish(process)
    assert process.returncode not in (0, None)
    assert "the second process broke" in errors
    assert not run.report.exists()


def test_a_sharded_block_is_held_in_halves_and_changes_nothing(start, alone, phantoms, tmp_path, program):
    run = RunDir(tmp_path / "run")
    arguments = ["--epochs", EPOCHS, "--no-test", *settings(train__shard_block="true")]
    process = start(TORCHRUN, program(SAYS_WHAT_IT_HOLDS), phantoms, run.path, *arguments)
    out, errors = finish(process)
    assert process.returncode == 0, errors
    assert sorted(re.findall(r"process \d holds [\d.]+", out)) == [
        "process 0 holds 0.5",
        "process 1 holds 0.5",
    ]
    assert_same_run(run, alone)


TWICE = """
import json, sys
from medvisionllama import api

data, out, settings = sys.argv[2], sys.argv[4], json.loads(sys.argv[5])
for name in ("first", "second"):
    api.train(data, out=f"{out}/{name}", epochs=1, overrides=settings, test=False)
"""


def test_a_session_of_two_processes_trains_one_run_after_the_other(start, phantoms, tmp_path, program):
    process = start(TORCHRUN, program(TWICE), phantoms, tmp_path, json.dumps(SETTINGS))
    _, errors = finish(process)
    assert process.returncode == 0, errors
    first, second = (RunDir(tmp_path / name).read_history() for name in ("first", "second"))
    assert [record["loss"] for record in first] == [record["loss"] for record in second]


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(start, alone, phantoms, tmp_path, monkeypatch):
    run, step, taken = RunDir(tmp_path / "run"), TrainingLoop._step, []

    @contextmanager
    def after_five_steps(*, echo_seconds):
        yield lambda: len(taken) == 5

    monkeypatch.setattr(TrainingLoop, "_step", lambda loop: taken.append(1) or step(loop))
    monkeypatch.setattr("medvisionllama.training.loop.interruptible", after_five_steps)
    assert api.train(phantoms, out=run.path, epochs=EPOCHS, overrides=SETTINGS, test=False).steps == 5
    process = start(ACCELERATE, ["-m", "medvisionllama"], phantoms, run.path, "--resume", "--no-test")
    _, errors = finish(process)
    assert process.returncode == 0, errors
    assert_same_run(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_process_ends_the_run(start, number, phantoms, tmp_path):
    run = RunDir(tmp_path / "run")
    # The first save comes at once, and the run does not end by itself.
    arguments = ["--epochs", 2000, *settings(train__save_seconds=0.1)]
    process = start(TORCHRUN, ["-m", "medvisionllama"], phantoms, run.path, *arguments)
    wait_for(run.state, process)
    os.kill(worker(process, 1), number)
    _, errors = finish(process)
    assert process.returncode != 0
    assert ("stopped at step" in errors) == (number == signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train__batch_size": 3}, "train.batch_size=3 is shared by all processes and is not a multiple of"),
        ({"network__block__layers": 99}, "99"),
    ],
)
def test_what_is_wrong_is_said_once(start, extra, message, phantoms, tmp_path):
    run = RunDir(tmp_path / "run")
    arguments = ["--epochs", 1, *settings(**extra)]
    process = start(TORCHRUN, ["-m", "medvisionllama"], phantoms, run.path, *arguments)
    _, errors = finish(process)
    assert process.returncode != 0
    assert sum(line.startswith("medvisionllama: ") and message in line for line in errors.splitlines()) == 1
    assert "terminate called" not in errors
    assert not run.path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"network__block__layers": 99}], ids=["done", "failed"])
def test_gloos_threads_end_with_the_run(start, extra, phantoms, tmp_path, program):
    """Those that outlive the interpreter abort the process, now and then."""
    arguments = ["--epochs", 1, *settings(**extra)]
    _, errors = finish(start(TORCHRUN, program(SAYS_ITS_THREADS), phantoms, tmp_path / "run", *arguments))
    said = [line for line in errors.splitlines() if "threads at the end" in line]
    assert said, errors
    assert not any("gloo" in line for line in said), said


@pytest.mark.slow
def test_accelerates_own_sharding_is_refused_in_one_line(start, phantoms, tmp_path):
    launcher = ["--use_fsdp" if part == "--multi_gpu" else part for part in ACCELERATE]
    run = RunDir(tmp_path / "run")
    process = start(launcher, ["-m", "medvisionllama"], phantoms, run.path, "--epochs", 1, *settings())
    _, errors = finish(process)
    assert process.returncode != 0
    assert "train.shard_block=true" in errors
    assert not run.path.exists()
