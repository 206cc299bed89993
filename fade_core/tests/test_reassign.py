"""Reassigning does not wear tokens out: after 32 times the keys of those that stayed in their tier are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from transformers import DynamicCache

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache, reassign_tiers

PROMPT, ROUNDS, STEPS = 330, 32, 3
SHORT = {"n_sink": 4, "recent_window": 16, "tile": 16, "policy": {"kind": "h2o", "every": 10_000}}
CONFIGS: dict[str, dict[str, Any]] = {
    "one tier": {"keys": {"kind": "uniform", "bits": 4, "axis": "token"}, "ladder": [{"tier": "int4"}]},
    "tokens move": {
        "keys": {"kind": "uniform", "axis": "token"},
        "ladder": [{"tier": "int4", "capacity": 0.4}, {"tier": "int2"}],
    },
    "tiles move": {
        "keys": {"kind": "uniform", "axis": "channel"},
        "ladder": [{"tier": "int4", "capacity": 0.4}, {"tier": "int2"}],
    },
}


def packed_keys(cache: TieredKVCache) -> tuple[Tensor, Tensor]:
    """Decoded keys of the prompt, ``[layers, B, H_kv, PROMPT, D]``, and their tiers; zeros and 0 where not packed."""
    keys, tiers = [], []
    for layer in cache.tiered:
        tier = layer.held.tier_map()[..., :PROMPT].clamp_min(0)
        held = torch.zeros(*layer.held.tier_map().shape, layer.held.window.keys.shape[3])
        for store in layer.held.stores:
            if store.tiles:
                where = store.live_positions()
                row, head, slot = (where >= 0).nonzero(as_tuple=True)
                held[row, head, where[row, head, slot]] = store.decode(0)[row, head, slot]
        keys.append(held[..., :PROMPT, :])
        tiers.append(tier)
    return torch.stack(keys), torch.stack(tiers)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_are_as_good_after_32_reassignments_as_after_one(name: str) -> None:
    seed = fresh_seed()
    model, generator = tiny_llama(seed), torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 255, (2, PROMPT), generator=generator)
    exact = DynamicCache(config=model.config)
    with create_tiered_cache(model, FadeConfig(**SHORT, **CONFIGS[name])) as cache, torch.no_grad():
        for each in (exact, cache):
            model(ids, past_key_values=each)
        true = torch.stack([layer.keys for layer in exact.layers])
        found: list[tuple[Tensor, Tensor]] = []
        for _ in range(ROUNDS):
            for _ in range(STEPS):
                model(torch.randint(1, 255, (2, 1), generator=generator), past_key_values=cache)
            for layer in cache.tiered:  # as if attention had gone elsewhere
                for statistics in layer.held.statistics():
                    for held in statistics.values():
                        held.mul_(torch.rand(held.shape, generator=generator))
            reassign_tiers(cache, cache.tracker)
            found.append(packed_keys(cache))
    (first, before), (last, after) = found[0], found[-1]
    for level in range(1, int(after.max()) + 1):
        stayed = (before == level) & (after == level)
        assert int(stayed.sum()) > 100
        assert torch.equal(first[stayed], last[stayed]), "codes of tokens that stayed have changed"
        errors = [float((held - true)[stayed].norm() / true[stayed].norm()) for held in (first, last)]
        print(f"{name}, tier {level}: error of keys {errors[0]:.4f} after 1, {errors[1]:.4f} after {ROUNDS}")
        assert errors[0] == errors[1] > 0
    moved = ((before > 0) & (after > before)).any()
    assert bool(moved) == (name != "one tier"), "reassigning moved nothing"
