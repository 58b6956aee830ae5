"""Runs inside nnU-Net's own environment: `train FOLDER`, then `predict FOLDER`, as FOLDER/request.json says.

Plans, preprocessing, augmentation, network, loss, optimiser and prediction are nnU-Net's. What differs:
- a clock ends the run and anneals the learning rate, since no 1000 epochs of 250 iterations fit in minutes;
- the pseudo Dice is taken on one batch after each tenth of the time, since only a checkpoint that prediction does
  not use depends on it; that checkpoint and the plots are not written;
- processes are forked, since spawned ones import everything again, which would count as planning;
- batches are drawn and augmented between the iterations, which is 2 % of the time on two threads; with a process
  for it, which nnU-Net forks beside running threads, the first backward pass did not end here.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing_to_folder,
    determine_postprocessing,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_clock import Clock, polynomial_rate

CONFIGURATION = "3d_fullres"
NUM_PARTS = 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ClockSchedule:
    """nnU-Net's polynomial schedule over a clock; called where its own is."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial: float, clock: Clock) -> None:
        self.optimizer, self.initial, self.clock = optimizer, initial, clock

    def step(self, _: int | None = None) -> None:
        """Set the learning rate of this moment, whatever the epoch."""
        rate = polynomial_rate(self.initial, self.clock.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class ClockTrainer(nnUNetTrainer):
    """nnU-Net's trainer, ended by a clock."""

    clock: Clock
    num_iterations = 0

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ClockSchedule]:
        optimizer, _ = super().configure_optimizers()
        return optimizer, ClockSchedule(optimizer, self.initial_lr, self.clock)

    def train_step(self, batch: dict) -> dict:
        """One iteration at the learning rate of this moment."""
        self.lr_scheduler.step()
        result = super().train_step(batch)
        self.num_iterations += 1
        return result

    def plot_network_architecture(self) -> None:
        """Write no plot."""

    def run_training(self) -> None:
        """Train until the clock is over; an epoch is a tenth of its time."""
        self.logger.plot_progress_png = lambda _: None
        self.on_train_start()
        self.disable_checkpointing = True
        while not self.clock.is_over:
            self.on_epoch_start()
            self.on_train_epoch_start()
            part = self.clock.part(NUM_PARTS)
            outputs: list[dict[str, Any]] = []
            while not outputs or (self.clock.part(NUM_PARTS) == part and not self.clock.is_over):
                outputs.append(self.train_step(next(self.dataloader_train)))
            self.on_train_epoch_end(outputs)
            with torch.no_grad():
                self.on_validation_epoch_start()
                self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val))])
            self.on_epoch_end()
        self.training_seconds = self.clock.elapsed
        self.disable_checkpointing = False
        self.on_train_end()


# The checkpoint names its trainer, and nnU-Net's own commands look the class up by that name. The network is the
# stock trainer's, so they can open the folder if it says so.
ClockTrainer.__name__ = "nnUNetTrainer"


def train(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Plan, preprocess and train in the minutes of the request; return what there is to know."""
    start = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: start("fork")  # type: ignore[assignment]
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(request["seed"])
    name, threads = request["name"], request["threads"]
    number = int(name.removeprefix("Dataset")[:3])
    clock = Clock(60 * request["minutes"])
    extract_fingerprints([number], num_processes=threads, show_progress_bar=False)
    plan_experiments([number])
    preprocess([number], configurations=[CONFIGURATION], num_processes=[threads], show_progress_bar=False)
    planned = clock.elapsed
    # Read when the loaders are made; planning reads it too, and cannot do with 0.
    # Beside a GPU nnU-Net augments in processes, as shipped; on a CPU they would take the network's cores.
    os.environ.update(nnUNet_n_proc_DA="0" if DEVICE.type == "cpu" else str(min(12, threads)))
    torch.set_num_threads(threads)
    base = folder / "preprocessed" / name
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    trainer = ClockTrainer(
        plans={**plans, "continue_training": False},
        configuration=CONFIGURATION,
        fold=0,
        dataset_json=json.loads((base / "dataset.json").read_text()),
        device=DEVICE,
    )
    trainer.clock = clock
    trainer.run_training()
    manager = trainer.configuration_manager
    history = trainer.logger.get_value
    return {
        "iterations": trainer.num_iterations,
        "planning_seconds": round(planned, 2),
        "training_seconds": round(trainer.training_seconds - planned, 2),
        "patch_size": [int(size) for size in manager.patch_size],
        "batch_size": int(manager.batch_size),
        "spacing_mm": [float(size) for size in manager.spacing],
        "num_parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "losses": [round(float(value), 4) for value in history("train_losses", step=None)],
        "pseudo_dices": [round(float(value), 4) for value in history("mean_fg_dice", step=None)],
        "model": str(Path(trainer.output_folder_base).relative_to(folder)),
    }


def predict(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Segment the test cases with the final weights, and remove components if that pays on the validation cases.

    As nnU-Net's own commands do, but in one process.
    """
    torch.set_num_threads(request["threads"])
    model = folder / json.loads((folder / "train.json").read_text())["model"]
    started = time.monotonic()
    predictor = nnUNetPredictor(device=DEVICE, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    raw = folder / "raw" / request["name"]
    validation = {case: str(raw / "imagesTr" / f"{case}_0000.nii.gz") for case in request["validation"]}
    for part, images in (("validation", validation), ("test", request["test"])):
        masks = [str(folder / f"{part}_masks" / case) for case in images]
        predictor.predict_from_files_sequential([[path] for path in images.values()], masks)
    plans, dataset = str(model / "plans.json"), str(model / "dataset.json")
    threads = request["threads"]
    removals = determine_postprocessing(
        str(folder / "validation_masks"), str(raw / "labelsTr"), plans, dataset, threads,
        keep_postprocessed_files=False,
    )  # fmt: skip
    apply_postprocessing_to_folder(
        str(folder / "test_masks"), str(folder / "masks"), *removals, plans, dataset, threads
    )
    return {"predicting_seconds": round(time.monotonic() - started, 2), "num_removals": len(removals[0])}


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    request = json.loads((folder / "request.json").read_text())
    facts = {"train": train, "predict": predict}[verb](folder, request)
    partial = folder / f"{verb}.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(folder / f"{verb}.json")


if __name__ == "__main__":
    main()
