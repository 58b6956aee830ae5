"""Runs on a Ray cluster of two nodes, both on this machine: spread, lost with their node, stopped, refused."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from medvisionllama.errors import ClusterError
from medvisionllama.experiments.launch import launch
from medvisionllama.experiments.matrix import expand
from medvisionllama.experiments.ray_backend import RayBackend
from medvisionllama.experiments.store import Experiment
from medvisionllama.progress import Silent
from medvisionllama.run_dir import RunDir

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

# A run id says what the stub does: sleep-SECONDS-EXITCODE-NAME. Asked to end, it takes a moment to save.
STUB = """
import os, signal, sys, time
from pathlib import Path
folder, run_id = sys.argv[1:]
_, seconds, code, _ = run_id.split("-")
parent = os.getppid()
def end(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("threads", os.environ["OMP_NUM_THREADS"], "gpus", os.environ["CUDA_VISIBLE_DEVICES"] or "none", flush=True)
print("offline", os.environ.get("HF_HUB_OFFLINE"), flush=True)
print("in", os.getcwd(), flush=True)
deadline = time.monotonic() + float(seconds)
while time.monotonic() < deadline:
    time.sleep(0.05)
    if os.getppid() != parent:
        end()
sys.exit(int(code))
"""

MATRIX = """
name: ray
tasks: {phantoms: {phantoms: 8}}
models:
  tiny:
    set:
      network.stem_channels: [4, 6, 8]
      network.width: 24
      network.depth: 1
      network.insert_after: 1
      network.num_heads: 2
      network.insert: none
arms: {a: {}, b: {set: {network.dropout: 0.1}}}
reference: a
seeds: [0, 1, 2]
set:
  train.max_steps: 20
  train.batch_size: 1
  train.num_validations: 2
  train.save_seconds: 0.001
  train.device: cpu
  data.max_crop_voxels: 4096
"""


TRIES = 5
NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


def join(cluster, name, **options):
    """Start a node, the head if it is the first.

    Ray gives up a node whose agents have not started within 15 s, whatever it is told (ray-project/ray#65983). That
    is little on a busy machine, so it gets a few tries; if none succeeds, the tests fail.
    """
    for _ in range(TRIES - 1):
        try:
            return cluster.add_node(**NODE, node_name=name, **options)
        except Exception as error:  # noqa: BLE001 - Ray raises nothing more exact
            assert "timed out during startup" in str(error), error  # noqa: PT017
    return cluster.add_node(**NODE, node_name=name, **options)


@pytest.fixture(scope="module")
def cluster():
    """A head and one more node of one CPU each; what fails here fails, whatever the machine."""
    from ray.cluster_utils import Cluster

    # Sockets have short names, so pytest's own long paths do not do.
    home = tempfile.mkdtemp(prefix="ray-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", home)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Other work on this machine is no reason to kill a run.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        nodes = Cluster()
        try:
            join(nodes, "first", num_cpus=1)
            join(nodes, "second", num_cpus=1)
            yield nodes
        finally:
            nodes.shutdown()
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


@pytest.fixture
def open_backend(cluster, stub, tmp_path):
    """Open a backend that starts the stub; it is stopped at the end."""
    opened = []

    def open_one(**options):
        options = {"address": cluster.address, "worker": [str(stub)], **options}
        backend = RayBackend(tmp_path / "experiment", **options)
        opened.append(backend)
        return backend

    yield open_one
    for backend in opened:
        backend.stop()


def wait_until(true, *, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def gather(backend, number):
    """Ended workers by run."""
    ended = {}

    def enough():
        ended.update({one.run_id: one for one in backend.wait(0.5)})
        return len(ended) == number

    wait_until(enough)
    return ended


def said(folder, run_id):
    path = folder / "experiment" / "runs" / run_id / "log.txt"
    return path.read_text() if path.is_file() else ""


def test_workers_run_on_both_nodes_and_their_exit_codes_come_back(open_backend, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    backend = open_backend()
    assert backend.num_slots == 2
    for run_id in ("sleep-1-0-a", "sleep-1-1-b", "sleep-0-3-c"):
        backend.start(run_id)
    ended = gather(backend, 3)
    assert {run_id: one.exit_code for run_id, one in ended.items()} == {
        "sleep-1-0-a": 0,
        "sleep-1-1-b": 1,
        "sleep-0-3-c": 3,
    }
    assert {ended["sleep-1-0-a"].where, ended["sleep-1-1-b"].where} == {"first", "second"}
    assert "threads 1 gpus none\noffline 1" in said(tmp_path, "sleep-1-0-a")
    assert f"in {tmp_path.resolve()}\n" in said(tmp_path, "sleep-1-0-a")
    backend.stop()
    assert sorted(path.name for path in (tmp_path / "experiment").iterdir()) == ["ray.log", "runs"]


def test_stop_lets_workers_save(open_backend, tmp_path):
    backend = open_backend()
    runs = ["sleep-300-0-a", "sleep-300-0-b", "sleep-300-0-queued"]
    for run_id in runs:
        backend.start(run_id)
    wait_until(lambda: all("offline" in said(tmp_path, run_id) for run_id in runs[:2]))
    backend.stop()
    assert [said(tmp_path, run_id).count("saved") for run_id in runs] == [1, 1, 0]


def test_workers_of_a_killed_launcher_save(cluster, stub, tmp_path):
    script = f"""
import time
from pathlib import Path
from medvisionllama.experiments.ray_backend import RayBackend
backend = RayBackend(Path({str(tmp_path / "experiment")!r}), address={cluster.address!r}, worker=[{str(stub)!r}])
backend.start("sleep-300-0-a")
time.sleep(300)
"""
    launcher = subprocess.Popen([sys.executable, "-c", script])
    wait_until(lambda: "offline" in said(tmp_path, "sleep-300-0-a"))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: "saved" in said(tmp_path, "sleep-300-0-a"))


def test_runs_get_gpus_of_their_own(cluster, open_backend, tmp_path):
    node = join(cluster, "with-gpus", num_cpus=2, num_gpus=2)
    try:
        backend = open_backend(gpus_per_run=1)
        assert backend.num_slots == 2
        for run_id in ("sleep-1-0-a", "sleep-1-0-b"):
            backend.start(run_id)
        assert {one.where for one in gather(backend, 2).values()} == {"with-gpus"}
        first, second = ("gpus 0" in said(tmp_path, f"sleep-1-0-{name}") for name in "ab")
        assert first != second
        assert all("none" not in said(tmp_path, f"sleep-1-0-{name}").partition("offline")[0] for name in "ab")
        backend.stop()
    finally:
        cluster.remove_node(node, allow_graceful=False)


def test_a_node_that_does_not_see_the_data_is_named(open_backend, tmp_path):
    with pytest.raises(
        ClusterError, match=r"node (first|second): \S*/scans does not exist there .*1 more"
    ) as caught:
        open_backend(folders=[tmp_path / "scans"])
    assert "\n" not in str(caught.value)


def test_a_node_without_this_version_is_refused_or_left_out_if_it_joins_later(
    cluster, open_backend, tmp_path, monkeypatch, caplog
):
    other = tmp_path / "other"
    shutil.copytree(Path(sys.modules["medvisionllama"].__file__).parent, other / "medvisionllama")
    with (other / "medvisionllama" / "types.py").open("a") as file:
        file.write("# changed\n")
    backend = open_backend()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(other))
        node = join(cluster, "other", num_cpus=4)
    try:
        wait_until(lambda: backend.wait(0.2) or "node other takes no runs" in caplog.text)
        assert backend.num_slots == 2
        for name in "abcd":
            backend.start(f"sleep-0-0-{name}")
        assert {one.where for one in gather(backend, 4).values()} <= {"first", "second"}
        with pytest.raises(ClusterError, match=r"node other: medvisionllama is .* there and .* here"):
            open_backend()
    finally:
        cluster.remove_node(node, allow_graceful=False)


def test_a_node_that_has_just_died_is_no_hindrance(cluster, open_backend):
    node = join(cluster, "dead", num_cpus=1)
    cluster.remove_node(node, allow_graceful=False)
    assert open_backend().num_slots == 2


def test_more_than_a_node_has_is_refused(open_backend):
    with pytest.raises(ClusterError, match="no node of the cluster has 64 CPUs and 0 GPUs"):
        open_backend(cpus_per_run=64)


def test_a_server_that_is_no_cluster_is_given_up_in_time(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="does not answer as the head of a Ray cluster"):
            RayBackend(tmp_path, address=address, seconds_to_join=4.0)
    assert capfd.readouterr() == ("", "")


class Watched:
    """A backend whose starts and ends are kept, and which kills a node when a run on it has saved."""

    def __init__(self, backend, cluster, node, folder):
        self.backend, self.cluster, self.node, self.folder = backend, cluster, node, folder
        self.starts, self.ends, self.killed = [], [], None

    @property
    def num_slots(self):
        return self.backend.num_slots

    def start(self, run_id):
        self.starts.append(run_id)
        self.backend.start(run_id)

    def wait(self, seconds):
        ended = self.backend.wait(min(seconds, 0.02))
        self.ends += ended
        if self.killed is None and any(one.where == "third" for one in self.ends):
            self._kill_if_a_run_there_has_saved()
        return ended

    def stop(self):
        self.backend.stop()

    def _kill_if_a_run_there_has_saved(self):
        over = {one.run_id for one in self.ends}
        for run_id in set(self.starts) - over:
            run = self.folder / "runs" / run_id
            log = run / "log.txt"
            there = log.is_file() and self.node.node_id in log.read_text()
            if there and RunDir(run).state.is_file():
                self.killed = run_id
                self.cluster.remove_node(self.node, allow_graceful=False)
                return


def test_runs_of_a_node_that_dies_go_on_elsewhere_and_nothing_finished_is_repeated(cluster, tmp_path):
    source = tmp_path / "matrix.yaml"
    source.write_text(MATRIX)
    experiment = Experiment.create(tmp_path / "experiment", source, data_root=None)
    runs = list(expand(experiment.matrix))
    assert len(runs) == 6
    second = next(node for node in cluster.worker_nodes)
    node = join(cluster, "third", num_cpus=1)
    cluster.remove_node(second)
    backend = RayBackend(experiment.path, address=cluster.address)
    watched = Watched(backend, cluster, node, experiment.path)
    outcome = launch(experiment, runs, watched, progress=Silent())
    assert watched.killed, "no run was lost: it was too fast"
    assert (outcome.done, outcome.failed, outcome.interrupted) == (6, [], False)
    assert {one.where for one in watched.ends if one.exit_code == 0} == {"first", "third"}
    assert Counter(watched.starts) == Counter([run.run_id for run in runs] + [watched.killed])
    lost = experiment.files(watched.killed)
    assert "lost on third" in lost.log.read_text()
    assert not lost.read_failures()
    steps = [record["step"] for record in RunDir(lost.path).read_history()]
    assert steps == sorted(set(steps))
    again = launch(experiment, runs, watched, progress=Silent())
    assert (again.done, again.skipped) == (0, 6)
