"""The real model's bytes and answers with the safe preset (full figures: benchmarks/memory.py, `fade eval divergence`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fade_core import FadeConfig, create_tiered_cache
from fade_core.eval import divergence, exact_runs
from fade_core.support.memory import live_bytes
from fade_eval.texts import passages

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

PROMPT, STEPS = 640, 24  # the fourth step fills a tile


def test_safe_holds_a_third_and_compresses_from_the_first_step(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = "\n\n".join(p.text for p in passages("evaluation")[:4])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]
    with create_tiered_cache(model, FadeConfig.safe()) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=1, min_new_tokens=1, do_sample=False, pad_token_id=0)
        where = cache.tiered[0].held.tier_map()
        assert cache.tier_names()[1] == "int4"
        assert int((where == 1).sum()) >= (PROMPT - 4 - 64 - 64) * where.shape[1]
        grown = model.generate(
            torch.cat([ids, ids[:, :1]], 1),
            past_key_values=cache,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
        )
        tokens, held = cache.get_seq_length(), live_bytes(cache)
        assert cache.memory_report().total == held
    assert tokens == grown.shape[1] - 1
    text_config = model.config
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    elements = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * tokens * head_dim
    assert held <= 0.36 * elements * model.dtype.itemsize
    exact = DynamicCache(config=text_config)
    with torch.no_grad():
        model(ids[:, :16], past_key_values=exact, logits_to_keep=1)
    assert live_bytes(exact) == elements // tokens * 16 * model.dtype.itemsize


def test_safe_stays_close_to_the_exact_cache_in_decode(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    texts = [p.text for p in passages("evaluation")[:4]]
    sizes = {"prompt_tokens": 256, "steps": 28, "batch_size": 4}
    exact = exact_runs(
        model, texts, tokenizer=tokenizer, steps_per_forward=28, **sizes
    )  # the same, whatever its passes
    found = divergence(model, config="safe", exact=exact, **sizes)
    assert found.kl_mean <= 0.005
    assert found.top1_agreement >= 0.94  # 112 steps: one standard error of the measured 0.97 is 0.016


def test_two_bit_values_make_the_cache_smaller(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    ids = torch.randint(0, 1000, (1, 200), generator=torch.Generator().manual_seed(1))
    sizes = []
    for bits in (4, 2):
        with create_tiered_cache(model, FadeConfig(middle_k_bits=4, middle_v_bits=bits)) as cache, torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
            sizes.append(live_bytes(cache))
    assert sizes[1] < sizes[0]
