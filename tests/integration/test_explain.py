"""`explain`, through the command line, on files."""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from medvisionllama import api
from medvisionllama.config import read_config, write_config
from medvisionllama.data.planning import read_plan
from medvisionllama.errors import CheckpointError, ConfigError
from medvisionllama.evaluation.explain.targets import scans_to_explain
from medvisionllama.inference.cleaning import Cleaning
from medvisionllama.reports import explanation
from medvisionllama.run_dir import RunDir

from .conftest import TINY

FAST = {**TINY, "train.num_validations": 1, "train.ema_decay": 0, "train.warmup_steps": 0}
pytestmark = pytest.mark.usefixtures("one_thread")


def train(phantoms, path, **changes):
    api.train(phantoms, out=path, epochs=2, overrides={**FAST, **changes}, test=False)
    return path


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    """A run around a block, trained once."""
    return train(phantoms, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def mlp_run(phantoms, tmp_path_factory):
    return train(phantoms, tmp_path_factory.mktemp("runs") / "mlp", **{"network.insert": "mlp"})


@pytest.fixture(scope="module")
def tokenless_run(phantoms, tmp_path_factory):
    return train(phantoms, tmp_path_factory.mktemp("runs") / "stem", **{"network.tokens": "false"})


@pytest.fixture
def scan(phantoms, tmp_path):
    """A copy of a scan, which is of no dataset."""
    return shutil.copy(phantoms / "imagesTr" / "phantom_000.nii.gz", tmp_path / "stranger.nii.gz")


def test_one_scan_gives_maps_a_table_and_a_page(run, phantoms, tmp_path, cli):
    image = phantoms / "imagesTr" / "phantom_000.nii.gz"
    outcome = cli("explain", run, image, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "page:" in outcome.out
    source = nib.load(image)
    maps = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    stages = ("encoder_norm", "encoder_attention", "vd1_norm", "block_norm", "block_attention", "vd2_norm")
    stages += ("decoder_norm", "decoder_attention")
    assert maps == sorted(
        f"{network}_{stage}.nii.gz" for network in ("trained", "random-block") for stage in stages
    )
    for name in maps:
        written = nib.load(tmp_path / "out" / name)
        assert written.shape == source.shape
        assert written.get_data_dtype() == np.float32
        np.testing.assert_array_equal(written.affine, source.affine)
    table = pd.read_csv(tmp_path / "out" / "scores.csv", keep_default_na=False)
    assert len(table) == 2 * 8 * 3
    assert set(table["class"]) == {"head", "tail", "foreground"}
    assert set(table["truth"]) == {"dataset"}
    page = (tmp_path / "out" / "explain.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    for outside in ("<link", "<script", "http://", "https://"):
        assert outside not in page
    assert "Darcet" in page


def test_the_table_s_scores_are_those_of_the_written_maps(run, phantoms, tmp_path):
    image = phantoms / "imagesTr" / "phantom_001.nii.gz"
    found = api.explain(run, image, out=tmp_path / "out")
    mask = np.asarray(nib.load(phantoms / "labelsTr" / "phantom_001.nii.gz").dataobj) == 2
    values = nib.load(tmp_path / "out" / "trained_decoder_norm.nii.gz").get_fdata()
    query = "network == 'trained' and stage == 'decoder' and kind == 'norm' and `class` == 'tail'"
    [row] = found.table.query(query).to_dict(orient="records")
    assert row["energy"] == pytest.approx(values[mask].sum() / values.sum(), rel=1e-5)
    assert row["volume_share"] == pytest.approx(mask.mean())
    place = np.linalg.inv(nib.load(image).affine) @ [*(row[f"peak_{axis}_mm"] for axis in "xyz"), 1]
    assert values[tuple(np.rint(place[:3]).astype(int))] == values.max()
    inside, outside = values[mask][:, None], values[~mask][None]
    greater = (inside > outside).mean() + (inside == outside).mean() / 2
    assert row["auc"] == pytest.approx(greater, abs=1e-3)


def test_the_control_leaves_encoder_and_vd1_as_they_are(run, phantoms, tmp_path):
    api.explain(run, phantoms / "imagesTr" / "phantom_002.nii.gz", out=tmp_path / "out")

    def maps(network, stage):
        return nib.load(tmp_path / "out" / f"{network}_{stage}_norm.nii.gz").get_fdata()

    for stage in ("encoder", "vd1", "block", "vd2"):
        equal = np.array_equal(maps("trained", stage), maps("random-block", stage))
        assert equal == (stage in {"encoder", "vd1"}), stage


def test_a_scan_without_a_label_is_scored_against_the_prediction_and_says_so(run, scan, tmp_path, cli):
    outcome = cli("explain", run, scan, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    assert "look at this: stranger: no true mask is known" in outcome.err
    assert {row["truth"] for row in json.loads(outcome.out)["scores"]} == {"prediction"}
    assert "no true mask is known" in (tmp_path / "out" / "explain.html").read_text()


def test_the_prediction_it_is_scored_against_is_cleaned_as_predict_does(run, scan, tmp_path, monkeypatch):
    used = []
    choice = Cleaning(largest_component=True)
    monkeypatch.setattr("medvisionllama.evaluation.explain.job.cleaning_of", lambda *_: (choice, "chosen"))
    monkeypatch.setattr(
        "medvisionllama.evaluation.explain.job.clean",
        lambda mask, how, places: used.append((how, places)) or mask,
    )
    api.explain(run, scan, out=tmp_path / "out", control="none", maps=False)
    places = read_plan(RunDir(run)).places
    assert places is not None
    assert used == [(choice, places)]


def test_a_label_that_is_given_counts(run, scan, phantoms, tmp_path):
    label = phantoms / "labelsTr" / "phantom_000.nii.gz"
    given = api.explain(run, scan, label=label, out=tmp_path / "given")
    known = api.explain(run, phantoms / "imagesTr" / "phantom_000.nii.gz", out=tmp_path / "known")
    assert set(given.table["truth"]) == {"label"}
    columns = ["network", "stage", "kind", "class", "hit", "energy", "auc"]
    pd.testing.assert_frame_equal(given.table[columns], known.table[columns])


def test_a_split_gives_a_page_for_each_case_and_means_over_patients(run, tmp_path, cli):
    outcome = cli("explain", run, "--split", "validation", "--no-maps")
    assert outcome.code == 0, outcome.err
    folder = run / "explain" / "validation"
    table = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    assert set(table["part"]) == {"validation"}
    cases = sorted(table["case_id"].unique())
    assert sorted(path.parent.name for path in folder.glob("*/explain.html")) == cases
    assert not list(folder.rglob("*.nii.gz"))
    summary = pd.read_csv(folder / "summary.csv")
    row = summary.query("network == 'random block' and stage == 'vd2' and `class` == 'head'").iloc[0]
    ours, theirs = (
        table[(table.network == name) & (table.stage == "vd2") & (table["class"] == "head")]["auc"].astype(
            float
        )
        for name in ("trained", "random block")
    )
    assert row["cases"] == row["patients"] == len(cases)
    assert row["auc"] == pytest.approx(theirs.mean(), abs=1e-5)
    assert row["auc_difference"] == pytest.approx(ours.mean() - theirs.mean(), abs=1e-5)
    page = (folder / "explain.html").read_text()
    assert f'href="{cases[0]}/explain.html"' in page


def test_another_run_stands_beside(run, mlp_run, scan, tmp_path):
    found = api.explain(run, scan, against=mlp_run, control="none", out=tmp_path / "out")
    stages = found.table.groupby("network")["stage"].unique().map(set).to_dict()
    assert stages["trained"] == {"encoder", "vd1", "block", "vd2", "decoder"}
    assert stages["other run"] == {"encoder", "mlp", "decoder"}
    assert any("Other run" in note and "MLP" in note for note in found.notes)


def test_scans_that_trained_the_other_run_are_told(run, phantoms, tmp_path):
    other = train(phantoms, tmp_path / "other", **{"data.split_seed": 1})
    mine, theirs = (RunDir(one).read_manifest()["cases"] for one in (run, other))
    found = api.explain(run, split="test", against=other, control="none", maps=False, out=tmp_path / "out")
    told = {line.partition(":")[0] for line in found.warnings if "the other run was trained on" in line}
    assert told == set(mine["test"]) & set(theirs["train"])
    assert told


def test_a_patient_of_another_pattern_who_trained_the_other_run_is_told(run, phantoms, tmp_path):
    # By the other run's pattern each scan is a patient of its own, and by another name.
    pattern = {"data.split_seed": 1, "data.patient_pattern": "[0-9]+$"}
    other = train(phantoms, tmp_path / "other", **pattern)
    mine, theirs = (RunDir(one).read_manifest()["cases"] for one in (run, other))
    found = api.explain(run, split="test", against=other, control="none", maps=False, out=tmp_path / "out")
    told = {line.partition(":")[0] for line in found.warnings if "the other run was trained on" in line}
    assert told == set(mine["test"]) & set(theirs["train"])
    assert told


def test_stages_that_an_mlp_run_lacks_are_named(mlp_run, scan, tmp_path, cli):
    outcome = cli("explain", mlp_run, scan, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "No maps after VD1, block and VD2: the insert is an MLP" in outcome.err
    assert "No random-block control" in outcome.err
    assert (tmp_path / "out" / "trained_mlp_norm.nii.gz").is_file()
    assert "No random-block control" in (tmp_path / "out" / "explain.html").read_text()


def test_a_run_without_insert_has_encoder_and_decoder(phantoms, scan, tmp_path, cli):
    plain = train(phantoms, tmp_path / "none", **{"network.insert": "none"})
    outcome = cli("explain", plain, scan, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    assert {row["stage"] for row in json.loads(outcome.out)["scores"]} == {"encoder", "decoder"}


def test_resized_scans_of_merged_classes_are_explained_on_their_own_grid(phantoms, scan, tmp_path):
    changes = {"data.labels": "foreground", "data.geometry": "resize", "data.crop_size": [16, 16, 16]}
    changes |= {"network.head": "linear", "network.patch_size": 4, "augment.enabled": False}
    resized = train(phantoms, tmp_path / "resized", **changes)
    found = api.explain(resized, scan, out=tmp_path / "out")
    assert set(found.table["class"]) == {"foreground"}
    assert nib.load(tmp_path / "out" / "trained_block_norm.nii.gz").shape == nib.load(scan).shape


def test_predictions_before_and_after_are_the_same(run, scan, tmp_path):
    masks = []
    for number in range(2):
        api.predict(run, scan, out=tmp_path / str(number), probabilities=True)
        masks.append(nib.load(tmp_path / str(number) / "probabilities" / "stranger.nii.gz").get_fdata())
        api.explain(run, scan, out=tmp_path / "out", overwrite=True)
    np.testing.assert_array_equal(*masks)


BAD_CALLS = {
    "no tokens": ("{tokenless} {scan}", "trained without tokens"),
    "no tokens in the other run": ("{run} {scan} --against {tokenless}", "trained without tokens"),
    "neither image nor split": ("{run}", "--split test"),
    "image and split": ("{run} {scan} --split test", "not both"),
    "label of a split": ("{run} --split test --label {label}", "one image"),
    "label of two scans": ("{run} {scan} {images} --label {label}", "one image"),
    "label missing": ("{run} {scan} --label {folder}/none.nii.gz", "does not exist"),
    "label of another grid": ("{run} {scan} --label {folder}/cut.nii.gz", "grid of its image"),
    "image missing": ("{run} {folder}/none.nii.gz", "does not exist"),
    "no run": ("{folder} {scan}", "not a run folder"),
    "other is no run": ("{run} {scan} --against {folder}", "not a run folder"),
    "out is a file": ("{run} {scan} --out {label}", "not a file"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_one_line_and_leaves_nothing(name, run, tokenless_run, scan, phantoms, tmp_path, cli):
    label = phantoms / "labelsTr" / "phantom_000.nii.gz"
    whole = nib.load(label)
    nib.save(nib.Nifti1Image(np.asarray(whole.dataobj)[:-2], whole.affine), tmp_path / "cut.nii.gz")
    places = {"run": run, "tokenless": tokenless_run, "scan": scan, "images": phantoms / "imagesTr"}
    places |= {"label": label, "folder": tmp_path}
    template, expected = BAD_CALLS[name]
    arguments = [part.format(**places) for part in template.split()]
    out = () if "--out" in arguments else ("--out", tmp_path / "out")
    outcome = cli("explain", *arguments, *out)
    assert outcome.code == 2
    [line] = [line for line in outcome.err.splitlines() if line.startswith("medvisionllama: ")]
    assert expected in line
    assert not list((tmp_path / "out").rglob("*.csv"))


def test_an_explanation_is_not_replaced_unasked(run, scan, tmp_path, cli):
    arguments = ("explain", run, scan, "--out", tmp_path / "out", "--control", "none", "--no-maps")
    assert cli(*arguments).code == 0
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "--overwrite" in outcome.err
    assert cli(*arguments, "--overwrite").code == 0


def test_a_run_of_other_classes_is_refused(run, scan, dataset_folder, tmp_path):
    other = train(dataset_folder("other", num_cases=6, values=(3, 5)), tmp_path / "other")
    with pytest.raises(CheckpointError, match="other channels or classes"):
        api.explain(run, scan, against=other, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="control"):
        api.explain(run, scan, control="permuted", out=tmp_path / "out")


def test_scans_beside_the_maps_stay(run, phantoms, tmp_path, cli):
    folder = tmp_path / "data"
    folder.mkdir()
    own = [folder / name for name in ("p1_norm.nii.gz", "p2_norm.nii.gz", "p3_attention.nii.gz")]
    for path in own:
        shutil.copy(phantoms / "imagesTr" / "phantom_000.nii.gz", path)
    before = [path.read_bytes() for path in own]
    outcome = cli("explain", run, own[0], "--out", folder, "--control", "none", "--overwrite")
    assert outcome.code == 0, outcome.err
    assert (folder / "trained_decoder_norm.nii.gz").is_file()
    assert [path.read_bytes() for path in own] == before


def test_no_output_replaces_a_scan_a_mask_or_a_table_unasked(run, scan, phantoms, tmp_path, cli):
    folder = tmp_path / "data"
    folder.mkdir()
    image, label = folder / "trained_decoder_norm.nii.gz", folder / "random-block_vd2_norm.nii.gz"
    shutil.copy(scan, image)
    shutil.copy(phantoms / "labelsTr" / "phantom_000.nii.gz", label)
    before = image.read_bytes(), label.read_bytes()
    for arguments in ((image,), (scan, "--label", label)):
        outcome = cli("explain", run, *arguments, "--out", folder, "--overwrite")
        assert outcome.code == 2
        assert "is one of the scans or masks" in outcome.err
    assert (image.read_bytes(), label.read_bytes()) == before
    for name in ("scores.csv", "summary.csv", "other-run_mlp_norm.nii.gz"):
        mine = tmp_path / name.partition(".")[0] / name
        mine.parent.mkdir()
        mine.write_text("mine")
        outcome = cli("explain", run, scan, "--out", mine.parent)
        assert outcome.code == 2
        assert f"{name} already exists" in outcome.err
        assert mine.read_text() == "mine"


def test_what_is_overwritten_leaves_nothing_of_before(run, scan, phantoms, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    two = [scan, phantoms / "imagesTr" / "phantom_001.nii.gz"]
    options = {"out": out, "control": "none"}
    api.explain(run, two, **options)
    assert (out / "stranger" / "trained_decoder_norm.nii.gz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(explanation, "explain_scan", stop)
        with pytest.raises(KeyboardInterrupt):
            api.explain(run, two, **options, overwrite=True)
    assert not [path for path in out.rglob("*") if path.is_file()]
    api.explain(run, two, **options, maps=False)
    api.explain(run, scan, **options, overwrite=True)
    assert not (out / "summary.csv").exists()
    assert (out / "trained_decoder_norm.nii.gz").is_file()
    api.explain(run, scan, **options, overwrite=True, maps=False)
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["explain.html", "scores.csv"]


def test_the_run_s_pattern_names_the_patients_of_strangers_where_it_fits(run, phantoms, tmp_path):
    config = read_config(RunDir(run).config, {"data.patient_pattern": r"^(phantom_\d+|[a-z]+(?=-))"})
    images = [tmp_path / "stranger-7b.nii.gz", tmp_path / "123x.nii.gz"]
    for image in images:
        shutil.copy(phantoms / "imagesTr" / "phantom_000.nii.gz", image)
    found = scans_to_explain(RunDir(run), config, read_plan(RunDir(run)), images, split=None, label=None)
    assert {one.case_id: one.patient_id for one in found} == {"stranger-7b": "stranger", "123x": "123x"}


def test_a_scan_that_trained_the_run_of_before_is_told(run, scan, tmp_path):
    later = shutil.copytree(run, tmp_path / "later")
    manifest = RunDir(later).manifest
    began = {"started_from": {"seen": {"train": {"stranger": "stranger"}, "validation": {}}}}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | began))
    found = api.explain(later, scan, control="none", maps=False, out=tmp_path / "out")
    assert any("stranger: a case or patient of this name trained the run" in line for line in found.warnings)


def test_a_copy_of_a_training_scan_is_told_by_its_name(run, phantoms, tmp_path):
    trained = RunDir(run).read_manifest()["cases"]["train"][0]
    copy = tmp_path / f"{trained}.nii.gz"
    shutil.copy(phantoms / "imagesTr" / copy.name, copy)
    found = api.explain(run, copy, control="none", maps=False, out=tmp_path / "out")
    assert any(
        f"{trained}: a case or patient of this name trained this run" in line for line in found.warnings
    )


def test_a_dataset_that_has_grown_still_tells_who_trained(run, phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    later = RunDir(shutil.copytree(run, tmp_path / "later"))
    write_config(read_config(later.config, {"data.path": str(data)}), later.config)
    description = json.loads((data / "dataset.json").read_text())
    new = {
        part: f"./{folder}/phantom_777.nii.gz"
        for part, folder in (("image", "imagesTr"), ("label", "labelsTr"))
    }
    for place in new.values():
        shutil.copy(data / place.replace("777", "000"), data / place)
    description["training"].append(new)
    (data / "dataset.json").write_text(json.dumps(description))
    trained = later.read_manifest()["cases"]["train"][0]
    images = [data / "imagesTr" / f"{name}.nii.gz" for name in (trained, "phantom_777")]
    plan, config = read_plan(later), read_config(later.config)
    known, new_one = scans_to_explain(later, config, plan, images, split=None, label=None)
    assert (known.part, known.truth) == ("train", "dataset")
    assert (new_one.part, new_one.truth) == ("", "dataset")
