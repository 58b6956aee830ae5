"""Small pictures of many cases: one slice each, with the label's outline, made while the voxels are in memory."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.image
import numpy as np
from scipy import ndimage

from medvisionllama.colours import rgb_of
from medvisionllama.data.check.facts import CaseFacts
from medvisionllama.data.volume import Volume

_HEIGHT = 112
_MAX_WIDTH = 160
# A page with more pictures is slow to open; cases with findings come first.
MAX_PICTURES = 500


class Thumbnails:
    """Collects a JPEG per case; an instance is what `check_dataset` calls `look`."""

    def __init__(self) -> None:
        self._pictures: dict[str, bytes] = {}

    def __call__(
        self, facts: CaseFacts, images: Sequence[Volume], label: Volume | None, classes: Mapping[int, str]
    ) -> None:
        """Keep a picture of one case; volumes are in RAS, `classes` are the dataset's."""
        mask = facts.mask.voxels if facts.mask is not None else {}
        usable = label is not None and facts.mask is not None and facts.mask.countable
        pixels = draw_slice(
            images[0].array[0],
            images[0].spacing_mm,
            label.array if label is not None and usable and label.shape == images[0].shape else None,
            colour_places(mask, classes),
        )
        self._pictures[facts.case_id] = _jpeg(pixels)

    def source(self, case_id: str) -> str | None:
        """A picture as an inline address."""
        picture = self._pictures.get(case_id)
        return None if picture is None else "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def draw_slice(
    image: np.ndarray, spacing_mm: Sequence[float], label: np.ndarray | None, places: Mapping[int, int]
) -> np.ndarray:
    """Paint the axial slice with most labelled voxels, or the middle one, as `[row, column, 3]` bytes.

    Args:
        image: `[x, y, z]` in RAS, whatever its values.
        label: `[x, y, z]` in RAS with whole values, on the same grid.
        places: for each value in the label, which colour it has.
    """
    depth = image.shape[2] // 2
    if label is not None and places:
        depth = int(np.count_nonzero(label, axis=(0, 1)).argmax())
    # Rows run from the front of the patient down to the back, as radiologists look.
    picture = np.nan_to_num(image[:, :, depth].T[::-1].astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = np.percentile(picture, [1, 99.5])
    grey = ((picture - low) / max(high - low, 1e-9)).clip(0, 1)
    rows, columns = _pixel_grid(picture.shape, spacing_mm)
    pixels = np.repeat((255 * grey[rows][:, columns])[..., None], 3, axis=2).astype(np.uint8)
    if label is not None:
        marks = label[:, :, depth].T[::-1][rows][:, columns]
        for value, place in places.items():
            inside = marks == value
            edge = inside & ~ndimage.binary_erosion(inside)
            pixels[edge] = rgb_of(place)
    return pixels


def colour_places(values: Iterable[int], classes: Mapping[int, str]) -> dict[int, int]:
    """Which colour each value has: its place in the list of classes, in every case; of undeclared ones the value.

    >>> colour_places([4, 1, 7], {1: "core", 2: "oedema", 4: "enhancing"})
    {1: 0, 4: 2, 7: 9}
    """
    declared = {value: place for place, value in enumerate(classes)}
    return {value: declared.get(value, len(declared) + value - 1) for value in sorted(values)}


def _pixel_grid(shape: tuple[int, ...], spacing_mm: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel of the picture, nearest neighbour, in the scan's proportions."""
    tall, wide = shape[0] * spacing_mm[1], shape[1] * spacing_mm[0]
    scale = min(_HEIGHT / tall, _MAX_WIDTH / wide)
    return tuple(  # type: ignore[return-value] # two of them
        (np.arange(number) * size // number)
        for size, number in (
            (shape[0], max(1, round(tall * scale))),
            (shape[1], max(1, round(wide * scale))),
        )
    )


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save: Any = matplotlib.image.imsave
    save(buffer, pixels, format="jpg", pil_kwargs={"quality": 80})
    return buffer.getvalue()
