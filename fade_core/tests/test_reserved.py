"""Buffers with ``max_cache_len``: reserved once, never moved, reported as they are; steps that do not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.cache.layer_steps import bucket
from fade_core.errors import InputError
from fade_core.ops.buffers import ODD_MASK
from fade_core.ops.reference import decode_attention
from fade_core.ops.step import segments_of
from fade_core.support.memory import live_bytes

TILE, SINK, RECENT = 16, 3, 8
CONFIG = FadeConfig(n_sink=SINK, recent_window=RECENT, tile=TILE, keys={"kind": "uniform", "axis": "channel"})


def prompt(seed: int, length: int, rows: int = 2) -> Tensor:
    return torch.randint(1, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fed(model: Any, length: int, steps: int, rows: int = 2, **options: Any) -> TieredKVCache:
    cache = create_tiered_cache(model, CONFIG, **options)
    model(prompt(1, length, rows), past_key_values=cache, use_cache=True)
    for step in range(steps):
        model(prompt(2 + step, 1, rows), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def go_on(model: Any, cache: TieredKVCache, steps: int = 20, rows: int = 2) -> Tensor:
    logits = [model(prompt(90 + s, 1, rows), past_key_values=cache, use_cache=True).logits for s in range(steps)]
    return torch.cat(logits, 1)


def test_buckets_are_few_and_waste_at_most_a_fifth() -> None:
    sizes = {bucket(n): n for n in range(1, 40_000)}
    assert len(sizes) < 34
    assert all(size == largest for size, largest in list(sizes.items())[:-1])
    assert all(bucket(n) < 1.25 * n for n in range(257, 40_000))


def test_bytes_stay_as_they_are_and_are_all_reported() -> None:
    model = tiny_llama()
    with fed(model, 40, 0, max_cache_len=200) as cache:
        total = cache.memory_report().total
        for _ in range(4):
            go_on(model, cache, 13)
            assert cache.memory_report().total == total == live_bytes(cache)
        cache.reset()
        assert total - 100 < cache.memory_report().total == live_bytes(cache) <= total  # all but the rows' padding
        model(prompt(1, 30, 3), past_key_values=cache, use_cache=True)  # another batch size: other buffers
        assert cache.memory_report().total == live_bytes(cache) > total


def test_trusted_masks_that_hide_stored_tokens_are_told_of_afterwards() -> None:
    """Off a CPU a compiled step's mask is not read back: it is taken for the prompt's, and counted where it was another."""
    model = tiny_llama()
    with fed(model, 40, 0, max_cache_len=100) as cache:
        layer = cache.tiered[0]
        layer.steps.assume_padding_mask, query = True, torch.zeros(2, 4, 1, 16)
        mask = torch.ones(2, 1, 1, layer.steps.slots, dtype=torch.bool)
        layer.maintain(1)
        layer.steps.attend_compiled(query, mask, 1.0, None, None)
        assert layer.steps.counters.tolist() == [40, 0, 0]
        mask[1, ..., 20] = False
        layer.steps.attend_compiled(query, mask, 1.0, None, None)
        assert int(layer.steps.counters[ODD_MASK]) == 1
        layer.steps.behind = True  # as after a compiled step
        with pytest.raises(InputError, match="1 steps came with a mask that hides stored tokens"):
            cache.memory_report()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("policy", ["position", "h2o"])
def test_segments_without_looking_are_segments_with_it(holes: bool, policy: str) -> None:
    """A GPU reads buffers whole, with lengths and tables on the device; a CPU no more of them than is in use."""
    torch.manual_seed(fresh_seed())
    model, evicting = tiny_llama(), {"kind": policy, "budget": 0.6, "every": 6}
    config = CONFIG.with_overrides(keys={"kind": "uniform", "axis": "token"}, policy=evicting)
    for length, steps in ((5, 3), (90, 20)):
        cache = create_tiered_cache(model, config, max_cache_len=200)
        with cache, torch.no_grad():
            model(prompt(1, length), past_key_values=cache, use_cache=True)
            go_on(model, cache, steps)
            layer, query = cache.tiered[0], torch.randn(2, 4, 1, 16)
            mask = torch.rand(2, 1, 1, layer.logical) < 0.7 if holes else None
            found = []
            for on_host in (True, False):
                segments, _ = segments_of(layer.steps.step_plan, layer.steps.wire(layer.held), mask, on_host)
                found.append(decode_attention(query, segments, 0.3))
            torch.testing.assert_close(found[0].output, found[1].output, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[0].lse, found[1].lse, rtol=1e-5, atol=1e-5)


def test_warming_up_leaves_nothing_behind() -> None:
    model, found = tiny_llama(), []
    for warmed in (False, True):
        with create_tiered_cache(model, CONFIG, max_cache_len=100) as cache:
            if warmed:
                for layer in cache.tiered:
                    like = torch.zeros(2, 2, 1, 16)
                    layer.lazy_initialization(like, like)
                    layer.steps.warm_up(layer.held)
                    assert layer.steps.counters.tolist() == [0, 0, 0]
                    assert not layer.held.window.lengths.any()
                    assert layer.logical == 0
            model(prompt(1, 40), past_key_values=cache, use_cache=True)
            found.append(go_on(model, cache))
    assert torch.equal(*found)
