"""The folder of a run: what each file is called, and how the folder begins and goes on.

config.yaml        every setting
plan.json          what was decided from the data
splits.json        who trained, validated and was kept for the test, with a hash
manifest.json      versions, hardware, seed, hashes of data, splits and block
history.jsonl      one line per validation
best.safetensors   trainable weights that predict: the last whose validation Dice is not clearly behind; the latest
                   where no case validates
last/              state to resume from
pseudo_labels/     masks that unlabelled scans train with
evaluation.csv     one row per test case and class
evaluation.json    which weights it is of, and how their masks were cleaned
predictions/       masks of the cases that were evaluated
report.html        everything a person looks at
members/2 ...      run folders of the further networks, if the run trains several

Made on request:
postprocessing.json    which components masks lose, chosen on validation
calibration.json       how far probabilities can be believed
"""

import json
import math
import platform
import shlex
import subprocess
import time
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from medvisionllama._files import append_json, files_sha256, read_json_lines, with_home, write_text
from medvisionllama._machine import available_cores
from medvisionllama.config import read_config
from medvisionllama.errors import CheckpointError, DataError, command

_PACKAGES = (
    "medvisionllama",
    "torch",
    "monai",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "nibabel",
    "safetensors",
)


LEAD = 0.01
"""Of validation Dice, by which earlier weights must be ahead of later ones to be kept.

Less is chance, where one look at a handful of cases tells; and later weights had more steps at a lower rate.
"""


def kept_of(dices: Sequence[float]) -> int:
    """Place of the validation whose weights a run keeps: the last that was not clearly behind one before it.

    >>> kept_of([0.70, 0.78, 0.775]), kept_of([0.70, 0.78, 0.76]), kept_of([0.78, 0.775, 0.765])
    (2, 1, 1)
    """
    best, kept = -math.inf, 0
    for place, dice in enumerate(dices):
        if dice >= best - LEAD:
            kept = place
        best = max(best, dice)
    return kept


