"""A Hub of our own on this machine, with a cache of its own."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from range_server import RangeServer, serving
from tiny_hub import save_repositories


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_repositories(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """Serve `org/whole`, `org/sharded` and `org/pickled`; the cache is `tmp_path/cache`."""
    shutil.copytree(checkpoints, tmp_path / "served" / "org")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("medvisionllama._http.WAITS_S", (0.0, 0.0))
    monkeypatch.setenv("MEDVISIONLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "huggingface"))
    with serving(tmp_path / "served") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def downloaded(tmp_path: Path, checkpoints: Path) -> Callable[[str], Path]:
    """Lay a repository where huggingface_hub keeps what it has downloaded; returns its snapshot."""

    def lay(name: str) -> Path:
        repository, commit = tmp_path / "huggingface" / f"models--org--{name}", "c" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(checkpoints / name, repository / "snapshots" / commit))

    return lay


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[], list[str]]:
    """List what lies in the cache, folders too."""

    def listed() -> list[str]:
        cache = tmp_path / "cache"
        return sorted(str(path.relative_to(cache)) for path in cache.rglob("*")) if cache.exists() else []

    return listed
