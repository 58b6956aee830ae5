"""What can be said of a Ray cluster without one: how many runs fit on a node, which addresses name a cluster."""

import socket

import pytest

from medvisionllama.errors import ClusterError
from medvisionllama.experiments.ray_backend import cluster_address
from medvisionllama.experiments.ray_nodes import Nodes, _Node, slots_of


@pytest.mark.parametrize(
    ("cpus", "gpus", "cpus_per_run", "gpus_per_run", "slots"),
    [
        (8, 0, 1, 0, 8),
        (8, 0, 3, 0, 2),
        (0, 0, 1, 0, 0),
        (1, 0, 2, 0, 0),
        (0.3, 0, 0.1, 0, 3),  # 0.3 / 0.1 is a little less than 3
        (8, 0, 1, 1, 0),
        (8, 2, 1, 1, 2),
        (1, 2, 1, 1, 1),
        (8, 3, 1, 2, 1),
        (8, 2, 1, 0.4, 4),  # two on each; the fifth would need a piece of both
        (8, 1, 1, 1 / 3, 3),
    ],
)
def test_runs_that_fit_on_a_node(cpus, gpus, cpus_per_run, gpus_per_run, slots):
    assert slots_of({"CPU": cpus, "GPU": gpus}, cpus_per_run, gpus_per_run) == slots


def test_a_node_without_a_gpu_lists_none():
    assert slots_of({"memory": 1e9, "CPU": 4.0}, 2.0, 0.0) == 2


@pytest.fixture(autouse=True)
def _no_cluster_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_no_address_means_the_cluster_of_this_machine():
    assert cluster_address(None) == "auto"


def test_an_address_given_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address("auto") == "auto"
    with pytest.raises(ClusterError, match="address local"):
        cluster_address(None)


@pytest.mark.parametrize(
    "address", ["local", "ray://head:10001", "http://head:8265", "head", ":6379", "head:"]
)
def test_addresses_that_would_start_a_cluster_or_name_none_are_refused(address):
    with pytest.raises(ClusterError, match="HOST:PORT") as caught:
        cluster_address(address)
    assert "\n" not in str(caught.value)


def test_an_address_where_nobody_listens_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match=r"refused.*ray start --head"):
            cluster_address(f"127.0.0.1:{free.getsockname()[1]}")


def test_an_address_where_somebody_listens_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert cluster_address(address) == address


def test_no_run_goes_to_a_node_that_is_dead_unfit_or_has_not_answered():
    nodes = object.__new__(Nodes)  # a cluster is not needed to choose
    nodes._nodes = {
        "fit": _Node("a", 1, fault=""),
        "asked": _Node("b", 1),
        "unfit": _Node("c", 1, fault="no data"),
        "dead": _Node("d", 1, alive=False, fault=""),
    }
    nodes._listed = {"fit"}
    assert nodes.selector() is None
    nodes._listed = set(nodes._nodes)
    assert nodes.selector() == {"ray.io/node-id": "!in(asked,dead,unfit)"}