class RunDir:
    """Paths inside one run folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = with_home(path)
        self.config = self.path / "config.yaml"
        self.plan = self.path / "plan.json"
        self.splits = self.path / "splits.json"
        self.manifest = self.path / "manifest.json"
        self.history = self.path / "history.jsonl"
        self.best = self.path / "best.safetensors"
        self.state = self.path / "last" / "state.safetensors"
        self.lock = self.path / "last" / ".lock"
        self.evaluation = self.path / "evaluation.csv"
        self.scored = self.path / "evaluation.json"
        self.report = self.path / "report.html"
        self.calibration = self.path / "calibration.json"
        self.postprocessing = self.path / "postprocessing.json"

    def pseudo_labels(self, number: int, case_id: str = "") -> Path:
        """Folder of a round's masks, or of a case's among them."""
        return self.path / "pseudo_labels" / str(number) / case_id

    def member(self, number: int) -> "RunDir":
        """Folder of a further member, counted from 2."""
        return RunDir(self.path / "members" / str(number))

    def members(self) -> list["RunDir"]:
        """The run and its further members, whose predictions are averaged.

        Raises:
            CheckpointError: no run, or a member is not trained yet.
        """
        self.check()
        num = read_config(self.config).train.members
        others = [self.member(number) for number in range(2, num + 1)]
        for other in others:
            fewer = int(other.path.name) - 1
            self._check_weights(other.best, f", or do without it by adding --members {fewer}")
        return [self, *others]

    def weights_sha256(self) -> str:
        """Hash of the best weights of all networks."""
        return files_sha256(member.best for member in self.members())

    def check_unused(self, drawn: Path | None = None) -> None:
        """Refuse a folder that would be overwritten; files make their folders themselves.

        Args:
            drawn: the division that the new run obeys, an absolute path.

        Raises:
            CheckpointError: it already holds a run, or somebody's division, which would be overwritten.
        """
        if self.path.is_file():
            raise CheckpointError(f"{self.path} is a file; --out must name a folder for the run")
        if any(path.exists() for path in (self.config, self.state, self.best)):
            raise CheckpointError(
                f"{self.path} already holds a run; go on with it by --resume, or choose another --out"
            )
        # A run that was stopped before it was one has its manifest.
        if self.splits.exists() and not self.manifest.exists() and drawn != self.splits.resolve():
            where = f"--set {shlex.quote(f'data.splits={self.splits}')}"
            raise CheckpointError(
                f"{self.splits} is a division that is no run's; divide by it with {where}, or choose another --out"
            )

    def check_resumable(self) -> None:
        """Raise CheckpointError unless the folder holds a run to go on with, and not its weights alone."""
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} holds no run to resume; start one without --resume")
        # One that was killed between its first weights and its first save has one record at most, and begins anew.
        if self.best.is_file() and not self.state.is_file() and len(self.read_history()) > 1:
            raise CheckpointError(
                f"{self.path} has trained weights, but {self.state.parent.name}/{self.state.name} to go on from is gone; going on would begin anew and replace them: start a new run, or delete {self.best} first"
            )

    def check_same_data(self, facts: dict[str, Any]) -> None:
        """Raise CheckpointError if the manifest's hashes of data and splits are not those given."""
        before = self.read_manifest()
        for key, value in facts.items():
            if before.get(key) != value:
                part = key.removesuffix("_sha256")
                raise CheckpointError(
                    f"the {part} changed since {self.path} began, so it cannot go on; start a new run, or restore the {part}"
                )

    def check(self) -> None:
        """Raise CheckpointError unless the folder holds a run that can predict."""
        if not self.config.is_file():
            raise CheckpointError(
                f"{self.path} is not a run folder (no config.yaml); make one with: {command('train', 'DATA', '--out', self.path)}"
            )
        self._check_weights(self.best)

    def _check_weights(self, best: Path, otherwise: str = "") -> None:
        if not best.is_file():
            raise CheckpointError(
                f"{best.parent} has no {best.name} yet; finish it with: {command('train', 'DATA', '--out', self.path, '--resume')}{otherwise}"
            )

    def read_manifest(self) -> dict[str, Any]:
        """Read manifest.json, or raise CheckpointError."""
        try:
            manifest: dict[str, Any] = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CheckpointError(
                f"{self.manifest} is missing or damaged; restore it or start a new run"
            ) from None
        return manifest

    def read_cases(self) -> dict[str, list[str]]:
        """Names of the cases of each part, as the run began with them.

        Raises:
            CheckpointError: the manifest is missing or damaged, or does not say.
        """
        try:
            return {part: list(names) for part, names in self.read_manifest()["cases"].items()}
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(
                f"{self.manifest} does not say which cases the run has seen; restore it or start a new run"
            ) from None

    def cases_of(self, part: str, there: Collection[str], *, otherwise: str) -> tuple[str, ...]:
        """Cases of a part as the run began with them, whatever came into the dataset since.

        Args:
            there: cases of the dataset.
            otherwise: what else can be done where one is gone.

        Raises:
            CheckpointError: the manifest is missing or damaged, or does not say.
            DataError: a case is gone, so that results would be of fewer.
        """
        cases = self.read_cases()
        if part not in cases:
            raise CheckpointError(
                f"{self.manifest} does not say which cases are of the {part} part; restore it"
            )
        names = cases[part]
        if gone := sorted(set(names) - set(there)):
            raise DataError(
                f"the dataset no longer holds {gone[0]!r}, one of the {part} cases of {self.path}; put it back, or {otherwise}"
            )
        return tuple(names)

    def read_history(self) -> list[dict[str, Any]]:
        """Lines of history.jsonl; a line cut short by a kill is dropped."""
        return read_json_lines(self.history)

    def kept_record(self) -> dict[str, Any]:
        """The line of history.jsonl of the weights that are kept; empty if no case validates."""
        scored = [record for record in self.read_history() if record["dice"] is not None]
        return scored[kept_of([record["dice"] for record in scored])] if scored else {}

    def append_history(self, record: dict[str, Any]) -> None:
        append_json(self.history, record)

    def rewind_history(self, step: int) -> None:
        """Drop what was recorded after `step`; those steps are about to be repeated."""
        if not self.history.is_file():
            return
        kept = [record for record in self.read_history() if record["step"] <= step]
        write_text(self.history, "".join(json.dumps(record) + "\n" for record in kept))


def sessions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run was trained on and with, in turn; one that went on may have had other machines and revisions."""
    return [manifest, *manifest["resumed"]]


def revisions(manifest: dict[str, Any]) -> list[str | None]:
    """Revisions of the code that a run was trained with, in turn."""
    return [session["git_revision"] for session in sessions(manifest)]


def code_words(session: dict[str, Any]) -> str:
    """What a run was trained with, in words: an installed package has a version and no revision."""
    packages, revision = session["packages"], session["git_revision"]
    made = f"medvisionllama {packages['medvisionllama']} ({(revision or 'installed')[:12]})"
    return f"{made} with torch {packages['torch']}"


def machine_facts() -> dict[str, Any]:
    """Versions, hardware and revision, for the manifest."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            # Two processors of one name may differ in it, and so in a step's time.
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": len(available_cores()),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        return processor_name(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return platform.processor()


def processor_name(cpuinfo: str) -> str:
    """What Linux calls the processor; with family and model where a virtual machine hides its number.

    A name such as `AMD EPYC` covers generations of which one takes half of another's time for a step.
    """
    pairs = (line.partition(":")[::2] for line in cpuinfo.partition("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, value in pairs}
    name = facts.get("model name", platform.processor())
    # A clock is no number of a model: Intel(R) Xeon(R) Processor @ 2.50GHz.
    if (
        any(character.isdigit() for character in name.partition("@")[0])
        or not {"cpu family", "model"} <= facts.keys()
    ):
        return name
    return f"{name} (family {facts['cpu family']}, model {facts['model']})"


def _git_revision() -> str | None:
    """Revision of the package's own checkout; none for an installed package."""
    folder = Path(__file__).parent
    if not (folder.parent.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
