"""Keys of survivors, moved together, are the keys of a run that never saw the others (layer 0)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fade_rope import scheme_from_config
from fade_rope.verification import relative_error

BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi": {},
    "stablelm": {"num_key_value_heads": 2},
    "glm": {"head_dim": 16, "num_key_value_heads": 2},
    "cohere": {},
    "gpt_neox": {},
    "qwen3": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "gemma4_text": {"layer_types": ["full_attention"], "num_key_value_heads": 2, "hidden_size_per_layer_input": 0},
    "bloom": {},
}


@torch.no_grad()
def keys_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=True).past_key_values.layers[0].keys


@pytest.mark.parametrize("kind", MODELS)
def test_moved_survivors_equal_a_run_from_scratch(kind: str, seed: int) -> None:
    config = transformers.AutoConfig.for_model(kind, **BASE, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(0, 100, (2, 300))
    kept = torch.stack([torch.randperm(300)[:50].sort().values for _ in range(2)])  # ragged: [B, T]
    keys = keys_of(model, tokens)
    heads, width = keys.shape[1], keys.shape[3]
    survivors = keys.gather(2, kept[:, None, :, None].expand(-1, heads, -1, width))

    scheme = scheme_from_config(config, 0)
    scratch = keys_of(model, tokens.gather(1, kept))
    offset = torch.arange(50) - kept
    assert relative_error(scheme.shift(survivors, offset), scratch) <= 1e-4
    assert relative_error(scheme.shift(survivors, offset, positions=kept), scratch) <= 2e-6
    if kind != "bloom":
        assert relative_error(survivors, scratch) > 0.1
