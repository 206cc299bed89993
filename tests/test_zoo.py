"""Model families: exact with a full-precision ladder, smaller with the safe preset, left as they were, or refused by name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import DENSE, attention, stored
from tinymodels import fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, T5Config, T5ForConditionalGeneration

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import ConfigError, UnsupportedModelError
from fade_core.support.memory import live_bytes

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "falcon": {"head_dim": ..., "num_key_value_heads": ..., "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma4_text": {
        "sliding_window": 24,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "head_dim": ..., "num_key_value_heads": ...},
    "gpt_neox": {"head_dim": ..., "num_key_value_heads": ...},
    "gpt_oss": {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "stablelm": {"head_dim": 8},
}
STOCK = {"falcon"}
"""Families whose modelling code takes no attention function: theirs stays, and reads what FADE dequantises for it."""


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return tiny(family, fresh_seed(), **FAMILIES[family])


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


def generate(model: PreTrainedModel, cache: Any, inputs: dict[str, Tensor], new: int = 12) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits ``[new, B, vocabulary]`` behind them."""
    out = model.generate(
        **inputs,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@functools.cache
def answered(family: str) -> tuple[int, dict[str, Tensor], Tensor, Tensor]:
    """A seed, its two rows, and the exact answer to them."""
    seed = fresh_seed()
    inputs = two_rows(seed)
    return seed, inputs, *exact(model_of(family), inputs)


def asked(model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two rows and the exact answer to them."""
    seed, *found = answered(model.config.model_type)
    print(f"FADE_SEED={seed}")
    return tuple(found)


def exact(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the model says over a ``DynamicCache``.

    Gemma 2 runs dense attention of our own for it: its stock one casts float64 masks to float32, where padded rows
    become NaN.
    """
    own = DENSE if model.config.model_type == "gemma2" else model.config._attn_implementation
    with attention(model, own):
        return generate(model, DynamicCache(config=model.config), inputs)


def two_rows(seed: int) -> dict[str, Tensor]:
    return left_padded([prompt(seed, 190)[0], prompt(seed + 1, 151)[0]])


def implementations(model: PreTrainedModel) -> list[str]:
    """Attention of every part of a model, by its configuration."""
    return [str(part.config._attn_implementation) for part in model.modules() if hasattr(part, "config")]


def test_full_precision_is_the_dynamic_cache(model: PreTrainedModel) -> None:
    inputs, tokens, logits = asked(model)
    config = FadeConfig(n_sink=4, recent_window=16, tile=16, ladder=[{"tier": "fp16"}])
    with create_tiered_cache(model, config) as cache:
        found, found_logits = generate(model, cache, inputs)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-5 * float(logits.std()))
    assert all(bool((stored(layer).tier == 1).any(-1).all()) for layer in cache.tiered)


def test_safe_preset_compresses_and_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before = implementations(model)
    inputs, tokens, logits = asked(model)
    with create_tiered_cache(model) as cache:
        assert cache.attention == ("stock" if model.config.model_type in STOCK else "fade")
        assert implementations(model) == before
        compressed, found = generate(model, cache, inputs)
        report = cache.memory_report()
        assert report.total == live_bytes(cache)
        assert report.tokens == cache.get_seq_length() == 190 + 11
        assert len(cache.tiered) == types_of(model).count("full_attention")
        for layer in cache.tiered:
            store = layer.held.stores[0]
            assert store.lengths[:, 0].tolist() == [128, 128 if cache.attention == "stock" else 64]
            coded = sum(t.nbytes for n, t in store.pool.fields.items() if n.startswith(("k.codes", "v.codes")))
            assert coded * 8 == 4 * 2 * layer.held.window.keys.shape[-1] * store.pool.capacity * store.tile
    assert implementations(model) == before
    tolerance = 1e-5 * float(logits.std())
    torch.testing.assert_close(found[0], logits[0], rtol=0, atol=tolerance)  # the prompt is attended exactly
    assert float((found[1] - logits[1]).abs().max()) > 10 * tolerance, "nothing was compressed"
    assert torch.equal(compressed[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert torch.equal(exact(model, inputs)[0], tokens)


def test_a_model_whose_layers_differ_in_heads_is_cached_and_saved(tmp_path: Path) -> None:
    """Gemma 4 with keys that are values has fewer heads in its full layers; transformers then refuses to tell one number."""
    seed = fresh_seed()
    model = tiny("gemma4_text", seed, **FAMILIES["gemma4_text"], attention_k_eq_v=True, num_global_key_value_heads=1)
    with create_tiered_cache(model) as cache:
        model(**two_rows(seed), past_key_values=cache)
        assert {layer.held.window.keys.shape[1] for layer in cache.tiered if layer.held.window is not None} == {1}
        cache.save(tmp_path / "cache.safetensors")
    with TieredKVCache.load(tmp_path / "cache.safetensors", model) as again:
        assert again.memory_report().tokens == 190
        assert again.get_seq_length() == 190


def types_of(model: PreTrainedModel) -> list[str]:
    text = model.config.get_text_config()
    return list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)


def test_stock_attention_refuses_to_evict() -> None:
    model = model_of("falcon")
    before = implementations(model)
    with pytest.raises(ConfigError, match="FalconForCausalLM keeps its own attention"):
        create_tiered_cache(model, policy={"kind": "h2o", "budget": 0.5})
    with pytest.raises(UnsupportedModelError, match="attention = 'auto' or 'stock'"):
        create_tiered_cache(model, attention="fade")
    assert implementations(model) == before


def test_latent_attention_is_refused_by_name() -> None:
    model = tiny(
        "deepseek_v3",
        fresh_seed(),
        head_dim=...,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
    )
    before = implementations(model)
    with pytest.raises(UnsupportedModelError, match=r"DeepseekV3ForCausalLM.*multi-head latent.*DynamicCache"):
        create_tiered_cache(model)
    assert implementations(model) == before


def test_a_model_without_attention_is_refused() -> None:
    model = tiny("mamba", fresh_seed(), head_dim=..., num_key_value_heads=..., num_attention_heads=..., state_size=4)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM has no attention"):
        create_tiered_cache(model)


def test_a_model_of_sliding_windows_alone_is_refused() -> None:
    model = tiny("mistral", fresh_seed(), sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM has no full-attention layer"):
        create_tiered_cache(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        create_tiered_cache(T5ForConditionalGeneration(config))
