"""Eviction and demotion in ``generate``: rows do not know of one another, nothing is fed twice, budgets are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference import stored
from tinymodels import by_turns, fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.cache.layer import TieredLayer
from fade_core.support.memory import live_bytes

SINKS, WINDOW, TILE, EVERY = 3, 16, 16, 8
LENGTH = 300
POLICIES = ("position", "h2o", "ema")
RUNGS = {
    "exact": {"ladder": [{"tier": "fp16"}]},
    "tiles": {"keys": {"kind": "uniform", "axis": "channel"}},
    "tokens": {"keys": {"kind": "uniform", "axis": "token"}},
}
"""Full precision; keys that share scales, so that whole tiles move; keys that do not, so that single tokens do."""
EACH = pytest.mark.parametrize(("policy", "rung", "max_cache_len"), by_turns(LENGTH, POLICIES, RUNGS))


def halved(policy: str, rung: str = "tokens", budget: float | int = 0.5) -> FadeConfig:
    return FadeConfig(
        n_sink=SINKS,
        recent_window=WINDOW,
        tile=TILE,
        policy={"kind": policy, "budget": budget, "every": EVERY},
        **RUNGS[rung],
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One layer: each evicts for itself."""
    return tiny("llama", fresh_seed(), num_hidden_layers=1)


def greedy(model: PreTrainedModel, cache: TieredKVCache, inputs: dict[str, Tensor], new: int, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        **inputs, past_key_values=cache, do_sample=False, max_new_tokens=new, min_new_tokens=new, **options
    )
    return found


