"""Fair arms: what a matched arm's size must be, and what every arm weighs."""

from pathlib import Path
from typing import Any

from medvisionllama.config import Config, load_config
from medvisionllama.data.planning import read_plan
from medvisionllama.experiments.matrix import PlannedRun, Settings
from medvisionllama.networks.factory import match_depth, match_mlp, network_sizes
from medvisionllama.networks.matching import Match
from medvisionllama.run_dir import RunDir
from medvisionllama.training.prepare import plan_from_headers
from medvisionllama.types import NetworkShapes


def matched_settings(run: PlannedRun, *, data: Path) -> Settings:
    """Settings that give a matched arm its size; none for other arms.

    Raises:
        ConfigError: nothing of that kind is as large as the arm to be matched.
    """
    if run.match is None:
        return {}
    return match_run(run, data=data, shapes=plan_from_headers(run.config(data=data)).network_shapes).settings


def match_run(run: PlannedRun, *, data: Path, shapes: NetworkShapes) -> Match:
    """Find the size of a matched arm on the crops of its dataset.

    Raises:
        ConfigError: nothing of that kind is as large as the arm to be matched.
    """
    assert run.match is not None, "the caller asks for matched arms only"
    target = load_config(run.preset, {**(run.match_settings or {}), "data.path": data})
    sizes = network_sizes(target.network, **shapes)
    find = match_mlp if run.match.change == "mlp" else match_depth
    return find(run.config(data=data).network, sizes, by=run.match.by, **shapes)


def sizes_of_run(config: Config, run_dir: RunDir) -> dict[str, Any]:
    """What a finished run's network weighs, for its record."""
    sizes = network_sizes(config.network, **read_plan(run_dir).network_shapes)
    return {"trainable": sizes.trainable, "frozen": sizes.frozen, "gflops": round(sizes.gflops, 4)}
