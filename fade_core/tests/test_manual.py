"""The manual loop: tracked passes, ranking on demand, tiers chosen by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import assert_same_state, feed, greedy, left_padded, tiny_gemma3, tiny_qwen3
from tiny import fresh_seed, tiny_llama
from torch import Tensor

from fade_core import (
    AttentionTracker,
    FadeConfig,
    TieredKVCache,
    apply_tier_assignment,
    apply_tier_assignment_per_sequence,
    create_tiered_cache,
    forward_with_tracking,
    reassign_tiers,
)
from fade_core.builtin.telemetry import Collector, attach_telemetry
from fade_core.errors import InputError

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
TOKENWISE: dict[str, Any] = {"kind": "uniform", "bits": 4, "axis": "token"}
H2O: dict[str, Any] = SMALL | {"policy": {"kind": "h2o", "budget": 70, "every": 1000}, "keys": TOKENWISE}
LADDER: dict[str, Any] = SMALL | {
    "keys": TOKENWISE,
    "policy": {"kind": "h2o", "every": 1000},
    "ladder": [{"tier": "int4", "capacity": 500}, {"tier": "int2", "capacity": 500}],
}
FP16, INT4, INT2, EVICTED = 0, 1, 2, -1
LENGTH = 300


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(params=[None, LENGTH])
def max_cache_len(request: Any) -> int | None:
    """Every test of this file is one of both."""
    found: int | None = request.param
    return found


@pytest.fixture
def make(max_cache_len: int | None) -> Any:
    """Makes a cache of a model and fields of a configuration."""
    return lambda model, fields: create_tiered_cache(model, FadeConfig(**fields), max_cache_len)


@pytest.fixture
def ladder_cache(make: Any) -> Any:
    """Makes a cache of two tiers and feeds it a prompt."""

    def made(model: Any, tokens: int = 100, batch: int = 2) -> TieredKVCache:
        cache: TieredKVCache = make(model, LADDER)
        forward_with_tracking(model, torch.randint(1, 256, (batch, tokens)), cache)
        return cache

    return made


# --- the loop ---


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3, tiny_gemma3])
def test_the_loop_of_prefill_steps_and_reassignment(build: Any, make: Any) -> None:
    """As a program against the earlier releases writes it, the tracker passed along."""
    model = build()
    cache = make(model, H2O)
    tracker: AttentionTracker = cache.tracker
    ids = torch.randint(1, 256, (1, 90))
    output = forward_with_tracking(model, ids, cache, tracker)
    reassign_tiers(cache, tracker, model.config.num_hidden_layers)
    tokens = []
    for step in range(20):
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(token)
        output = forward_with_tracking(model, token, cache, tracker=tracker)
        if step % 10 == 9:
            reassign_tiers(cache, tracker)
            for layer in cache.tiered:
                assert int(layer.held.tier_map().ge(0).sum(-1).max()) <= 70
    assert cache.get_seq_length() == 110
    assert torch.isfinite(output.logits).all()
    # the same tokens as inside generate, which ranks by itself as often
    own = make(model, H2O | {"policy": {"kind": "h2o", "budget": 70, "every": 10}})
    found = model.generate(ids, past_key_values=own, max_new_tokens=20, do_sample=False)
    assert torch.equal(found[:, 90:], torch.cat(tokens, dim=1))


def test_passes_are_tracked_without_eager_attention(llama: Any, make: Any) -> None:
    cache = make(llama, LADDER)
    ids, mask = left_padded((60, 41))
    forward_with_tracking(llama, ids, cache, attention_mask=mask)
    for step in range(4):
        for layer in cache.tiered:
            # each query gives every row and head a mass of one: 60 and 41 of the prompt, then one a step
            assert mass_of(layer) == pytest.approx(2 * (60 + 41 + 2 * step), rel=1e-4)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        forward_with_tracking(llama, ids[:, step : step + 1], cache, attention_mask=mask)


def mass_of(layer: Any) -> float:
    """Attention that the tokens of a layer received, summed."""
    window = float(layer.held.window.state()["statistic.mass"].sum())
    stored = [s.statistics["mass"].masked_fill(s.live_positions() < 0, 0).sum() for s in layer.held.stores if s.tiles]
    return window + sum(map(float, stored))


def test_ranking_only_some_layers(llama: Any, make: Any) -> None:
    cache = make(llama, H2O | {"policy": {"kind": "h2o", "budget": 40, "every": 1000}})
    forward_with_tracking(llama, torch.randint(1, 256, (1, 60)), cache)
    for _ in range(30):
        forward_with_tracking(llama, torch.randint(1, 256, (1, 1)), cache)
    reassign_tiers(cache, num_layers=1)
    kept = [int((layer.held.tier_map() >= 0).sum(-1).max()) for layer in cache.tiered]
    assert kept[0] <= 40 < kept[1]
    assert kept[1] == kept[2]


def test_another_tracker_is_refused(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama)
    before = cache.cache_state_dict()
    other = AttentionTracker(("mass",))
    with pytest.raises(InputError, match=r"pass tracker=cache\.tracker"):
        forward_with_tracking(llama, torch.randint(1, 256, (2, 1)), cache, other)
    with pytest.raises(InputError, match=r"pass tracker=cache\.tracker"):
        reassign_tiers(cache, other)
    assert_same_state(cache.cache_state_dict(), before)


# --- tiers by hand ---


def random_move_down(now: Tensor) -> Tensor:
    """A map that every token can follow: down or where it is; the window's tokens alike in all heads."""
    target = torch.randint(0, 4, now.shape)
    target[now == FP16] = target[:, :1].expand_as(target)[now == FP16]
    level = torch.where(now < 0, 3, now)
    deeper = torch.maximum(target, level)
    return torch.where(deeper == 3, EVICTED, deeper)


