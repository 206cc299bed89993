"""KVzip: the prompt stays whole until the model has repeated it, and the repetition leaves nothing but its scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_run import HEADS, KV_HEADS, Listening, dense_run, left_padded, tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import InputError, UnsupportedModelError
from fade_policy_attention.kvzip import OVERLAP

SHORT = {"n_sink": 2, "recent_window": 16, "tile": 16, "ladder": [{"tier": "fp16"}]}
KVZIP = {"kind": "kvzip", "budget": 64, "every": 8}
AROUND_IT = {"kind": "adakv", "budget": 64, "every": 8, "base": {"kind": "kvzip", "chunk": 50}}


@pytest.mark.parametrize(("chunk", "instruction"), [(512, []), (48, [7, 9, 4])])
def test_scores_are_those_of_a_dense_repetition(
    chunk: int, instruction: list[int], seed: int, generator: torch.Generator
) -> None:
    """Rows padded on the left give what each would alone."""
    model = tiny_model(seed)
    ids, mask = left_padded((120, 75), generator)
    policy = {**KVZIP, "chunk": chunk, "instruction": instruction}
    with create_tiered_cache(model, config=FadeConfig(**SHORT, policy=policy)) as cache:
        listening = Listening(cache.policy)
        for layer in cache.tiered:
            layer.plan.policy = listening
        cache.prefill(model, ids, mask)
        assert [(h.layer, h.length) for h in listening.heard] == [(0, 120), (1, 120)]
        assert cache.get_seq_length() == 120
        assert all(int((layer.held.tier_map()[0] >= 0).sum(-1).max()) <= 64 for layer in cache.tiered)
    for row, length in enumerate((120, 75)):
        # the batch is cut at its columns, so is the row alone: a row's first chunk is what is left of it
        padding = 120 - length
        alone = [torch.zeros(KV_HEADS, length, dtype=torch.float64) for _ in range(2)]
        for start in range(0, 120, chunk):
            part = ids[row : row + 1, max(0, start - OVERLAP, padding) : start + chunk]
            whole = torch.cat([ids[row : row + 1, padding:], torch.tensor([instruction]).long(), part], 1)
            for layer, dense in enumerate(dense_run(model, whole, torch.ones_like(whole))):
                given = dense.attention[0, :, length:, :length].unflatten(0, (KV_HEADS, HEADS // KV_HEADS))
                if given.shape[2]:
                    alone[layer] = torch.maximum(alone[layer], given.amax((1, 2)))
        for layer, wanted in zip(listening.heard, alone, strict=True):
            found = layer.by_position(torch.zeros(2, KV_HEADS, 120, dtype=torch.float64))[row, :, padding:]
            assert float((found - wanted).abs().max()) <= 1e-5


def test_reading_leaves_everything_else_as_it_was(seed: int, generator: torch.Generator) -> None:
    model = tiny_model(seed)
    ids, mask = left_padded((90, 70), generator)
    policy = {"kind": "adakv", "budget": 64, "base": {"kind": "kvzip"}}
    with create_tiered_cache(model, config=FadeConfig(**SHORT, policy=policy)) as cache, torch.no_grad():
        cache.prefill(model, ids, mask)
        before = [{n: t.clone() for n, t in layer.tensors().items()} for layer in cache.tiered]
        logits = []
        for _ in range(2):
            with cache.reading():
                seen = torch.cat([mask, torch.ones(2, 5).long()], 1)
                logits.append(model(ids[:, -5:], attention_mask=seen, past_key_values=cache).logits)
        assert torch.equal(logits[0], logits[1])
        assert cache.get_seq_length() == 90
        for layer, held in zip(cache.tiered, before, strict=True):
            now = layer.tensors()
            assert {name.split("/")[-1].removeprefix("tiles.") for name in now.keys() - held.keys()} <= {
                "ids",
                "valid",
            }  # indices of what is there
            for name, tensor in now.items():
                if name not in held:
                    continue
                if "reread" in name:
                    assert bool((tensor >= held[name]).all())
                else:
                    assert torch.equal(tensor, held[name])
        direct = model(ids[:, -5:], attention_mask=seen, past_key_values=cache).logits
        torch.testing.assert_close(direct, logits[0], rtol=0, atol=1e-5 * float(direct.std()))
        assert cache.get_seq_length() == 95


@pytest.mark.parametrize("policy", [KVZIP, AROUND_IT])
def test_generates_after_it(policy: dict[str, Any], seed: int, generator: torch.Generator) -> None:
    model = tiny_model(seed)
    ids, mask = left_padded((120, 100), generator)
    with create_tiered_cache(model, config=FadeConfig(**SHORT, policy=policy)) as cache:
        cache.prefill(model, ids[:, :-1], mask[:, :-1], chunk=70)
        output = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=60, min_new_tokens=60, do_sample=False
        )
        assert output.shape == (2, 180)
        for layer in cache.tiered:
            kept = (layer.held.tier_map() >= 0).sum(-1).double()
            assert float(kept.mean(1).max()) <= 64 + 8 + 16
            assert bool((layer.held.tier_map()[..., 130:] >= 0).all())  # what came after the prompt is kept before it


def test_a_plain_prefill_says_what_to_do(seed: int, generator: torch.Generator) -> None:
    model = tiny_model(seed)
    ids, _ = left_padded((120,), generator)
    saying = pytest.raises(InputError, match=r"feed the prompt with cache\.prefill\(model, ")
    with create_tiered_cache(model, config=FadeConfig(**SHORT, policy=KVZIP)) as cache, torch.no_grad(), saying:
        model(ids, past_key_values=cache)


def small(model_type: str, seed: int, **fields: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 2}
    config = CONFIG_MAPPING[model_type](**sizes, num_key_value_heads=1, num_hidden_layers=2, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


def test_sliding_layers_are_left_as_they_were(seed: int, generator: torch.Generator) -> None:
    layers = ["sliding_attention", "full_attention"]
    model = small("gemma3_text", seed, sliding_window=24, layer_types=layers)
    ids, _ = left_padded((100,), generator)
    with create_tiered_cache(model, config=FadeConfig(**SHORT, policy=KVZIP)) as cache, torch.no_grad():
        plain = create_tiered_cache(model, config=FadeConfig(**SHORT))
        wanted = model(ids, past_key_values=plain).logits
        found = cache.prefill(model, ids).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.std()))
        sliding, other = cache.layers[0], plain.layers[0]
        assert torch.equal(sliding.keys, other.keys)
        assert sliding.get_seq_length() == other.get_seq_length() == 100
        plain.detach()


def test_a_model_with_recurrent_layers_is_refused(seed: int, generator: torch.Generator) -> None:
    layers = ["linear_attention", "full_attention"]
    model = small(
        "qwen3_next", seed, layer_types=layers, num_experts=0, linear_num_value_heads=2, linear_num_key_heads=1
    )
    ids, _ = left_padded((60,), generator)
    config = FadeConfig(**SHORT, policy=KVZIP)
    refused = pytest.raises(
        UnsupportedModelError, match="cannot repeat a prompt without adding to the cache: its Linear"
    )
    with create_tiered_cache(model, config=config) as cache:
        with refused:
            cache.prefill(model, ids)
        assert cache.get_seq_length() == 0
