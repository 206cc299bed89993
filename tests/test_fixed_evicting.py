"""A cache of fixed size evicts what the growing one does, in every mode, between the same passes."""

from __future__ import annotations

import pytest
import torch
from modes import MODES, tiny_task
from test_fixed_modes import REFUSED
from test_modes import LADDERS, PACKED, SHORT, each_mode, evicted_by_padding, model_of
from tinymodels import fresh_seed, prompt
from torch import Tensor

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError, NonFiniteError
from fade_core.storage.evictingstore import EvictingStore
from fade_core.support.memory import live_bytes

TOKENS = {"kind": "uniform", "axis": "token"}
EVICTING = {
    "ema, whole tiles": LADDERS["ema"],
    "h2o": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "h2o", "budget": 0.6, "every": 8}),
    "position": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "position", "budget": 70, "every": 5}),
    "snapkv": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "snapkv", "budget": 0.5, "every": 16}),
    "capacity": FadeConfig(**SHORT, ladder=[{"tier": "int4", "capacity": 48}], policy={"kind": "h2o", "every": 8}),
}
CASES = [
    (family, name, mode)
    for number, (family, name, mode) in enumerate(each_mode([*EVICTING]))
    if number % 3 and (family, mode) not in REFUSED  # which tests/test_fixed_modes.py sees refused
]
"""Each mode with two of the three families."""


@pytest.mark.parametrize(("family", "name", "mode"), CASES)
def test_fixed_evicts_as_the_growing_cache(family: str, name: str, mode: str) -> None:
    model, seed, found = model_of(family), fresh_seed(), []
    for options in ({}, {"max_cache_len": 300}):
        with create_tiered_cache(model, EVICTING[name], **options) as cache:
            found.append((MODES[mode](tiny_task(model, seed), lambda padding, cache=cache: cache), cache))
    (wanted, growing), (ours, fixed) = found
    assert not fixed.compile_refusal
    for tokens, others in zip(ours.tokens, wanted.tokens, strict=True):
        assert torch.equal(tokens, others)
    for logits, others in zip(ours.logits, wanted.logits, strict=True):
        torch.testing.assert_close(logits, others, rtol=0, atol=1e-6 * float(others.std()))
    for mine, theirs in zip(fixed.tiered, growing.tiered, strict=True):
        mine.commit()
        mine.settle()
        assert isinstance(mine.stores[0], EvictingStore)
        assert mine.logical == theirs.logical
        assert torch.equal(mine.tier_map(), theirs.tier_map())
        assert int((mine.tier_map() < 0).sum()) > evicted_by_padding(mine)
        for name_, held in mine.statistics()[0].items():
            others = theirs.statistics()[0][name_]
            live = theirs.stores[0].positions() >= 0
            torch.testing.assert_close(held[live], others[live], rtol=1e-4, atol=1e-5)
    assert fixed.memory_report().total == live_bytes(fixed)


@torch.no_grad()
def fed(name: str, length: int, steps: int, **options: object) -> TieredKVCache:
    cache = create_tiered_cache(model_of("llama"), EVICTING[name], **options)
    model_of("llama")(prompt(1, length, 2), past_key_values=cache, use_cache=True)
    go_on(cache, steps)
    return cache


@torch.no_grad()
def go_on(cache: TieredKVCache, steps: int) -> Tensor:
    model = model_of("llama")
    logits = [model(prompt(90 + s, 1, 2), past_key_values=cache, use_cache=True).logits for s in range(steps)]
    return torch.cat(logits, 1) if logits else torch.empty(0)


