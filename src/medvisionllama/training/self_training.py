"""Masks that the network gives to scans without labels, from which it goes on learning (self-training).

The teacher is the averaged network on whole scans, mirrored copies averaged in; the student sees augmented crops.
What is one piece in every labelled scan, a class or all of them together, is one piece in the others, so what lies
apart is removed: a network that few scans have taught finds bright tissue elsewhere.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from medvisionllama.config import Config
from medvisionllama.data.cache import (
    CachedCase,
    PseudoLabelledCase,
    has_pseudo_label,
    write_pseudo_label,
)
from medvisionllama.data.places import Places
from medvisionllama.data.planning import Plan
from medvisionllama.inference.postprocess import component_volumes_ml, remove_islands
from medvisionllama.networks.segmenter import TokenSegmenter
from medvisionllama.run_dir import RunDir
from medvisionllama.training.processes import Processes
from medvisionllama.training.validation import case_mask
from medvisionllama.types import LabelArray, SpacingMm

_ONE_PIECE = 0.95
"""Share of a class's voxels that its largest component holds at least, in each labelled scan."""
_UNIT = (1.0, 1.0, 1.0)  # sizes are compared, so any voxel size will do


class SelfTraining:
    """Gives the unlabelled cases of a run new masks, and finds those of an earlier round."""

    def __init__(
        self,
        labelled: Sequence[CachedCase],
        unlabelled: Sequence[CachedCase],
        plan: Plan,
        config: Config,
        run_dir: RunDir,
        accelerator: Accelerator,
    ) -> None:
        self.unlabelled = unlabelled
        self.plan = plan
        self.config = config
        self.run_dir = run_dir
        self.accelerator = accelerator
        self.pieces = find_pieces(labelled if unlabelled else [], merged=plan.merged)

    def due(self, progress: float) -> int:
        """Rounds of masks that a run should have had at this share of its course."""
        rounds = self.config.unlabelled.rounds
        return min(rounds, int(progress * (rounds + 1) + 1e-9)) if self.unlabelled else 0

    def chosen(self, number: int) -> list[CachedCase]:
        """The cases of a round, all if they are few."""
        settings = self.config.unlabelled
        if len(self.unlabelled) <= settings.per_round:
            return list(self.unlabelled)
        rng = np.random.default_rng([self.config.train.seed, 3_000_017, number])
        drawn = rng.permutation(len(self.unlabelled))[: settings.per_round]
        return [self.unlabelled[index] for index in sorted(drawn)]

    def give_masks(
        self,
        network: TokenSegmenter,
        number: int,
        *,
        patience_seconds: float | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[PseudoLabelledCase]:
        """Segment the unlabelled cases of a round, as many as there is time for, and keep their masks.

        The processes of a run share the cases, unless all of them are needed around a sharded block.

        Args:
            patience_seconds: after these no further case is begun.
            interrupted: asked after each case; no further one is begun then either.
        """
        processes, started = Processes(self.accelerator), time.monotonic()
        together = processes.num > 1 and self.config.train.shard_block

        def ends() -> bool:
            ending = interrupted()
            if patience_seconds is not None:
                ending |= time.monotonic() - started > patience_seconds
            return processes.any(ending) if together else ending

        cases = self.chosen(number)
        mine = cases if together else cases[processes.index :: processes.num]
        # In another order each round: where time is short, others get their turn.
        rng = np.random.default_rng([self.config.train.seed, 4_000_037, number])
        network.eval()
        for index in rng.permutation(len(mine)):
            case = mine[index]
            write_pseudo_label(self._mask(network, case), self.run_dir.pseudo_labels(number, case.case_id))
            if ends():
                break
        self.accelerator.wait_for_everyone()
        return self.masks_of(number)

    def masks_of(self, number: int) -> list[PseudoLabelledCase]:
        """The cases of a round that have their masks on this machine; before the first there are none."""
        if not number:
            return []
        cases = [
            PseudoLabelledCase(
                case.case_id,
                case.patient_id,
                case.folder,
                case.facts,
                masks=self.run_dir.pseudo_labels(number, case.case_id),
            )
            for case in self.chosen(number)
        ]
        return [case for case in cases if has_pseudo_label(case.masks)]

    def forget(self, number: int) -> None:
        """Remove a round's masks, which newer ones have replaced."""
        shutil.rmtree(self.run_dir.pseudo_labels(number), ignore_errors=True)

    def _mask(self, network: TokenSegmenter, case: CachedCase) -> LabelArray:
        plan, settings = self.plan, self.config.inference
        mask = case_mask(
            network, case, plan, overlap=settings.overlap, flip=settings.flip, accelerator=self.accelerator
        )
        if plan.merged:
            value = next(iter(plan.classes))
            mask = np.where(mask > 0, value, 0).astype(np.min_scalar_type(value))
        places = None if plan.resize else plan.places
        return keep_pieces(mask, self.pieces, plan.spacing_mm, places)


@dataclass(frozen=True)
class Pieces:
    """What is one connected component, but for specks, in every labelled case."""

    foreground: bool
    """All classes together."""
    classes: frozenset[int]
    """Label values."""


def find_pieces(cases: Sequence[CachedCase], *, merged: bool = False) -> Pieces:
    """Read off the labels what is one piece; of a class that no case has, nothing is known.

    Args:
        merged: masks have all classes as one, so that nothing can be said of each.
    """
    together, apart = dict[int, bool](), dict[int, bool]()
    for case in cases:
        label = np.asarray(case.label)
        for found, mask in ((together, (label > 0).astype(np.uint8)), (apart, label)):
            for value, volumes in component_volumes_ml(mask, 1.0).items():
                found[value] = found.get(value, True) and volumes[0] >= _ONE_PIECE * sum(volumes)
    whole = frozenset(value for value, is_whole in apart.items() if is_whole and not merged)
    return Pieces(foreground=together.get(1, False), classes=whole)


def keep_pieces(
    mask: LabelArray, pieces: Pieces, spacing_mm: SpacingMm = _UNIT, places: Places | None = None
) -> LabelArray:
    """Return a mask `[x, y, z]` without what lies apart from what should be one piece.

    Args:
        places: where training labels lie; of two pieces of a size the one there is kept.
    """
    mask = remove_islands(mask, spacing_mm, largest_foreground=pieces.foreground, places=places)
    chosen = np.isin(mask, sorted(pieces.classes))
    kept = remove_islands(np.where(chosen, mask, 0), spacing_mm, largest_only=True, places=places)
    return np.where(chosen, kept, mask)
