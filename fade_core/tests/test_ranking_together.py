"""Layers that are ranked together keep what each would keep alone, for a handful of operations and two reads in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_host_reads import AWAY, Away, Device
from tiny import VOCABULARY, fresh_seed, tiny_llama
from torch import Tensor

import fade_core.cache.ranking_rounds as rounds
from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.cache.layer_state import store_state
from fade_core.eviction.contents import LayerContents

SHORT = {"n_sink": 3, "recent_window": 16, "tile": 16}
SHARED = {"keys": {"kind": "uniform", "bits": 4, "axis": "channel"}}
H2O = {"kind": "h2o", "every": 8}
RUNGS = [{"tier": "int4", "capacity": 0.3}, {"tier": "int2", "capacity": 0.3}]
CONFIGS: dict[str, dict[str, Any]] = {
    "one tier": {**SHARED, "policy": {**H2O, "budget": 0.5}},
    "two tiers": {**SHARED, "ladder": RUNGS, "policy": H2O},
    "three tiers": {
        "keys": {"kind": "uniform", "bits": 3, "axis": "channel"},
        "values": {"kind": "uniform", "bits": 3},
        "ladder": [{"tier": "int4", "capacity": 32}, {"tier": "packed", "capacity": 32}, {"tier": "int2"}],
        "policy": {**H2O, "budget": 0.7},
    },
    "by age": {"ladder": RUNGS, "policy": {"kind": "position", "budget": 110, "every": 8}},
}
CONTIGUOUS = {**SHARED, "reposition": "contiguous", "policy": {**H2O, "budget": 0.5}}
"""Needs fade-rope."""


@pytest.mark.parametrize("limit", [None, 256])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_keep_together_what_each_keeps_alone(
    name: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alike(CONFIGS[name], limit, monkeypatch)


@torch.no_grad()
def keep_alike(config: dict[str, Any], limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths; the tokens that are stored, their codes and statistics are equal bit for bit."""
    model, generator = tiny_llama(layers=2), torch.Generator().manual_seed(fresh_seed())
    ids = torch.randint(VOCABULARY, (2, 170), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    sizes, found = list[int](), list[list[dict[str, Tensor]]]()
    ranked = rounds.rank_together

    def counted(layers: Sequence[LayerContents], rows: Tensor) -> tuple[int, int, bool, bool]:
        sizes.append(len(layers))
        return ranked(layers, rows)

    for together in (True, False):
        monkeypatch.setattr(rounds, "rank_together", counted)
        if not together:
            monkeypatch.setattr(rounds, "kinship", lambda held: None)
        with create_tiered_cache(model, FadeConfig(**SHORT, **config), limit) as cache:
            start = 0
            for count in (120, *[1] * 40):
                part = slice(start, start + count)
                model(ids[:, part], past_key_values=cache, attention_mask=mask[:, : part.stop], use_cache=True)
                start = part.stop
            cache.settle()
            found.append([store_state(store) for layer in cache.tiered for store in layer.held.stores])
    assert sizes
    assert set(sizes) == {2}, "layers were not ranked together"
    for mine, other in zip(*found, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(held, other[key]) for key, held in mine.items())


class Counted(Device):
    """A pretended device that counts the operations that run on it."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.is_mutable:
            written = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.ran += all(isinstance(held, Away) for held in written)
        else:
            self.ran += isinstance(found, Away) and not func.is_view
        return found


def rankings(name: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Operations on the device, and reads from it, of each ranking that moved tokens."""
    generator, device = torch.Generator().manual_seed(0), Counted()
    config = FadeConfig(**SHORT, **CONFIGS[name])
    cache: TieredKVCache = create_tiered_cache(tiny_llama(layers=layers), config, 256)
    found, moved, ranked = list[tuple[int, int]](), list[int](), rounds.rank_together

    def noted(held: Sequence[LayerContents], rows: Tensor) -> tuple[int, int, bool, bool]:
        result = ranked(held, rows)
        moved.append(result[0] + result[1])
        return result

    monkeypatch.setattr(rounds, "rank_together", noted)
    with device, torch.no_grad():
        for count in (100, *[1] * 40):
            before, already = (device.ran, len(device.reads)), sum(moved)
            cache.get_mask_sizes(count)
            if sum(moved) > already:
                found.append((device.ran - before[0], len(device.reads) - before[1]))
            for index, layer in enumerate(cache.tiered):
                keys, values = torch.randn((2, 2, 2, count, 16), generator=generator)
                layer.plan.on_nonfinite = "zero"
                cache.update(Away.of(keys), Away.of(values), index)
                assert layer.device == AWAY
            for layer in cache.tiered:
                layer.finish_pending()
        for ids in (store.table.ids for layer in cache.tiered for store in layer.known.stores):
            assert isinstance(ids.device, Away)
            assert torch.equal(ids.host, ids.device.here), "the host was not told where tiles are now"
    return found


def test_what_a_ranking_costs_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (rankings("one tier", layers, monkeypatch) for layers in (1, 3))
    assert few
    assert few == many
    assert all(operations <= 80 and reads == 1 for operations, reads in many)


def test_demotion_reads_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rankings("two tiers", 2, monkeypatch)
    assert found
    assert all(reads == 1 for _, reads in found)
