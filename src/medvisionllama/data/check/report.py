"""What a check returns."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.check.findings import SEVERITIES, Finding, Severity


@dataclass(frozen=True)
class CheckReport:
    """All that was found in a dataset, the worst first, and the facts of every case that could be read."""

    root: Path
    name: str
    num_cases: int
    num_patients: int
    channels: tuple[str, ...]
    classes: dict[int, str]
    fast: bool
    """Headers alone were read."""
    findings: tuple[Finding, ...]
    facts: tuple[CaseFacts, ...]

    def of(self, severity: Severity) -> list[Finding]:
        """Findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def ok(self) -> bool:
        """No error: training may start."""
        return not self.of("error")

    @property
    def codes(self) -> dict[str, int]:
        """How often each code was found."""
        return dict(Counter(finding.code for finding in self.findings))

    @property
    def summary(self) -> str:
        """One line."""
        counts = []
        for severity in SEVERITIES:
            number = len(self.of(severity))
            counts.append(f"{number} {severity}" + ("" if number == 1 else "s"))
        cases = f"{self.num_cases} case" + ("" if self.num_cases == 1 else "s")
        patients = f"{self.num_patients} patient" + ("" if self.num_patients == 1 else "s")
        return f"{cases} of {patients}: {', '.join(counts)}" + (" (headers only)" if self.fast else "")

    def short(self, message: str) -> str:
        """A message on one line, without the dataset's folder, which every path begins with."""
        return " ".join(message.replace(f"{self.root}/", "").split())

    def to_json(self) -> dict[str, Any]:
        return {
            "root": str(self.root),
            "name": self.name,
            "cases": self.num_cases,
            "patients": self.num_patients,
            "channels": list(self.channels),
            "classes": {str(value): name for value, name in self.classes.items()},
            "headers_only": self.fast,
            "ok": self.ok,
            "counts": {severity: len(self.of(severity)) for severity in SEVERITIES},
            "findings": [finding.to_json() for finding in self.findings],
            "facts": [case.to_json() for case in self.facts],
        }
