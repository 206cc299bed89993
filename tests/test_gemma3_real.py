"""Gemma 3 270M out of its wheels: the configuration that a GGUF file only implies, and what its cache compresses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fade_core import create_tiered_cache, load_model
from fade_eval.texts import passages

pytestmark = [pytest.mark.gemma3, pytest.mark.slow]

FULL = (5, 11, 17)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("gemma3-270m", device="cpu")


def test_the_configuration_is_gemma3s(loaded: tuple[Any, Any]) -> None:
    config = loaded[0].config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (18, 4, 1)
    assert (config.head_dim, config.sliding_window, config.query_pre_attn_scalar) == (256, 512, 256)
    assert config.attn_logit_softcapping is None
    assert tuple(i for i, kind in enumerate(config.layer_types) if kind == "full_attention") == FULL
    bases = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert bases == {"full_attention": 1e6, "sliding_attention": 1e4}


def test_it_reads_english(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    losses = []
    for passage in passages("calibration")[:3]:  # an encyclopedia, the law, a novel
        ids = tokenizer(passage.text, return_tensors="pt")["input_ids"][:, :600]
        assert int(ids[0, 0]) == tokenizer.bos_token_id
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    assert math.exp(sum(losses) / 3) < 30  # 13; with the rotary bases exchanged 88, with norms off by 0.2 82


def test_full_attention_layers_alone_are_compressed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(passages("calibration")[0].text, return_tensors="pt")["input_ids"][:, :300]
    exact = model(ids, use_cache=True).past_key_values
    cache = create_tiered_cache(model, keys={"kind": "rotated", "bits": 8}, values={"kind": "rotated", "bits": 8})
    try:
        with torch.no_grad():
            cache.prefill(model, ids[:, :-1])
            found = model(ids[:, -1:], past_key_values=cache).logits[0, -1].log_softmax(-1)
            wanted = model(ids).logits[0, -1].log_softmax(-1)
        assert [layer.plan.index for layer in cache.tiered] == list(FULL)
        assert float((wanted.exp() * (wanted - found)).sum()) < 1e-3
    finally:
        cache.detach()
    assert all(layer.is_sliding == (index not in FULL) for index, layer in enumerate(exact.layers))