@contextmanager
def fed(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens a row that each forward pass is given."""
    counts: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None)
        counts.append(given.shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


class Watch(LogitsProcessor):
    """Looks at the cache after every forward pass."""

    def __init__(self, cache: TieredKVCache, budget: float) -> None:
        self.cache, self.budget = cache, budget
        self.seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for layer in self.cache.tiered:
            check_sinks_and_window(layer)
            check_budget(layer, self.budget, slack=EVERY + TILE - 1)
        self.seen += 1
        return scores


def check_sinks_and_window(layer: TieredLayer) -> None:
    tiers = stored(layer).tier
    for row, padding in enumerate(layer.held.padding.tolist()):
        assert bool((tiers[row, :, :padding] == -1).all())
        assert bool((tiers[row, :, padding : padding + SINKS] == 0).all())
        assert bool((tiers[row, :, max(padding, layer.logical - WINDOW) :] == 0).all())


def check_budget(layer: TieredLayer, budget: float, slack: int = 0) -> None:
    """At most the budget, or what always stays; ``slack`` for what came since the last ranking."""
    kept = (stored(layer).tier >= 0).sum(-1)
    for row, padding in enumerate(layer.held.padding.tolist()):
        allowed = max(int((layer.logical - padding) * budget), int(layer.held.window.lengths[row]))
        assert int(kept[row].max()) <= allowed + slack


@EACH
def test_padded_rows_equal_their_unpadded_runs(
    model: PreTrainedModel, policy: str, rung: str, max_cache_len: int | None
) -> None:
    seed, new = fresh_seed(), 17  # of each row a tile fills, and tokens are ranked twice
    rows = [prompt(seed + i, length)[0] for i, length in enumerate((101, 164, 60))]
    batch = left_padded(rows)
    with create_tiered_cache(model, halved(policy, rung), max_cache_len) as together:
        tokens = greedy(model, together, batch, new)
    width = batch["input_ids"].shape[1]
    for row, ids in enumerate(rows):
        with create_tiered_cache(model, halved(policy, rung), max_cache_len) as alone:
            own = greedy(model, alone, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}, new)
        assert torch.equal(tokens[row, width - len(ids) :], own[0])
        for ours, theirs in zip(together.tiered, alone.tiered, strict=True):
            mine, other = stored(ours), stored(theirs)
            padding = width - len(ids)
            assert bool((mine.tier[row, :, :padding] == -1).all())
            assert torch.equal(mine.tier[row, :, padding:], other.tier[0])
            assert int((other.tier == -1).sum()) > 0
            torch.testing.assert_close(mine.keys[row, :, padding:], other.keys[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("policy", "max_cache_len"), [("position", None), ("h2o", LENGTH), ("ema", LENGTH)])
def test_turn_two_is_fed_its_new_tokens_only(model: PreTrainedModel, policy: str, max_cache_len: int | None) -> None:
    seed = fresh_seed()
    said = prompt(seed, 120)
    with create_tiered_cache(model, halved(policy), max_cache_len) as cache, fed(model) as counts:
        answer = greedy(model, cache, {"input_ids": said, "attention_mask": torch.ones_like(said)}, 30)
        assert counts == [120] + [1] * 29
        assert cache.get_seq_length() == 149  # the last token has not been through the model
        assert all(int(layer.held.lengths[0]) == 149 for layer in cache.tiered)
        counts.clear()
        grown = torch.cat([answer, prompt(seed + 1, 50)], 1)
        greedy(model, cache, {"input_ids": grown, "attention_mask": torch.ones_like(grown)}, 20)
        assert counts == [1 + 50] + [1] * 19
        assert cache.get_seq_length() == 150 + 50 + 19


@EACH
def test_sinks_and_window_stay_and_budgets_hold(
    model: PreTrainedModel, policy: str, rung: str, max_cache_len: int | None
) -> None:
    seed = fresh_seed()
    inputs = left_padded([prompt(seed, 140)[0], prompt(seed + 1, 90)[0]])
    with create_tiered_cache(model, halved(policy, rung), max_cache_len) as cache:
        watch = Watch(cache, 0.5)
        greedy(model, cache, inputs, 34, logits_processor=LogitsProcessorList([watch]))
        assert watch.seen == 34
        cache.rank()
        for layer in cache.tiered:
            check_sinks_and_window(layer)
            check_budget(layer, 0.5)
            assert layer.get_seq_length() == 140 + 33


@EACH
def test_a_budget_of_sinks_and_window_keeps_nothing_else(
    model: PreTrainedModel, policy: str, rung: str, max_cache_len: int | None
) -> None:
    ids = prompt(fresh_seed(), 130)
    config = halved(policy, rung, budget=SINKS + WINDOW)
    with create_tiered_cache(model, config, max_cache_len) as cache:
        greedy(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 30)
        cache.rank()
        for layer in cache.tiered:
            check_sinks_and_window(layer)
            tiers = stored(layer).tier
            assert bool((tiers <= 0).all())
            assert int((tiers == 0).sum(-1).max()) < SINKS + WINDOW + TILE
        assert cache.memory_report().total == live_bytes(cache)


# --- a ladder of three ------------------------------------------------------------------------------------------------


def three_tiers(axis: str = "token") -> FadeConfig:
    return FadeConfig(
        n_sink=SINKS,
        recent_window=WINDOW,
        tile=TILE,
        keys={"kind": "uniform", "axis": axis},
        ladder=[
            {"tier": "fp16", "capacity": 32},
            {"tier": "int4", "capacity": 0.4},
            {"tier": "int2", "capacity": "rest"},
        ],
        policy={"kind": "h2o", "every": EVERY},
    )


@pytest.mark.parametrize(("axis", "max_cache_len"), [("token", LENGTH), ("channel", None)])
def test_every_tier_is_reached_and_counts_are_right(
    model: PreTrainedModel, axis: str, max_cache_len: int | None
) -> None:
    seed = fresh_seed()
    inputs = left_padded([prompt(seed, 200)[0], prompt(seed + 1, 120)[0]])
    with create_tiered_cache(model, three_tiers(axis), max_cache_len) as cache:
        assert cache.tier_names() == ["fp16", "fp16", "int4", "int2"]
        greedy(model, cache, inputs, 45)
        cache.rank()
        for layer in cache.tiered:
            check_sinks_and_window(layer)
            tiers = stored(layer).tier
            assert torch.equal(tiers, layer.held.tier_map())
            for row, real in enumerate((200 + 44, 120 + 44)):
                counts = torch.stack([(tiers[row] == level).sum(-1) for level in range(4)])
                assert bool((counts.sum(0) == real).all())
                assert bool((counts[0] == layer.held.window.lengths[row]).all())
                assert bool((counts[1] == 32).all())
                assert bool((counts[2] <= int(0.4 * real)).all())
                assert bool((counts[2] > int(0.4 * real) - TILE).all())
                assert bool((counts[3] > TILE).all())


@pytest.mark.parametrize(("axis", "max_cache_len"), [("token", None), ("channel", LENGTH)])
def test_no_token_is_quantised_twice_at_one_precision(
    model: PreTrainedModel, axis: str, max_cache_len: int | None
) -> None:
    """Over 32 rankings between which tokens come and go, a token keeps its codes as long as it keeps its tier."""
    seed = fresh_seed()
    ids = prompt(seed, 150)
    moved = 0
    with create_tiered_cache(model, three_tiers(axis), max_cache_len) as cache, torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        exact = [(layer, stored(layer)) for layer in cache.tiered]
        first = exact
        for step in range(32):
            for _ in range(3):
                model(prompt(seed + step, 12)[:, -1:], past_key_values=cache, use_cache=True)
            for layer in cache.tiered:  # as if attention had gone elsewhere
                for held in layer.held.statistics():
                    held["mass"].mul_(torch.rand_like(held["mass"]))
            cache.rank()
            now = [(layer, stored(layer)) for layer in cache.tiered]
            for (_, before), (layer, after) in zip(first, now, strict=True):
                length = before.tier.shape[-1]
                same = (before.tier == after.tier[..., :length]) & (before.tier > 0)
                assert int(same.sum()) > 0
                for old, new in ((before.keys, after.keys), (before.values, after.values)):
                    assert torch.equal(old[same], new[..., :length, :][same])
                assert bool((after.tier[..., :length] >= before.tier).all()), f"layer {layer.index}: a token moved up"
                moved += int((after.tier[..., :length] > before.tier).sum())
            first = now
    assert moved > 0


def test_two_bit_values_make_the_cache_smaller(model: PreTrainedModel) -> None:
    ids = prompt(fresh_seed(), 180)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    held = {}
    for bits in (4, 2):
        config = FadeConfig(n_sink=SINKS, recent_window=WINDOW, tile=TILE, middle_k_bits=4, middle_v_bits=bits)
        with create_tiered_cache(model, config) as cache:
            greedy(model, cache, inputs, 20)
            held[bits] = cache.compressed_storage_bytes()
            assert held[bits] == live_bytes(cache)
    packed = 2 * 16 * 160  # heads, channels, tokens that are certainly packed
    assert held[4] - held[2] >= packed * 2 // 8
