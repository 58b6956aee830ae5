"""The ten tasks of the Medical Segmentation Decathlon (CC-BY-SA 4.0, arXiv 1902.09063), and where they lie.

Addresses and MD5 sums are facts that MONAI publishes in its `DecathlonDataset` (monai/apps/datasets.py). An MD5 sum
tells a damaged download from a whole one; it is no proof against somebody who makes another archive with the same
sum. Against that stand https to the host below, and the checks of `data/archives.py`.
"""

import re
from dataclasses import dataclass

from medvisionllama.errors import DataError

MIRROR = "https://msd-for-monai.s3-us-west-2.amazonaws.com"


@dataclass(frozen=True)
class Task:
    """One task; `num_training` counts the labelled cases of its dataset.json."""

    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    num_training: int
    md5: str

    @property
    def file(self) -> str:
        """Name of its archive."""
        return f"{self.name}.tar"


_BRAIN = ("FLAIR", "T1w", "T1gd", "T2w")
TASKS = {
    task.name: task
    for task in (
        Task(
            "Task01_BrainTumour",
            _BRAIN,
            ("edema", "non-enhancing tumour", "enhancing tumour"),
            484,
            "240a19d752f0d9e9101544901065d872",
        ),
        Task("Task02_Heart", ("MRI",), ("left atrium",), 20, "06ee59366e1e5124267b774dbd654057"),
        Task("Task03_Liver", ("CT",), ("liver", "tumour"), 131, "a90ec6c4aa7f6a3d087205e23d4e6397"),
        Task(
            "Task04_Hippocampus",
            ("MRI",),
            ("anterior", "posterior"),
            260,
            "9d24dba78a72977dbd1d2e110310f31b",
        ),
        Task(
            "Task05_Prostate",
            ("T2", "ADC"),
            ("peripheral zone", "transition zone"),
            32,
            "35138f08b1efaef89d7424d2bcc928db",
        ),
        Task("Task06_Lung", ("CT",), ("tumour",), 63, "8afd997733c7fc0432f71255ba4e52dc"),
        Task("Task07_Pancreas", ("CT",), ("pancreas", "tumour"), 281, "4f7080cfca169fa8066d17ce6eb061e4"),
        Task("Task08_HepaticVessel", ("CT",), ("vessel", "tumour"), 303, "641d79e80ec66453921d997fbf12a29c"),
        Task("Task09_Spleen", ("CT",), ("spleen",), 41, "410d4a301da4e5b2f6f86ec3ddba524e"),
        Task("Task10_Colon", ("CT",), ("primary tumour",), 126, "bad7a188931dc2f6acf72b08eb6202d0"),
    )
}


def find_task(text: str) -> Task:
    """Find a task by `Task04_Hippocampus`, `Task04`, `04`, `4` or `hippocampus`.

    Raises:
        DataError: no such task; the message lists them.
    """
    wanted = text.strip().lower()
    number = re.fullmatch(r"(?:task)?_?0*([1-9][0-9]?)", wanted)
    for task in TASKS.values():
        prefix, organ = task.name.lower().split("_")
        if wanted in {task.name.lower(), organ} or (number and int(prefix[4:]) == int(number[1])):
            return task
    raise DataError(
        f"{text[:60]!r} is no task of the decathlon and no https address of an archive; tasks: {', '.join(TASKS)}"
    )
