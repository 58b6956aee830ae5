"""`medvisionllama.llm` is light: it imports nothing that only some sources or families need."""

import subprocess
import sys


def test_importing_the_package_imports_neither_transformers_nor_anything_optional():
    code = "import sys, medvisionllama.llm; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = set(output.split())
    assert "medvisionllama.llm.block" in loaded
    assert not loaded & {"transformers", "peft", "gguf", "requests", "tokenizers", "huggingface_hub", "monai"}
