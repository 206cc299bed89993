"""A quantizer that spreads the codes of a tile over all heads: whatever becomes of single heads, it can be read."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from transformers import DynamicCache

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformConfig, UniformQuantizer
from fade_core.cache.manual import assign_layer
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig, Quantizer, QuantizerConfig, QuantizerContext
from fade_core.packed import Packed
from fade_core.testing import check_quantizer


class Rolled(UniformQuantizer):
    """Uniform codes; each head keeps those of the next one, and their scales and minima are its own."""

    kind: ClassVar[str] = "rolled"
    heads_together: ClassVar[bool] = True

    def _rolled(self, packed: Packed, by: int) -> Packed:
        codes = {n: t if n == "meta" else t.roll(by, dims=1) for n, t in packed.fields.items()}
        return Packed(codes, packed.length, packed.dtype)

    def encode(self, x: Tensor) -> Packed:
        return self._rolled(super().encode(x), 1)

    def decode(self, packed: Packed) -> Tensor:
        return super().decode(self._rolled(packed, -1))

    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        return super().scores(query, self._rolled(packed, -1))

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        return super().combine(weights, self._rolled(packed, -1))

    def select(self, packed: Packed, index: Tensor) -> Packed:
        return self._rolled(super().select(self._rolled(packed, -1), index), 1)


class RolledConfig(QuantizerConfig):
    kind: Literal["rolled"] = "rolled"
    bits: int = 8

    def build(self, context: QuantizerContext) -> Quantizer:
        found = Rolled(context.head_dim, self.bits, layout="token" if context.side == "key" else "channel")
        found.format = None  # no kernel knows that the words are rolled
        return found


PROMPT, LAYERS, HEADS = 330, 2, 2
SIDES: dict[str, Any] = {
    "both": {"keys": RolledConfig(), "values": RolledConfig()},
    "one moves whole tiles": {"keys": UniformConfig(bits=8, axis="channel"), "values": RolledConfig()},
}


@pytest.fixture(params=list(SIDES))
def filled(request: Any) -> Any:
    """A cache that holds a prompt, the exact keys and values, and a generator."""
    generator = torch.Generator().manual_seed(fresh_seed())
    model, ids = tiny_llama(layers=LAYERS), torch.randint(1, 255, (2, PROMPT), generator=generator)
    exact = DynamicCache(config=model.config)
    config = FadeConfig(
        n_sink=4,
        recent_window=32,
        ladder=[{"tier": "packed", "capacity": 192}, {"tier": "int4"}],
        **SIDES[request.param],
    )
    with create_tiered_cache(model, config) as cache, torch.no_grad():
        for each in (exact, cache):
            model(ids, past_key_values=each)
        yield cache, exact, generator


def check(cache: TieredKVCache, exact: DynamicCache) -> int:
    """Every stored token is the one its position says; says how many there are."""
    found = 0
    for layer, held in zip(cache.tiered, exact.layers, strict=True):
        for store in layer.held.stores:
            if not store.tiles:
                continue
            live = store.live_positions() >= 0
            found += int(live.sum())
            index = store.live_positions().clamp_min(0)[..., None].expand(-1, -1, -1, held.keys.shape[-1])
            for mine, wanted in zip((store.decode(0), store.decode(1)), (held.keys, held.values), strict=True):
                true = wanted.gather(2, index)[live]
                assert float((mine[live] - true).norm() / true.norm()) < 0.15
    return found


def test_conformance() -> None:
    results = check_quantizer(RolledConfig(), seed=fresh_seed())
    assert all(result.passed for result in results), [r for r in results if not r.passed]


def test_heads_may_lose_different_tiles_and_tokens(filled: Any) -> None:
    cache, exact, generator = filled
    tiles_only = not all(t.keys.moves_tokens for t in cache.tiered[0].plan.ladder.tiers)
    before = check(cache, exact)
    for _ in range(3):
        gone = 0
        for layer in cache.tiered:
            tiers = layer.held.tier_map()
            for store in layer.held.stores:
                where = store.live_positions().unflatten(-1, (-1, store.tile))
                drop = torch.rand(where.shape, generator=generator) < 0.3
                whole = torch.rand(where.shape[:3], generator=generator) < 0.25
                drop = whole[..., None].expand_as(drop).clone() if tiles_only else drop | whole[..., None]
                drop[1, 0] = False  # this head of this row keeps everything
                drop &= where >= 0
                row, head = drop.nonzero(as_tuple=True)[:2]
                tiers[row, head, where[drop]] = -1
                gone += int(drop.sum())
            assign_layer(layer, tiers)
        assert check(cache, exact) == before - gone
        before -= gone


def test_crop_saving_and_rows(filled: Any, tmp_path: Any) -> None:
    cache, exact, _ = filled
    tiers = cache.tiered[0].held.tier_map()
    tiers[0, 0, 4:68] = -1
    tiers[0, 1, 68:132] = -1
    assign_layer(cache.tiered[0], tiers)
    held = check(cache, exact)
    state = cache.cache_state_dict()
    cache.batch_select_indices(torch.tensor([1, 0, 0]))
    exact.batch_select_indices(torch.tensor([1, 0, 0]))
    check(cache, exact)
    cache.load_cache_state_dict(state)
    exact.batch_select_indices(torch.tensor([1, 0]))
    assert check(cache, exact) == held
    cache.crop(-150)
    assert 0 < check(cache, exact) < held


class Uneven(EvictionPolicy):
    """Scores at random, and gives the last head of a row three times the first one's budget."""

    kind: ClassVar[str] = "uneven"

    def score(self, view: LayerView) -> Tensor:
        return torch.rand(view.positions.shape)

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        share = torch.tensor([0.5, 1.5]) * budget[:, None]
        return share.long()


class UnevenConfig(PolicyConfig):
    kind: Literal["uneven"] = "uneven"

    def build(self) -> EvictionPolicy:
        return Uneven()


def test_heads_may_have_budgets_of_their_own() -> None:
    torch.manual_seed(fresh_seed())
    model, ids = tiny_llama(layers=LAYERS), torch.randint(1, 255, (2, 446))
    exact = DynamicCache(config=model.config)
    config = FadeConfig(
        n_sink=4,
        recent_window=32,
        policy=UnevenConfig(budget=0.5, every=16),
        keys=RolledConfig(),
        values=RolledConfig(),
    )
    with create_tiered_cache(model, config) as cache, torch.no_grad():
        for each in (exact, cache):
            model(ids[:, :412], past_key_values=each)
            for at in range(412, 446):  # the eighth step fills a tile, and tokens are ranked twice
                model(ids[:, at : at + 1], past_key_values=each)
        # what follows an eviction is computed from fewer tokens: only the first layer's keys and values are the same
        exact.layers, tiered = exact.layers[:1], cache.layers
        cache.layers = tiered[:1]
        assert check(cache, exact)
        cache.layers = tiered
        first, last = cache.tiered[0].held.stores[0].lengths[0].tolist()
        assert first < last
