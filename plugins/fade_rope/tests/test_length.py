"""Embeddings that change with the length: against models that decode past the length they were trained at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fade_core.errors import InputError
from fade_rope import scheme_from_config
from fade_rope.verification import relative_error

TRAINED = 32
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}


def tiny_llama(kind: str) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": 10_000.0, **KINDS[kind]},
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def cached_keys(model: Any, tokens: Tensor, chunks: list[int]) -> tuple[Tensor, Tensor]:
    """Keys of the cache after reading ``tokens`` in chunks, and how much had been read when each was rotated."""
    cache, lengths = transformers.DynamicCache(config=model.config), []
    for piece in tokens.split(chunks, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True)
        lengths += [cache.get_seq_length()] * piece.shape[1]
    return cache.layers[0].keys, torch.tensor(lengths)


@pytest.mark.parametrize("prefill", [TRAINED - 9, TRAINED, TRAINED + 1, TRAINED + 20])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_cached_key_keeps_the_length_it_was_rotated_under(kind: str, prefill: int, seed: int) -> None:
    model, count = tiny_llama(kind), prefill + 15
    tokens = torch.randint(0, 100, (1, count))
    keys, lengths = cached_keys(model, tokens, [prefill, 6] + [1] * 9)
    scheme, positions = scheme_from_config(model.config), torch.arange(count)
    with torch.no_grad():
        attention = model.model.layers[0]
        plain = attention.self_attn.k_proj(attention.input_layernorm(model.model.embed_tokens(tokens)))
    plain = plain.unflatten(-1, (2, 16)).transpose(1, 2)

    assert relative_error(scheme.rotate(plain, positions, length=lengths), keys) <= 1e-5
    assert relative_error(scheme.unrotate(keys, positions, length=lengths), plain) <= 1e-5
    if prefill <= TRAINED:  # one length for all is not the same thing
        assert relative_error(scheme.rotate(plain, positions), keys) > 1e-3


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_shift_uses_the_length_that_it_is_given(kind: str, seed: int) -> None:
    scheme = scheme_from_config(tiny_llama(kind).config)
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 4 * TRAINED, (2, 3, 5))
    length = 5 * TRAINED
    rotated = scheme.rotate(x, positions, length=length)
    wanted = scheme.rotate(x, positions + 9, length=length)
    assert relative_error(scheme.shift(rotated, 9, length=length), wanted) <= 1e-5
    assert relative_error(scheme.shift(rotated, 9, positions=positions, length=length), wanted) <= 1e-5
    assert relative_error(scheme.shift(rotated, 9), wanted) > 1e-3  # the trained frequencies


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_shift_that_must_leave_the_trained_length_asks_for_more(kind: str) -> None:
    scheme, x = scheme_from_config(tiny_llama(kind).config), torch.randn(1, 2, 5, 16)
    with pytest.raises(InputError, match=rf"shift by {TRAINED} leaves the {TRAINED} tokens.*positions= .*length="):
        scheme.shift(x, -TRAINED)
    scheme.shift(x, TRAINED - 1)
    scheme.shift(x, -TRAINED, length=3 * TRAINED)
    scheme.shift(x, TRAINED, positions=torch.arange(5))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_length_a_head_equals_heads_alone(kind: str, seed: int) -> None:
    scheme = scheme_from_config(tiny_llama(kind).config)
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 4 * TRAINED, (2, 3, 5))
    lengths = torch.randint(1, 6 * TRAINED, (2, 3, 1))
    whole = scheme.rotate(x, positions, length=lengths)
    for b in range(2):
        for h in range(3):
            alone = scheme.rotate(x[b : b + 1, h : h + 1], positions[b, h], length=int(lengths[b, h, 0]))
            assert relative_error(whole[b : b + 1, h : h + 1], alone) <= 1e-5
