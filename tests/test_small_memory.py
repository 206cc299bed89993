"""A short text costs no more compressed than uncompressed: nothing is reserved that is large beside what is held."""

from __future__ import annotations

import functools

import pytest
import torch
from tinymodels import VOCABULARY, fresh_seed, prompt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, create_tiered_cache
from fade_core.support.memory import live_bytes


@functools.cache
def model() -> LlamaForCausalLM:
    """Four random layers of SmolLM2-135M's shape, in float32."""
    torch.manual_seed(fresh_seed())
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("rows", "tokens", "most"), [(4, 20, 1.1), (1, 70, 1.05), (4, 70, 1.05)])
@torch.no_grad()
def test_the_safe_preset_holds_at_most_what_an_uncompressed_cache_does(rows: int, tokens: int, most: float) -> None:
    """After the prompt and after some steps."""
    ids = prompt(fresh_seed(), tokens + 6, rows)
    plain = DynamicCache(config=model().config)
    with create_tiered_cache(model(), FadeConfig.safe()) as cache:
        for part in ids.split([tokens, *[1] * 6], 1):
            for held in (plain, cache):
                model()(part, past_key_values=held, use_cache=True)
            report = cache.memory_report()
            assert report.total == live_bytes(cache)
            assert report.baseline == live_bytes([(layer.keys, layer.values) for layer in plain.layers])
            assert report.total <= most * report.baseline, f"{report.total / report.baseline:.2f}"


EVICTING = {
    "aggressive": FadeConfig.aggressive(),
    "two tiers": FadeConfig(
        ladder=[{"tier": "int4", "capacity": 0.33}, {"tier": "int2"}], policy={"kind": "h2o", "budget": 0.75}
    ),
}


@pytest.mark.parametrize("name", EVICTING)
@torch.no_grad()
def test_a_cache_of_fixed_size_that_evicts_holds_little_more_than_one_that_grows(name: str) -> None:
    """From its first token to its last, where the growing one holds the most."""
    length, generator = 2048, torch.Generator().manual_seed(fresh_seed())
    held = []
    for limit in (None, length):
        with create_tiered_cache(model(), EVICTING[name], limit) as cache:
            sizes = []
            for count in (length - 150, *[1] * 150):
                cache.get_mask_sizes(count)
                for index in range(len(cache.tiered)):
                    cache.update(*torch.randn((2, 1, 3, count, 64), generator=generator), index)
                for layer in cache.tiered:
                    layer.finish_pending()
                sizes += [live_bytes(cache)] if count > 1 else []
            cache.settle()
            assert cache.get_seq_length() == length
            held.append([*sizes, live_bytes(cache)])
    growing, fixed = held
    assert fixed[0] == fixed[1], "buffers of fixed size have grown"
    assert fixed[1] <= 1.2 * growing[1], f"{fixed[1] / growing[1]:.2f}"