@torch.no_grad()
def test_buffers_are_for_what_is_kept_and_a_later_prompt_that_does_not_fit_is_refused() -> None:
    model = model_of("llama")
    with fed("position", 3000, 3, max_cache_len=9000) as cache:
        whole = create_tiered_cache(model, PACKED["token_keys"], max_cache_len=9000)
        with whole:
            model(prompt(1, 3000, 2), past_key_values=whole, use_cache=True)
        assert cache.memory_report().total < 0.3 * whole.memory_report().total
        layer, before = cache.tiered[0], cache.cache_state_dict()["tensors"]
        with pytest.raises(InputError, match=r"1500 tokens at once would pack .*prefill_chunk_size=512"):
            model(prompt(3, 1500, 2), past_key_values=cache, use_cache=True)
        after = cache.cache_state_dict()["tensors"]
        assert all(torch.equal(after[key], held) for key, held in before.items())
        for part in prompt(3, 1500, 2).split(500, 1):
            model(part, past_key_values=cache, use_cache=True)
        cache.get_mask_sizes(1, 0)
        assert cache.get_seq_length() == 4503
        assert int(layer.stores[0].lengths.max()) + int(layer.window.lengths.max()) <= 70  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["h2o", "ema, whole tiles"])
def test_a_step_that_fails_in_a_later_layer_leaves_statistics_as_they_were(name: str) -> None:
    model, weight = model_of("llama"), model_of("llama").model.layers[1].self_attn.k_proj.weight
    with fed(name, 150, 17, max_cache_len=300) as cache, fed(name, 150, 17) as growing:
        kept = weight.data.clone()
        for _ in range(9):  # one of them hands a tile down, one is ranked
            weight.data[0, 0] = torch.nan
            with pytest.raises(NonFiniteError, match="The cache is as it was before this step"):
                go_on(cache, 1)
            weight.data.copy_(kept)
            torch.testing.assert_close(go_on(cache, 2), go_on(growing, 2))
        assert cache.get_seq_length() == 185
        for mine, theirs in zip(cache.tiered, growing.tiered, strict=True):
            mine.settle()
            assert torch.equal(mine.tier_map(), theirs.tier_map())
    assert model is model_of("llama")


@pytest.mark.parametrize("name", ["h2o", "ema, whole tiles", "position"])
@pytest.mark.parametrize(("first", "second"), [(None, 300), (300, None), (300, 300)])
def test_checkpoints_go_on_in_caches_of_either_kind(name: str, first: int | None, second: int | None) -> None:
    with fed(name, 150, 20, max_cache_len=first) as cache:
        cache.settle()
        state = cache.cache_state_dict()
        wanted = go_on(cache, 25)
    with create_tiered_cache(model_of("llama"), EVICTING[name], max_cache_len=second) as other:
        other.load_cache_state_dict(state)
        assert other.get_seq_length() == 170
        torch.testing.assert_close(go_on(other, 25), wanted)


def test_a_crop_that_would_cut_a_packed_tile_is_refused_before_anything_changes() -> None:
    with fed("h2o", 150, 20, max_cache_len=300) as cache, fed("h2o", 150, 20) as growing:
        for held in (cache, growing):
            held.crop(-3)
        torch.testing.assert_close(go_on(cache, 9), go_on(growing, 9))
        before = cache.cache_state_dict()["tensors"]
        with pytest.raises(InputError, match="cannot be taken back: some share a packed tile"):
            cache.crop(-80)
        after = cache.cache_state_dict()["tensors"]
        assert all(torch.equal(after[key], held) for key, held in before.items())
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FadeConfig(**SHORT, policy={"kind": "h2o", "budget": "1MB"}), "budget is in bytes"),
        (FadeConfig(**SHORT, policy={"kind": "adakv", "budget": 0.5}), "budgets of their own"),
        (FadeConfig(**SHORT, policy={"kind": "expected_attention", "budget": 0.5}), "statistics of the queries"),
        (FadeConfig(**SHORT, policy={"kind": "kvzip", "budget": 0.5}), "reads the prompt again"),
        (LADDERS["position"], "2 tiers"),
    ],
)
def test_what_cannot_be_evicted_in_place_grows_and_says_why(config: FadeConfig, reason: str) -> None:
    with create_tiered_cache(model_of("llama"), config, max_cache_len=300) as cache:
        assert reason in cache.compile_refusal
