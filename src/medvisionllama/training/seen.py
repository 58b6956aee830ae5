"""Whom a run has seen: the patients by whom its weights were trained or chosen, as its folder tells."""

from collections.abc import Iterable

from medvisionllama.config import read_config
from medvisionllama.data.index import Case, patient_of
from medvisionllama.errors import CheckpointError
from medvisionllama.run_dir import RunDir


def patients_by_part(run_dir: RunDir, cases: Iterable[Case]) -> dict[str, set[str]]:
    """Patients that trained and validated a run, or the run whose weights it began with.

    Args:
        cases: whose patients are known; of others the run's own pattern tells.

    Raises:
        CheckpointError: the manifest does not say whom it has seen.
    """
    try:
        manifest = run_dir.read_manifest()
        parts = {part: list(manifest["cases"][part]) for part in ("train", "validation")}
        unlabelled: dict[str, str] = manifest.get("unlabelled", {})
        before: dict[str, list[str]] = (manifest.get("started_from") or {"patients": {}})["patients"]
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{run_dir.manifest} does not say which cases the run has seen, so a leak cannot be excluded; restore it or leave the run out"
        ) from None
    pattern = read_config(run_dir.config).data.patient_pattern
    known = {case.case_id: case.patient_id for case in cases}
    patients = {
        part: {known[name] if name in known else patient_of(name, pattern) for name in names}
        for part, names in parts.items()
    }
    # They trained as well, if without their labels.
    patients["train"] |= {known.get(name, patient) for name, patient in unlabelled.items()}
    return {part: names | set(before.get(part, [])) for part, names in patients.items()}
