from __future__ import annotations

import os
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core.interfaces import LayerView


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("FADE_SEED") or time.time_ns() % 2**31)
    print(f"FADE_SEED={chosen}")
    return chosen


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def view(generator: torch.Generator) -> LayerView:
    """Three rows, two heads, eleven tokens of which the last rows and heads hold fewer; empty slots hold NaN."""
    batch, heads, tokens, channels, length = 3, 2, 11, 5, 40
    positions = torch.stack(
        [torch.randperm(length, generator=generator)[:tokens].sort().values for _ in range(batch * heads)]
    ).view(batch, heads, tokens)
    positions[1, 0, 7:] = -1
    positions[2, 1, 3:] = -1
    empty = positions < 0

    def filled(*shape: int) -> torch.Tensor:
        x = torch.rand(*shape, generator=generator)
        mask = empty if x.dim() == 3 else empty.unsqueeze(-1)
        return x.masked_fill(mask, torch.nan)

    return LayerView(
        positions,
        length,
        layer=2,
        num_layers=6,
        statistics={
            "mass": filled(batch, heads, tokens),
            "seen": filled(batch, heads, tokens) * 30,
            "ema": filled(batch, heads, tokens),
            "last": filled(batch, heads, tokens),
        },
        keys=lambda: filled(batch, heads, tokens, channels),
        values=lambda: filled(batch, heads, tokens, channels),
    )


@pytest.fixture
def model(seed: int) -> LlamaForCausalLM:
    """Two layers, two KV heads of 16 channels under four query heads, random and lively."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()
