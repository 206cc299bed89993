"""A tiered layer under any sequence of operations: each live token once, in its place, and every byte accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from reference import stored
from torch import Tensor
from transformers.cache_utils import Cache

from fade_core import FadeConfig, Tier
from fade_core.interfaces import QuantizerContext
from fade_core.ladder import Ladder
from fade_core.layer import LayerPlan, TieredLayer
from fade_core.memory import live_bytes
from fade_core.report import measure
from fade_core.tracker import AttentionTracker

HEADS, DIM, SINKS, WINDOW, TILE = 2, 16, 3, 16, 16
SHORT = {"n_sink": SINKS, "recent_window": WINDOW, "tile": TILE}
CONFIGS = {
    "exact": FadeConfig(**SHORT, ladder=[{"tier": "fp16"}]),
    "shared scales": FadeConfig(**SHORT, keys={"kind": "uniform", "axis": "channel"}),
    "by age": FadeConfig(
        **SHORT,
        ladder=[{"tier": "int4", "capacity": 32}, {"tier": "int2", "capacity": 48}],
        policy={"kind": "position", "every": 6},
    ),
    "tokens by attention": FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": "token"},
        ladder=[{"tier": "fp16", "capacity": 32}, {"tier": "int4", "capacity": 0.4}, {"tier": "int2"}],
        policy={"kind": "h2o", "budget": 0.8, "every": 6},
    ),
    "tiles by attention": FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": "channel"},
        ladder=[{"tier": "fp16", "capacity": 0.2}, {"tier": "int4"}],
        policy={"kind": "ema", "budget": 0.5, "every": 6},
    ),
}
for _axis in ("token", "channel"):
    CONFIGS[f"heads apart, {_axis}"] = FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": _axis},
        ladder=[{"tier": "int4", "capacity": 0.3}, {"tier": "int2"}],
        policy={"kind": "adakv", "budget": 0.6, "every": 6, "floor": 0.1, "base": {"kind": "h2o"}},
    )
ERRORS = {"fp16": 0.0, "int4": 0.25, "int2": 1.0}
"""Error of a token relative to the mean norm; two unrelated tokens are some 1.4 apart."""


def layer_of(config: FadeConfig) -> TieredLayer:
    tiers = tuple(
        Tier(
            rung.name,
            rung.capacity,
            rung.keys.build(QuantizerContext(DIM, "key", TILE)),
            rung.values.build(QuantizerContext(DIM, "value", TILE)),
        )
        for rung in config.resolved_ladder()
    )
    policy = config.policy.build()
    ladder = Ladder(tiers, SINKS, WINDOW, config.policy.budget, TILE)
    plan = LayerPlan(0, 1, ladder, policy, config.policy.every, AttentionTracker(policy.statistics, 0.9))
    return TieredLayer(plan)


@dataclass
class Twin:
    """A layer and what it was given.

    Attributes:
        keys: all keys ever given and not cropped, ``[B, H_kv, logical, D]``.
        values: likewise.
        padding: leading columns of each row that are padding, int64 ``[B]``.
        frontier: the first position that was always among the newest ``WINDOW`` when the layer settled.
        tier: where each token was at the last look.
    """

    layer: TieredLayer
    keys: Tensor
    values: Tensor
    padding: Tensor
    frontier: int = 0
    tier: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def logical(self) -> int:
        return self.keys.shape[2]

    def feed(self, count: int, attended: bool) -> None:
        """``count`` new tokens; without ``attended`` the forward pass stops before attention."""
        keys, values = torch.randn(2, self.rows, HEADS, count, DIM)
        self.layer.update(keys, values)
        begun = self.logical
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        if not attended and bool((self.padding <= begun).all()):
            return
        if self.layer.pending is not None:
            names = self.layer.plan.tracker.statistics
            self.layer.settle(
                (self.padding - begun).clamp(0, count), {n: torch.rand(self.rows, HEADS, count) for n in names}
            )
        else:
            for held in self.layer.statistics():
                for statistic in held.values():
                    statistic += torch.rand_like(statistic)
            self.layer.settle()

    def hold(self, holding: bool) -> None:
        """Keep everything in full precision from here on, or send it where it belongs."""
        if holding:
            self.layer.holding = True
        elif self.layer.holding:
            self.layer.release()

    def read(self, count: int) -> None:
        """A forward pass that leaves nothing."""
        self.layer.settle()
        self.layer.reading = True
        self.layer.update(*torch.randn(2, self.rows, HEADS, count, DIM))
        self.layer.settle()
        self.layer.reading = False

    def crop(self, count: int) -> None:
        self.layer.crop(-count)
        self.keys, self.values = (t[:, :, : self.logical - count] for t in (self.keys, self.values))
        self.padding = self.padding.clamp_max(self.logical)
        self.tier = None if self.tier is None else self.tier[..., : self.logical]

    def pick(self, index: Tensor) -> None:
        self.keys, self.values, self.padding = self.keys[index], self.values[index], self.padding[index]
        self.tier = None

    def check(self) -> None:
        layer = self.layer
        if not self.logical:
            assert layer.get_seq_length() == 0
            assert live_bytes(layer) == 0
            return
        layer.settle()
        layer.commit()
        self.frontier = min(max(self.frontier, self.logical - WINDOW), self.logical)
        found = stored(layer)
        assert layer.get_seq_length() == layer.logical == self.logical
        assert layer.lengths.tolist() == (self.logical - self.padding).clamp_min(0).tolist()
        self._check_places(found.tier)
        self._check_contents(found.keys, found.values, found.tier)
        report = measure(Cache(layers=[layer]))
        assert report.total == live_bytes(layer) == layer.nbytes()

    def _check_places(self, tier: Tensor) -> None:
        layer = self.layer
        columns = torch.arange(self.logical)
        real = (columns >= self.padding[:, None])[:, None].expand_as(tier)
        assert bool((tier[~real] == -1).all()), "padding is stored"
        first = (columns < self.padding[:, None] + SINKS)[:, None].expand_as(tier)
        newest = (columns >= self.frontier).expand_as(tier)
        assert bool((tier[real & (first | newest)] == 0).all()), "a sink or a recent token left full precision"
        if not layer.plan.ladder.bounded:
            assert bool((tier[real] >= 0).all()), "a token is lost"
        counts = layer.window.lengths[:, None] + sum(store.lengths for store in layer.stores)
        assert torch.equal(counts, (tier >= 0).sum(-1))
        assert torch.equal(layer.tier_map(), tier)
        if self.tier is not None:
            before, after = (t.where(t >= 0, 99) for t in (self.tier, tier[..., : self.tier.shape[-1]]))
            assert bool((after >= before[..., : after.shape[-1]]).all()), "a token moved up"
        self.tier = tier

    def _check_contents(self, keys: Tensor, values: Tensor, tier: Tensor) -> None:
        bounds = [0.0, *(ERRORS[store.tier.name] for store in self.layer.stores)]
        for held, exact in ((keys, self.keys), (values, self.values)):
            error = (held - exact).norm(dim=-1) / DIM**0.5
            for level, bound in enumerate(bounds):
                assert bool((error[tier == level] <= bound).all()), "a token is not what was given at its position"
        if not self.layer.plan.ladder.bounded:
            for side, held in (("key", keys), ("value", values)):
                assert torch.equal(self.layer.dense(side), held)


def share() -> st.SearchStrategy[float]:
    return st.floats(0, 1)


OPERATIONS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 32), st.booleans()),
    st.tuples(st.just("feed"), st.integers(33, 120), st.booleans()),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("crop share"), share()),
    st.tuples(st.just("pick"), st.lists(share(), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("rank")),
    st.tuples(st.just("record"), st.booleans()),
    st.tuples(st.just("hold"), st.booleans()),
    st.tuples(st.just("read"), st.integers(1, 60)),
)


def apply(twin: Twin, operation: tuple) -> None:  # type: ignore[type-arg]
    name, *arguments = operation
    if name == "feed":
        twin.feed(*arguments)
    elif name == "crop":
        twin.crop(min(arguments[0], twin.logical))
    elif name == "crop share":
        twin.crop(int(arguments[0] * twin.logical))
    elif name == "pick":
        index = torch.tensor([min(int(x * twin.rows), twin.rows - 1) for x in arguments[0]])
        twin.layer.reorder_cache(index)
        twin.pick(index)
    elif name == "repeat" and twin.rows <= 4:
        twin.layer.batch_repeat_interleave(arguments[0])
        twin.pick(torch.arange(twin.rows).repeat_interleave(arguments[0]))
    elif name == "rank" and twin.logical:
        twin.layer.settle()
        twin.layer.rank()
    elif name == "record":
        twin.layer.record_past = arguments[0]
    elif name == "hold":
        twin.hold(arguments[0])
    elif name == "read" and twin.logical:
        twin.read(arguments[0])


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    first=st.integers(1, 150),
    padding=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    operations=st.lists(OPERATIONS, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_every_live_token_is_held_once_in_its_place(
    config: str,
    first: int,
    padding: list[int],
    operations: list[tuple],
    seed: int,  # type: ignore[type-arg]
) -> None:
    torch.manual_seed(seed)
    empty = torch.zeros(len(padding), HEADS, 0, DIM)
    twin = Twin(layer_of(CONFIGS[config]), empty, empty, torch.tensor(padding))
    for operation in [("feed", first, True), *operations]:
        apply(twin, operation)
        twin.check()
