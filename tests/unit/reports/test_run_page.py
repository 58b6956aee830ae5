from medvisionllama.config import load_config
from medvisionllama.reports.html import changed_settings


def test_a_page_that_is_handed_on_names_no_folder(tmp_path):
    settings = {
        "data.path": tmp_path,
        "out": tmp_path / "run",
        "network.block.source": tmp_path / "mine.gguf",
    }
    changes = changed_settings(load_config("small", {key: str(path) for key, path in settings.items()}))
    assert changes == {"network.block.source": "mine.gguf"}
    assert "network.block.source" not in changed_settings(load_config("small"))
