"""What Ray runs on a node of a cluster: whether the node is fit for runs, and one run as a process.

python -m medvisionllama.experiments.ray_node     prints which medvisionllama this is
"""

import hashlib
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import medvisionllama
from medvisionllama._files import is_locked
from medvisionllama.devices import thread_limits
from medvisionllama.training.interrupts import wait_or_kill

_SECONDS_TO_APPEAR = 10.0
"""A network disk may show a new file late."""


def code_version() -> str:
    """Version and a hash of the package's source, since versions change more rarely than code."""
    root = Path(medvisionllama.__file__).parent
    content = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{medvisionllama.__version__} ({content.hexdigest()[:12]})"


def inspect(token: str, folders: Sequence[str], expected: str) -> dict[str, str]:
    """Say what is wrong with this node, as `fault` (it cannot take runs) and `doubt`; empty if nothing is.

    Args:
        token: file in the folder of the experiment, whose lock the asking process holds.
        folders: further folders that runs read.
        expected: `code_version` of the launcher.
    """
    fault = _folder_fault(Path(token)) or next(
        (f"{folder} does not exist there" for folder in folders if not Path(folder).is_dir()), ""
    )
    fault = fault or _code_fault(expected)
    doubt = "" if fault or is_locked(Path(token)) else "file locks of other machines are not seen there"
    return {"fault": fault, "doubt": doubt}


def work(
    arguments: Sequence[str],
    log: str,
    *,
    cwd: str,
    threads: int,
    uses_gpu: bool,
    environment: Mapping[str, str],
) -> Iterator[str | int]:
    """Run Python with these arguments on this node; yield the node's id at once, and at the end the exit code.

    Args:
        log: file that the output is added to.
        cwd: folder to run in, the launcher's; on a node that lacks it, the one that Ray runs in.
        environment: of the launcher, as far as runs depend on it; what is set on the node stands.
    """
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    yield node_id
    own = {**environment, **os.environ, **thread_limits(threads)}
    if not uses_gpu:
        # A run that was given no GPU must not find those of its neighbours.
        own["CUDA_VISIBLE_DEVICES"] = ""
    begin = f"{time.strftime('%H:%M:%S')} on {platform.node()}, Ray node {node_id}\n"
    yield _run([sys.executable, *arguments], Path(log), begin, own, cwd)


def _run(
    command: Sequence[str], log: Path, begin: str, environment: Mapping[str, str], cwd: str = "."
) -> int:
    """Run a command to its end; a cancelled task, a KeyboardInterrupt here, becomes SIGTERM there."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("ab") as file:
            file.write(begin.encode())
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd if os.access(cwd, os.X_OK) else None,
            )
        # Ray interrupts the main thread between two instructions, never in a system call: no waiting in one.
        while process.poll() is None:
            time.sleep(0.1)
    except KeyboardInterrupt:
        if process is None:
            raise
        process.terminate()
        wait_or_kill([process])
    return process.returncode


def _folder_fault(token: Path) -> str:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not token.is_file():
        if time.monotonic() > deadline:
            return f"{token.parent} is not the launcher's folder there; it must be a shared folder, at the same path on every node"
        time.sleep(0.2)
    mine = token.with_name(f"{token.name}-{secrets.token_hex(8)}")
    try:
        mine.touch()
        mine.unlink()
    except OSError as error:
        return f"{token.parent} cannot be written there ({error.strerror})"
    return ""


def _code_fault(expected: str) -> str:
    """Ask the interpreter that will run the worker: Ray's own process has further import paths."""
    command = [sys.executable, "-P", "-m", "medvisionllama.experiments.ray_node"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"medvisionllama cannot be imported there by {sys.executable} ({last}); install it as here"
    found = json.loads(told.stdout)
    if found != expected:
        return f"medvisionllama is {found} there and {expected} here; install the same one"
    return ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps(code_version()))
