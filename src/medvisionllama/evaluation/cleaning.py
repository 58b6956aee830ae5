"""Component removal chosen on a run's validation cases, from masks that nothing was removed from."""

from collections.abc import Sequence

import numpy as np

from medvisionllama.config import InferenceConfig
from medvisionllama.data.places import Places
from medvisionllama.data.planning import Plan
from medvisionllama.data.readers import read_label
from medvisionllama.errors import ConfigError
from medvisionllama.evaluation.evaluate import Split, read_pair
from medvisionllama.evaluation.masks import Pair
from medvisionllama.evaluation.metrics import dice
from medvisionllama.inference.cleaning import Choice, Cleaning, make_candidates, make_choice
from medvisionllama.inference.postprocess import clean, component_volumes_ml
from medvisionllama.inference.writers import write_mask
from medvisionllama.progress import Progress
from medvisionllama.run_dir import RunDir


def check_choosable(
    run_dir: RunDir, settings: InferenceConfig, *, split: Split, num_runs: int, block_removed: bool
) -> None:
    """Refuse to choose where the choice would be unfair or of no effect.

    Raises:
        ConfigError: on test cases, for an ensemble, without the block, or beside settings that decide already.
    """
    if split != "validation":
        raise ConfigError(
            f"--choose-cleaning chooses on validation cases only, since test cases must not choose anything; add --split validation (given: {split})"
        )
    if num_runs > 1:
        raise ConfigError(
            "--choose-cleaning is the choice of one run and an ensemble uses its first run's; leave out --also"
        )
    if block_removed:
        raise ConfigError(
            "--choose-cleaning is the choice of the whole network; leave out --block-removed, which uses it too"
        )
    if Cleaning.of(settings).removes:
        raise ConfigError(
            f"{run_dir.config} says largest_foreground={settings.largest_foreground}, largest_component={settings.largest_component}, min_component_ml={settings.min_component_ml:g}, which decides before any choice; set them to false and 0 there to choose"
        )


def choose_cleaning(run_dir: RunDir, pairs: Sequence[Pair], plan: Plan, progress: Progress) -> Choice:
    """Compare candidates on masks as the network made them, by Dice.

    Raises:
        DataError: a mask on another grid than its label.
    """
    classes, merged = plan.mask_classes, plan.merged
    volumes = []
    for pair in pairs:
        _, truth = read_pair(pair, classes, merged=merged)
        found = component_volumes_ml(truth.array, truth.voxel_ml)
        volumes.append({value: sizes for value, sizes in found.items() if value in classes})
    candidates = make_candidates(volumes)
    scores = np.empty((len(candidates), len(pairs), len(classes)))
    with progress.track("choosing which components to remove", len(pairs)) as advance:
        for number, pair in enumerate(pairs):
            predicted, truth = read_pair(pair, classes, merged=merged)
            for row, candidate in enumerate(candidates):
                cleaned = clean(predicted, candidate, plan.places).array
                scores[row, number] = [dice(cleaned == value, truth.array == value) for value in classes]
            advance(number + 1)
    return make_choice(candidates, scores, list(classes.values()), weights_sha256=run_dir.weights_sha256())


def clean_files(pairs: Sequence[Pair], cleaning: Cleaning, places: Places | None = None) -> None:
    """Clean masks where they lie; the files stay as they are if nothing is to be removed."""
    if not cleaning.removes:
        return
    for pair in pairs:
        mask = clean(read_label(pair.prediction), cleaning, places)
        write_mask(pair.prediction, mask.array, mask.affine, like=pair.prediction)
