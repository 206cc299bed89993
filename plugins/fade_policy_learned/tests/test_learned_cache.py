from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, create_tiered_cache
from fade_policy_learned import FEATURES, train_policy


def test_generates_with_a_learned_policy_that_evicts(generator: torch.Generator, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    ).eval()
    features = torch.rand(200, len(FEATURES), generator=generator)
    checkpoint = tmp_path / "policy.safetensors"
    train_policy(features, features[:, 0], epochs=2).policy.save(checkpoint)
    config = FadeConfig(
        n_sink=2,
        recent_window=16,
        policy={"kind": "learned", "checkpoint": str(checkpoint), "budget": 96, "every": 8},
    )
    prompt = torch.randint(64, (2, 230), generator=generator)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "do_sample": False,
    }
    with create_tiered_cache(model, config=config) as cache:
        output = model.generate(prompt, past_key_values=cache, **options)
        assert output.shape == (2, 250)
        assert cache.get_seq_length() == 249
        keys = sum(row.nbytes for row in cache.memory_report().rows if row.layer == 0 and row.kind == "keys")
        tokens = keys / (2 * 2 * 16 * 4)  # rows, heads, channels, bytes of float32
        assert 64 <= tokens <= 96 + 8  # the budget, and what comes in between two rankings
