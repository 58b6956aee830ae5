"""The nodes of a Ray cluster: how many runs each can take, and whether it is fit for them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvisionllama.errors import ClusterError
from medvisionllama.experiments.ray_node import inspect

_LABEL = "ray.io/node-id"
"""Ray gives every node a label with its id."""
_SECONDS_TO_ANSWER = 120.0


def slots_of(resources: Mapping[str, float], cpus_per_run: float, gpus_per_run: float) -> int:
    """Runs that fit on a node at a time; a run shares a GPU with others or has whole ones, as Ray assigns them.

    >>> slots_of({"CPU": 8.0, "GPU": 2.0}, 1.0, 0.4)
    4
    """
    slots = int(resources.get("CPU", 0.0) / cpus_per_run + 1e-6)
    if gpus_per_run:
        gpus = int(resources.get("GPU", 0.0))
        on_gpus = gpus * int(1 / gpus_per_run + 1e-6) if gpus_per_run < 1 else gpus // math.ceil(gpus_per_run)
        slots = min(slots, on_gpus)
    return slots


@dataclass
class _Node:
    name: str
    slots: int
    alive: bool = True
    fault: str | None = None
    """Empty if it is fit; None until it has said so."""
    check: Any = None


class Nodes:
    """What is known of the nodes; those that join later are looked at too, and left out if they are not fit."""

    def __init__(
        self, cpus_per_run: float, gpus_per_run: float, token: str, folders: Sequence[str], expected: str
    ) -> None:
        import ray

        self.cpus_per_run = cpus_per_run
        self.gpus_per_run = gpus_per_run
        self._asked = (token, list(folders), expected)
        # No CPU: a node that is busy with others' work can answer too.
        self._inspect = ray.remote(num_cpus=0, max_retries=0)(inspect)
        self._nodes: dict[str, _Node] = {}
        self._listed: set[str] = set()
        """Those that Ray believes to be alive."""

    @property
    def slots(self) -> int:
        return sum(node.slots for node in self._nodes.values() if node.alive and node.fault == "")

    def name(self, node_id: str) -> str:
        return self._nodes[node_id].name if node_id in self._nodes else ""

    def lost(self, node_id: str) -> None:
        """Take no more runs to a node that a run was lost with; Ray lists it for up to a minute more."""
        if node_id in self._nodes:
            self._nodes[node_id].alive = False

    def selector(self) -> dict[str, str] | None:
        """Label selector of Ray that leaves out the nodes that are dead, not fit, or have not said so yet."""
        avoided = [
            node_id
            for node_id in sorted(self._listed)
            if (node := self._nodes[node_id]).fault != "" or not node.alive
        ]
        return {_LABEL: f"!in({','.join(avoided)})"} if avoided else None

    def check(self) -> None:
        """Wait until every node that can take runs has answered.

        Raises:
            ClusterError: one is not fit, or none can take a run.
        """
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        self.look()
        while asked := [node for node in self._nodes.values() if node.alive and node.check is not None]:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"node {asked[0].name} did not answer in {_SECONDS_TO_ANSWER:g} s; take it out of the cluster, or see Ray's logs there"
                )
            time.sleep(0.1)
            self.look()
        faults = [
            f"node {node.name}: {node.fault}" for node in self._nodes.values() if node.alive and node.fault
        ]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ClusterError(faults[0] + more)
        if not self.slots:
            raise ClusterError(
                f"no node of the cluster has {self.cpus_per_run:g} CPUs and {self.gpus_per_run:g} GPUs for a run; ask for less per run"
            )

    def look(self) -> list[str]:
        """Ask new nodes, hear their answers, and return what a person should know."""
        import ray

        alive = {facts["NodeID"]: facts for facts in ray.nodes() if facts["Alive"]}
        said = []
        for node_id, node in self._nodes.items():
            if node_id in self._listed and node_id not in alive:
                node.alive = False
                said.append(f"node {node.name} has left the cluster")
        for node_id in alive.keys() - self._nodes.keys():
            self._nodes[node_id] = self._ask(node_id, alive[node_id])
        self._listed = set(alive)
        for node in self._nodes.values():
            if node.check is not None and ray.wait([node.check], timeout=0)[0]:
                said += self._hear(node)
        return said

    def _ask(self, node_id: str, facts: Mapping[str, Any]) -> _Node:
        address, given = facts["NodeManagerAddress"], facts["NodeName"]
        name = facts["NodeManagerHostname"] if given == address else given
        node = _Node(name, slots_of(facts["Resources"], self.cpus_per_run, self.gpus_per_run))
        if node.slots:
            node.check = self._inspect.options(label_selector={_LABEL: node_id}).remote(*self._asked)
        return node

    def _hear(self, node: _Node) -> list[str]:
        import ray

        try:
            answer = ray.get(node.check)
        except ray.exceptions.RayTaskError as error:
            last = (str(error).strip().splitlines() or ["no reason given"])[-1]
            answer = {
                "fault": f"medvisionllama cannot be used there ({last}); install it as here",
                "doubt": "",
            }
        except ray.exceptions.RayError:
            # It died, perhaps long ago: Ray lists a node for up to a minute after it was last seen.
            node.check, node.alive = None, False
            return []
        node.check, node.fault = None, answer["fault"]
        if node.fault:
            return [f"node {node.name} takes no runs: {node.fault}"]
        return [f"node {node.name}: {answer['doubt']}"] if answer["doubt"] else []
