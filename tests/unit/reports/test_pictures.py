"""Pictures of runs and of checks, and what their pages say of them."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from medvisionllama.api import check
from medvisionllama.colours import colour_of, rgb_of
from medvisionllama.data.volume import Volume
from medvisionllama.reports import check_page, pages, plots
from medvisionllama.reports.thumbnails import colour_places, draw_slice


def test_planes_show_the_structure_where_its_middle_shows_nothing():
    two = np.zeros((20, 12, 10), bool)
    two[2:5, 4:8, 3:6] = True
    two[15:18, 4:8, 3:6] = True
    planes = plots.fullest(two)
    assert all(plane.cut(two, planes).any() for plane in plots.PLANES)
    middle = np.round(np.argwhere(two).mean(axis=0)).astype(int)
    assert not plots.PLANES[0].cut(two, middle).any()
    assert plots.fullest(np.zeros((20, 12, 10), bool)).tolist() == [10, 6, 5]


def test_a_class_has_one_colour_whichever_classes_a_case_lacks():
    label = np.zeros((40, 40, 1), np.uint8)
    label[10:30, 10:30] = 3
    scan = np.random.default_rng(0).random(label.shape)
    for values, classes, place in (([3], {}, 2), ([1, 2, 3], {}, 2), ([3], {2: "left", 3: "right"}, 1)):
        pixels = draw_slice(scan, (1, 1, 1), label, colour_places(values, classes))
        assert (pixels == rgb_of(place)).all(axis=-1).any(), values
        assert not (pixels == rgb_of(0)).all(axis=-1).any(), values


def test_the_check_page_names_all_colours_where_cases_hold_different_classes(dataset_folder, tmp_path):
    root = dataset_folder(num_cases=4, seed=1)
    _rewrite(root / "labelsTr" / "case_000.nii.gz", lambda voxels: np.where(voxels == 1, 0, voxels))
    # A scan without its second half comes first on the page, and has no picture.
    broken = root / "imagesTr" / "case_003.nii.gz"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    check(root, html=tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text()
    key = re.findall(r'<i style="border-color: (#\w+)"></i>([^<]+)', page)
    names = json.loads((root / "dataset.json").read_text())["labels"]
    assert key == [(colour_of(int(value) - 1), name) for value, name in names.items() if value != "0"]
    assert "front up, right on the right" in page


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the page's script")
def test_the_check_page_sorts_numbers_as_numbers_and_names_by_their_numbers():
    script = (Path(pages.__file__).parent / "templates" / "check.html.j2").read_text()
    (compare,) = re.findall(r"const compare = .*;", script)
    wanted = [["-2", "1e-05", "0.699999988079071", "0.78125", "1.25", "1.5", "10"], ["case_2", "case_10"]]
    program = f"{compare} console.log(JSON.stringify({json.dumps([row[::-1] for row in wanted])}.map((row) => row.sort(compare))))"
    run = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == wanted


@pytest.mark.parametrize("values", [(3, 9), (90, 700), (2, 80_000)])
def test_logarithmic_axes_have_numbers(values):
    figure = Figure()
    axes = figure.subplots()
    axes.hist(values, bins=np.geomspace(*values, 9))
    axes.set(xscale="log")
    check_page._name_ticks(axes.xaxis)
    figure.canvas.draw()
    ticks = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
    named = [tick.get_text() for tick in ticks if tick.get_text()]
    assert len(named) > 1
    assert all(float(name) > 0 for name in named)


def test_an_overlay_of_two_structures_holds_the_outline_of_both():
    label = np.zeros((30, 20, 10), np.uint8)
    label[3:7, 5:9, 2:5] = 1
    label[22:26, 5:9, 2:5] = 2
    scan = Volume(np.random.default_rng(0).random((1, 30, 20, 10)).astype(np.float32), np.eye(4))
    source = plots.overlay(scan, label, label, {1: "left", 2: "right"})
    pixels = _pixels(source)
    thirds = np.array_split(pixels, 3, axis=1)
    assert all(_coloured(third) for third in thirds)


def _pixels(source: str) -> np.ndarray:
    import base64

    return matplotlib.image.imread(io.BytesIO(base64.b64decode(source.split(",")[1])), format="png")[..., :3]


def _coloured(pixels: np.ndarray) -> bool:
    """Is anything in it not grey?"""
    return bool((pixels.max(axis=-1) - pixels.min(axis=-1) > 0.3).any())


def _rewrite(path, change):
    import nibabel as nib

    file = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(file.dataobj)).astype(np.uint8), file.affine), path)