def test_tokens_are_where_the_map_sends_them_and_keep_what_they_are(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama)
    for layer in cache.tiered:
        for _ in range(3):
            before, dense = layer.held.tier_map(), tokens_of(layer)
            wanted = random_move_down(before)
            apply_tier_assignment_per_sequence(cache, layer.index, wanted)
            assert torch.equal(layer.held.tier_map(), wanted)
            after = tokens_of(layer)
            stayed = (wanted == before) & (wanted >= 0)
            for was, found in zip(dense, after, strict=True):
                assert torch.equal(found[stayed], was[stayed])  # codes are not touched
                moved = (wanted != before) & (wanted >= 0)
                assert bool(((found - was).abs()[moved] < 2.5).all())  # 2 bits over a spread of some 8
    logits = feed(llama, torch.randint(1, 256, (2, 1)), cache)
    assert torch.isfinite(logits).all()


def tokens_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values at their positions, ``[B, H, T, D]``, zeros where evicted."""
    found = []
    for side in (0, 1):
        window = layer.held.window
        shape = (*layer.held.tier_map().shape[:2], layer.logical + 1, 16)
        out = torch.zeros(shape)
        parts = [(window.live_positions(), window.decode(side))]
        parts += [(store.live_positions(), store.decode(side)) for store in layer.held.stores if store.tiles]
        for positions, tokens in parts:
            index = positions.expand(-1, shape[1], -1)
            index = index.where(index >= 0, torch.full_like(index, layer.logical))
            out.scatter_(2, index[..., None].expand_as(tokens), tokens)
        found.append(out[:, :, :-1])
    return found[0], found[1]


def test_generation_goes_on_with_what_the_map_left(llama: Any, max_cache_len: int | None) -> None:
    """A map that evicts some tokens equals a mask that hides them, where the others keep full precision."""
    config = FadeConfig(n_sink=2, recent_window=16, tile=16, keys=TOKENWISE, policy={"kind": "h2o", "every": 1000},
                        ladder=[{"tier": "fp16", "capacity": 500}])  # fmt: skip
    ids = torch.randint(1, 256, (1, 80))
    evicted = torch.zeros(80, dtype=torch.bool)
    evicted[torch.randperm(60)[:25] + 5] = True
    cache = create_tiered_cache(llama, config, max_cache_len)
    forward_with_tracking(llama, ids, cache)
    for layer in cache.tiered:
        wanted = layer.held.tier_map()[0, 0].clone()
        wanted[evicted] = EVICTED
        apply_tier_assignment(cache, layer.index, wanted)
    plain = create_tiered_cache(llama, config, max_cache_len)
    forward_with_tracking(llama, ids, plain)
    mask = torch.cat([(~evicted).long()[None], torch.ones(1, 1, dtype=torch.long)], dim=1)
    token = torch.randint(1, 256, (1, 1))
    positions = torch.tensor([[80]])
    with torch.no_grad():
        found = llama(token, past_key_values=cache, position_ids=positions).logits
        expected = llama(token, past_key_values=plain, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_map_for_all_rows_and_one_a_row(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama, 100)
    assert cache.tier_names() == ["fp16", "int4", "int2"]
    wanted = cache.tiered[0].held.tier_map()[0, 0].clone()
    wanted[10:20], wanted[30:35] = INT2, EVICTED
    apply_tier_assignment(cache, 0, wanted)
    assert torch.equal(cache.tiered[0].held.tier_map(), wanted.expand(2, 2, -1))
    rows = torch.stack([wanted, wanted])
    rows[1, 40:50] = INT2
    apply_tier_assignment_per_sequence(cache, 0, rows)
    assert torch.equal(cache.tiered[0].held.tier_map(), rows[:, None].expand(-1, 2, -1))
    assert cache.tiered[1].held.tier_map().max() == INT4  # other layers are as they were


def test_padding_is_nowhere_whatever_the_map_says(llama: Any, make: Any) -> None:
    ids, mask = left_padded((60, 41))
    cache = make(llama, LADDER)
    forward_with_tracking(llama, ids, cache, attention_mask=mask)
    apply_tier_assignment(cache, 0, torch.full((60,), INT2))
    levels = cache.tiered[0].held.tier_map()
    assert bool((levels[0] == INT2).all())
    assert bool((levels[1, :, :19] == EVICTED).all())
    assert bool((levels[1, :, 19:] == INT2).all())


def test_moves_are_events(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama, 100, batch=1)
    sink = Collector()
    attach_telemetry(cache, sink)
    wanted = cache.tiered[1].held.tier_map()[0, 0].clone()
    window = (wanted == FP16).nonzero().flatten()
    wanted[window[-3:]] = INT4
    wanted[10:20], wanted[30:35] = INT2, EVICTED
    apply_tier_assignment(cache, 1, wanted)
    assert sink.tokens() == {"encode": 2 * 3, "demote": 2 * 10, "evict": 2 * 5, "reassign": 2 * 18}
    assert {event.layer for event in sink.events} == {1}


# --- what is refused, and changes nothing ---


def refused(cache: TieredKVCache, layer: int, tiers: Tensor, message: str) -> None:
    before = cache.cache_state_dict()
    apply = apply_tier_assignment if tiers.dim() == 1 else apply_tier_assignment_per_sequence
    with pytest.raises(InputError, match=message):
        apply(cache, layer, tiers)
    assert_same_state(cache.cache_state_dict(), before)


def test_upward_moves_are_refused(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama)
    now = cache.tiered[0].held.tier_map()[0, 0].clone()
    down = now.clone()
    down[10:20], down[-1] = INT2, INT4  # moves that would work beside one that does not
    up = down.clone()
    up[50] = FP16
    refused(cache, 0, up, "4 tokens were asked back up the ladder")
    apply_tier_assignment(cache, 0, down)
    refused(cache, 0, now, "back up the ladder")
    per_row = down.expand(2, -1).clone()
    per_row[1, 12] = INT4
    refused(cache, 0, per_row, "2 tokens were asked back up the ladder")


def test_an_evicted_token_cannot_be_asked_back_but_may_be_named(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama)
    wanted = cache.tiered[0].held.tier_map()[0, 0].clone()
    wanted[10] = EVICTED
    apply_tier_assignment(cache, 0, wanted)
    wanted[10] = INT4  # gone already: what a map says of it does not matter, as for padding
    apply_tier_assignment(cache, 0, wanted)
    assert bool((cache.tiered[0].held.tier_map()[..., 10] == EVICTED).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda now: now[0, 0, :-1], "tiers have shape"),
        (lambda now: now[:1], "tiers have shape"),
        (lambda now: now[:, :1], "tiers have shape"),
        (lambda now: now.where(now != INT4, 3), r"must be -1 .evicted., 0 .full precision. or 1..2 .int4, int2."),
        (lambda now: now.where(now != INT4, -2), "must be -1"),
        (lambda now: now[None], "or .B, H_kv, T. is needed"),
    ],
)
def test_maps_that_fit_no_layer_are_refused(llama: Any, change: Any, message: str, ladder_cache: Any) -> None:
    cache = ladder_cache(llama)
    refused(cache, 0, change(cache.tiered[0].held.tier_map()), message)


def test_heads_must_agree_on_what_leaves_the_window(llama: Any, ladder_cache: Any) -> None:
    cache = ladder_cache(llama)
    wanted = cache.tiered[0].held.tier_map().clone()
    wanted[0, 0, -1] = INT4
    wanted[:, :, 20] = INT2
    refused(cache, 0, wanted, "heads of a row disagree")


def test_tokens_that_share_scales_move_together(llama: Any, make: Any) -> None:
    config = LADDER | {"keys": {"kind": "uniform", "bits": 4, "axis": "channel"}}
    cache = make(llama, config)
    forward_with_tracking(llama, torch.randint(1, 256, (2, 100)), cache)
    wanted = cache.tiered[0].held.tier_map().clone()
    wanted[..., -1] = INT2
    apart = wanted.clone()
    apart[1, 1, 20] = INT2
    refused(cache, 0, apart, r"tier 'int4' shares scales.*positions 18 to 33.*axis = 'token'")
    wanted[:, :, 18:34] = INT2  # a whole tile
    wanted[0, :, 34:50] = EVICTED
    apply_tier_assignment_per_sequence(cache, 0, wanted)
    assert torch.equal(cache.tiered[0].held.tier_map(), wanted)


def test_layers_that_cannot_be_assigned_are_named(make: Any) -> None:
    model = tiny_gemma3()
    cache = make(model, LADDER)
    with pytest.raises(InputError, match="empty"):
        apply_tier_assignment(cache, 1, torch.zeros(5, dtype=torch.long))
    greedy(model, feed(model, torch.randint(1, 256, (1, 40)), cache), cache, 1)
    for layer in (0, 9, -1):
        with pytest.raises(InputError, match=rf"layer {layer} is not tiered; tiered layers: \[1, 3\]"):
            apply_tier_assignment(cache, layer, torch.zeros(41, dtype=torch.long))
    with pytest.raises(InputError, match=r"\[T\] is needed"):
        apply_tier_assignment(cache, 1, torch.zeros(1, 41, dtype=torch.long))
