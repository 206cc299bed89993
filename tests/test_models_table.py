"""docs/models.md says of each family what the code does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_zoo import FAMILIES
from tinymodels import fresh_seed, tiny
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import ConfigError, UnsupportedModelError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LATENT |= {"head_dim": ..., "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
_NO_HEADS: dict[str, Any] = {"head_dim": ..., "num_key_value_heads": ...}
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": _NO_HEADS | {"n_head": 4, "n_layer": 3, "num_attention_heads": ..., "num_hidden_layers": ...},
    "deepseek_v3": _LATENT | {"topk_group": 1, "moe_intermediate_size": 16},
    "diffllama": {},
    "doge": {},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 32,
    },
    "git": _NO_HEADS
    | {"vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
    "mamba": _NO_HEADS | {"num_attention_heads": ..., "state_size": 4},
    "ministral": {"sliding_window": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": _NO_HEADS | {"n_embd": 32, "n_head": 4, "n_layer": 3},
}
SHORT = FadeConfig(n_sink=2, recent_window=16, tile=16)


def model_of(family: str) -> PreTrainedModel:
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval()
    return tiny(family, fresh_seed(), **(FAMILIES | OTHERS)[family])


def row_of(family: str) -> str:
    """The family's line of the table, as the code has it."""
    model = model_of(family)
    try:
        with create_tiered_cache(model, SHORT) as cache:
            others = sorted({type(layer).__name__ for layer in cache.layers if layer not in cache.tiered})
            attention = "FADE's" if cache.attention == "fade" else "its own"
    except UnsupportedModelError as error:
        return f"| `{family}` | refused | | | {str(error).removeprefix(type(model).__name__).strip()} |"
    layers = "all" if not others else f"all but {', '.join(f'`{name}`' for name in others)}"
    try:
        create_tiered_cache(model, SHORT, policy={"kind": "position", "budget": 0.5}).detach()
        evicts, reason = "yes", ""
    except ConfigError as error:
        evicts, reason = "no", str(error).partition("(")[2].rpartition(")")[0]
    return f"| `{family}` | {layers} | {attention} | {evicts} | {reason} |"


@pytest.mark.parametrize("family", sorted([*FAMILIES, *OTHERS, "t5"]))
def test_the_page_has_a_familys_row(family: str) -> None:
    assert row_of(family) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_rows() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted([*FAMILIES, *OTHERS, "t5"])
