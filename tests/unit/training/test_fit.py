"""What `fit` makes of its configuration."""

from medvisionllama.config import load_config
from medvisionllama.training.fit import with_absolute_paths


def test_the_path_of_a_splits_file_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = {"data.path": "d", "out": "o", "data.splits": "~/s.json"}
    assert with_absolute_paths(load_config("small", chosen)).data.splits == tmp_path / "s.json"
