"""Workers on the nodes of a Ray cluster that runs already; none is ever started here."""

import json
import logging
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from medvisionllama._optional import require
from medvisionllama.errors import ClusterError
from medvisionllama.experiments.launch import Ended
from medvisionllama.experiments.worker import COMMAND

_SECONDS_TO_REACH = 5.0
_SECONDS_TO_JOIN = 60.0
_SECONDS_TO_CHECK = 150.0
_SECONDS_TO_STOP = 180.0
_log = logging.getLogger(__name__)


class RayBackend:
    """Runs as tasks of a Ray cluster; how many at a time follows the nodes as they come and go.

    A run whose node is lost is given back as interrupted, so that it goes on elsewhere from its last save.

    Args:
        folder: of the experiment; every node must see it at the same path. `ray.log` in it has what Ray says.
        address: of the head, as host:port; else RAY_ADDRESS, else the cluster that this machine belongs to.
        cpus_per_run: also the threads of a run.
        gpus_per_run: 0 hides all GPUs; a half lets two runs share one.
        folders: more folders that every node must see, those of the datasets.
        worker: arguments of Python, before the folder and the run's id.

    Raises:
        ClusterError: no cluster answers, this machine is not of it, or a node is not fit for the runs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str | None = None,
        cpus_per_run: float = 1.0,
        gpus_per_run: float = 0.0,
        folders: Sequence[Path] = (),
        worker: Sequence[str] = COMMAND,
        seconds_to_join: float = _SECONDS_TO_JOIN,
    ) -> None:
        if cpus_per_run <= 0 or gpus_per_run < 0:
            raise ClusterError(
                f"a run needs some CPU and no less than 0 GPUs, not {cpus_per_run:g} and {gpus_per_run:g}"
            )
        require("ray", extra="cluster")
        self.address = cluster_address(address)
        self.num_slots = 0
        self._log_file = folder / "ray.log"
        self._ended: list[Ended] = []
        self._joined = False
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        folder.mkdir(parents=True, exist_ok=True)
        self._token = folder.resolve() / f".token-{secrets.token_hex(8)}"
        settings = {
            "folder": str(folder.resolve()),
            "token": str(self._token),
            "address": self.address,
            "cpus_per_run": cpus_per_run,
            "gpus_per_run": gpus_per_run,
            "folders": [str(path.resolve()) for path in folders],
            "cwd": str(Path.cwd()),
            "worker": list(worker),
        }
        with self._log_file.open("ab") as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-P", "-m", "medvisionllama.experiments.ray_driver"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Ctrl-C is for the launcher, which then ends the runs.
                start_new_session=True,
            )
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._stdin = self._driver.stdin
        threading.Thread(target=self._read, args=(self._driver.stdout,), daemon=True).start()
        try:
            self._send(json.dumps(settings))
            self._check_in(seconds_to_join)
        except BaseException:
            self.stop()
            raise

    def start(self, run_id: str) -> None:
        self._send(run_id)

    def wait(self, seconds: float) -> list[Ended]:
        deadline = time.monotonic() + seconds
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            self._take(left)
        while self._take(0.0):
            pass
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        # Its end of input is what tells the driver; it may be gone already.
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._driver.wait(_SECONDS_TO_STOP if self._joined else 0.0)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait()
        # A driver that died with its cluster could not.
        self._token.unlink(missing_ok=True)

    def _check_in(self, seconds_to_join: float) -> None:
        """Wait until the cluster is joined and its nodes are found fit."""
        self._await(lambda: self._joined, seconds_to_join, "does not answer as the head of a Ray cluster")
        self._await(lambda: self.num_slots > 0, _SECONDS_TO_CHECK, "has nodes that do not answer")

    def _await(self, reached: Callable[[], bool], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            left = deadline - time.monotonic()
            if left <= 0:
                raise ClusterError(
                    f"{self.address} {otherwise} (waited {seconds:g} s; see {self._log_file}); look with `ray status --address {self.address}`"
                )
            self._take(left)

    def _take(self, seconds: float) -> bool:
        """Act on the next message; False if none came in time."""
        try:
            message = self._messages.get(timeout=seconds) if seconds else self._messages.get_nowait()
        except queue.Empty:
            return False
        if message is None:
            # Left there for whoever asks again.
            self._messages.put(None)
            raise ClusterError(
                f"lost the Ray cluster at {self.address} (see {self._log_file}); when it runs again, repeat the command: it goes on from what is saved"
            )
        if "error" in message:
            raise ClusterError(message["error"])
        if "ended" in message:
            self._ended.append(Ended(message["ended"], message["exit_code"], message["where"]))
        elif "slots" in message:
            self.num_slots = message["slots"]
        elif "joined" in message:
            self._joined = True
        else:
            _log.warning("%s", message["say"])
        return True

    def _send(self, line: str) -> None:
        # A driver that is gone shows in the messages, with the reason.
        with suppress(BrokenPipeError):
            self._stdin.write(line + "\n")
            self._stdin.flush()

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)


def cluster_address(asked: str | None) -> str:
    """Address to join: as asked, else RAY_ADDRESS, else "auto", the cluster that this machine belongs to.

    Raises:
        ClusterError: it is none that can be joined, or nobody listens there.
    """
    address = asked or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        return address
    host, colon, port = address.rpartition(":")
    if "/" in address or not colon or not host or not port.isdigit():
        raise ClusterError(
            f"--address {address}: not an address of a running cluster; give HOST:PORT of its head (port 6379 unless chosen), or auto on a machine of it"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_REACH).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClusterError(
            f"no Ray cluster at {address} ({reason}); start its head with `ray start --head --port {port}`, or correct --address"
        ) from None
    return address
