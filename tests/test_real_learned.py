"""The policy that is shipped for the real model (figures: benchmarks/eviction.py)."""

from __future__ import annotations

from typing import Any

import pytest

from fade_core.eval import divergence, exact_runs
from fade_eval.texts import passages

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

PROMPT, STEPS = 512, 24


def test_the_shipped_policy_beats_recency_on_a_kind_of_text_it_never_saw(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = passages("unlike")[0].text
    exact = exact_runs(model, text, tokenizer=tokenizer, prompt_tokens=PROMPT, steps=STEPS, steps_per_forward=STEPS)
    found = {}
    for kind in ("position", "learned"):
        fields = {
            "n_sink": 4,
            "recent_window": 64,
            "ladder": [{"tier": "fp16", "capacity": "rest"}],
            "policy": {"kind": kind, "budget": 0.5},
        }
        result = divergence(
            model, config=fields, prompt_tokens=PROMPT, steps=STEPS, steps_per_forward=STEPS, exact=exact
        )
        found[kind] = result
    assert found["learned"].kl_mean < 0.7 * found["position"].kl_mean
    assert found["learned"].held.cache < 1.15 * found["position"].held.cache  # what it remembers of tokens is counted
