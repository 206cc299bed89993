"""Any sequence of a cache's public operations, on a cache that grows and on one with ``max_cache_len`` side by side.

After each: equal logits bit for bit, equal tiers, no tile lost, none written that another row reads, report equal to live
bytes. ``FADE_OPERATIONS=10000`` runs that many operations of the profile with ragged heads and a byte budget, and of the
other; without it some hundred.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import Stored, check_tiles, stored
from tinymodels import prompt, tiny
from torch import Tensor
from transformers import PreTrainedModel

from fade_core import (
    FadeConfig,
    TieredKVCache,
    apply_tier_assignment_per_sequence,
    create_tiered_cache,
    forward_with_tracking,
    reassign_tiers,
)
from fade_core.errors import InputError, NonFiniteError
from fade_core.support.memory import live_bytes

LENGTH, ROWS, LAYERS = 600, 4, 3
SHORT = {"n_sink": 3, "recent_window": 16, "tile": 16, "kernel": {"kind": "torch"}}
TOKENS = {"kind": "uniform", "axis": "token"}
TWO_TIERS = [{"tier": "int4", "capacity": 0.4}, {"tier": "int2"}]
CONFIGS = {
    "keeps all": FadeConfig(**SHORT, keys={"kind": "uniform", "axis": "channel"}),
    "one tier": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "h2o", "budget": 0.6, "every": 6}),
    "by age": FadeConfig(**SHORT, ladder=TWO_TIERS, policy={"kind": "position", "budget": 90, "every": 7}),
    "three tiers": FadeConfig(
        **SHORT,
        keys=TOKENS,
        ladder=[{"tier": "fp16", "capacity": 32}, *TWO_TIERS],
        policy={"kind": "h2o", "budget": 0.8, "every": 6},
    ),
    "contiguous": FadeConfig(
        **SHORT, keys=TOKENS, reposition="contiguous", policy={"kind": "h2o", "budget": 0.6, "every": 6}
    ),
}
RAGGED = {
    "ragged heads in bytes": FadeConfig(
        **SHORT,
        keys=TOKENS,
        ladder=TWO_TIERS,
        policy={"kind": "adakv", "budget": "270 KiB", "every": 6, "floor": 0.1, "base": {"kind": "h2o"}},
    )
}
OPERATIONS = int(os.environ.get("FADE_OPERATIONS", "0"))
STEPS = 50 if OPERATIONS else 20


@functools.cache
def model() -> PreTrainedModel:
    return tiny("llama", 0, num_hidden_layers=LAYERS)


@torch.no_grad()
def passed(cache: TieredKVCache, ids: Tensor) -> Tensor:
    """Logits ``[B, Q, V]`` of a pass over ``ids``; each row's positions count its own tokens."""
    length, rows = cache.get_seq_length(), len(ids)
    padding = cache.leading_padding[:, None] if length else torch.zeros(rows, 1, dtype=torch.long)
    columns = torch.arange(length + ids.shape[1])
    logits: Tensor = model()(
        input_ids=ids,
        attention_mask=(columns >= padding).long(),
        position_ids=columns[length:] - padding,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits


def nothing_was_written_again(before: list[Stored], cache: TieredKVCache) -> None:
    """A token that stays packed in its tier keeps its codes, whatever other rows do."""
    for was, layer in zip(before, cache.tiered, strict=True):
        now, length = stored(layer), was.tier.shape[-1]
        same = (was.tier == now.tier[..., :length]) & (was.tier > 0)
        for old, new in ((was.keys, now.keys), (was.values, now.values)):
            assert torch.equal(old[same], new[..., :length, :][same]), "a packed token was written again"


class Operations(RuleBasedStateMachine):
    """Caches of one configuration that differ in ``max_cache_len`` alone."""

    configs: ClassVar[dict[str, FadeConfig]] = CONFIGS
    lengths: ClassVar[tuple[int | None, ...]] = (None, LENGTH)
    count: ClassVar[int] = 0

    @initialize(name=st.data(), rows=st.integers(1, 3), tokens=st.integers(1, 120))
    def begin(self, name: Any, rows: int, tokens: int) -> None:
        self.config = self.configs[name.draw(st.sampled_from(sorted(self.configs)))]
        self.numbers = itertools.count()
        self.caches = [self.made(length) for length in self.lengths]
        self.feed(rows, tokens)

    def made(self, length: int | None) -> TieredKVCache:
        return create_tiered_cache(model(), self.config, length)

    def ids(self, rows: int, tokens: int) -> Tensor:
        return prompt(next(self.numbers), tokens, rows)

    def each(self, do: Callable[[TieredKVCache], Any]) -> list[Any]:
        """The same on each cache; what comes back has to be the same."""
        type(self).count += 1
        found = [do(cache) for cache in self.caches]
        for other in found[1:]:
            if isinstance(other, Tensor):
                assert torch.equal(other, found[0])
            else:
                assert other == found[0]
        return found

    def feed(self, rows: int, tokens: int) -> None:
        ids = self.ids(rows, tokens)
        self.each(lambda cache: passed(cache, ids))

    @property
    def rows(self) -> int:
        return self.caches[0].batch_size

    @property
    def length(self) -> int:
        return int(self.caches[0].get_seq_length())

    def room(self, tokens: int) -> bool:
        return self.length + tokens <= LENGTH

    # --- passes ---
    @rule(tokens=st.integers(1, 32))
    def step(self, tokens: int) -> None:
        if self.room(tokens):
            before = [[stored(layer) for layer in cache.tiered] for cache in self.caches] if self.length else None
            self.feed(max(self.rows, 1), tokens)
            for was, cache in zip(before or [], self.caches, strict=False):
                cache.settle()
                nothing_was_written_again(was, cache)

    @rule(steps=st.integers(1, 40))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            if self.room(1):
                self.feed(max(self.rows, 1), 1)

    @rule(tokens=st.integers(33, 120))
    def chunk(self, tokens: int) -> None:
        if self.room(tokens):
            self.feed(max(self.rows, 1), tokens)

    @rule(tokens=st.integers(1, 60))
    def tracked(self, tokens: int) -> None:
        if self.room(tokens) and not self.padded():
            ids = self.ids(max(self.rows, 1), tokens)
            self.each(lambda cache: forward_with_tracking(model(), ids, cache, cache.tracker).logits)

    def padded(self) -> bool:
        return bool(self.length) and bool(self.caches[0].leading_padding.any())

    @rule(tokens=st.integers(1, 60))
    def refused(self, tokens: int) -> None:
        """NaN in a layer in the middle: as if the pass had never been."""
        if not self.room(tokens):
            return
        ids, weight = self.ids(max(self.rows, 1), tokens), model().model.layers[1].self_attn.k_proj.weight

        def fails(cache: TieredKVCache) -> None:
            before = {name: held.clone() for name, held in cache.cache_state_dict()["tensors"].items()}
            kept = weight.data.clone()
            weight.data[0, 0] = math.nan
            try:
                with pytest.raises(NonFiniteError, match="layer 1"):
                    passed(cache, ids)
            finally:
                weight.data.copy_(kept)
            after = cache.cache_state_dict()["tensors"]
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], held) for name, held in before.items())

        self.each(fails)

    @precondition(lambda self: self.length)
    @rule(extra=st.integers(1, 5))
    def too_long(self, extra: int) -> None:
        """More than ``max_cache_len`` is refused by the cache that has it, and nothing has changed."""
        ids = self.ids(self.rows, LENGTH - self.length + extra)
        for cache in self.caches:
            if cache.get_max_length() > 0:
                with pytest.raises(InputError, match="max_cache_len"):
                    passed(cache, ids)

    @precondition(lambda self: self.length)
    @rule(tokens=st.integers(1, 50), often=st.integers(1, 2))
    def reading(self, tokens: int, often: int) -> None:
        if not self.room(tokens):
            return
        ids = self.ids(self.rows, tokens)

        def read(cache: TieredKVCache) -> Tensor:
            with cache.reading():
                return torch.cat([passed(cache, ids) for _ in range(often)])

        self.each(read)

    @rule(widths=st.lists(st.integers(1, 50), min_size=1, max_size=3))
    def holding(self, widths: list[int]) -> None:
        if not self.room(sum(widths)):
            return
        ids = self.ids(max(self.rows, 1), sum(widths))

        def held(cache: TieredKVCache) -> Tensor:
            with cache.holding():
                return torch.cat([passed(cache, part) for part in ids.split(widths, 1)], 1)

        self.each(held)

    @precondition(lambda self: self.length)
    @rule(turns=st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=3))
    def drafts(self, turns: list[tuple[int, float]]) -> None:
        """Assisted decoding: tokens are fed, and some of the newest are taken back; then a copy goes on without it."""
        for cache in self.caches:
            cache.activate_past_recording()
        for tokens, share in turns:
            if self.room(tokens):
                self.feed(self.rows, tokens)
                self.each(lambda cache, gone=int(share * tokens): cache.crop(-gone))
        self.load(swap=False)

    # --- lengths and rows ---
    @precondition(lambda self: self.length)
    @rule(tokens=st.integers(0, 20))
    def crop(self, tokens: int) -> None:
        self.each(lambda cache: cache.crop(-min(tokens, self.caches[-1].get_seq_length())))

    @precondition(lambda self: self.length)
    @rule(share=st.floats(0, 1))
    def crop_share(self, share: float) -> None:
        gone = int(share * self.length)
        self.each(lambda cache: cache.crop(-gone))

    @precondition(lambda self: self.length)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        if self.rows * repeats <= ROWS:
            self.each(lambda cache: cache.batch_repeat_interleave(repeats))

    @precondition(lambda self: self.length)
    @rule(shares=st.lists(st.floats(0, 0.999), min_size=ROWS, max_size=ROWS))
    def beams(self, shares: list[float]) -> None:
        index = torch.tensor([int(share * self.rows) for share in shares[: self.rows]])
        self.each(lambda cache: cache.reorder_cache(index))

    @precondition(lambda self: self.length)
    @rule(shares=st.lists(st.floats(0, 0.999), min_size=1, max_size=4))
    def select(self, shares: list[float]) -> None:
        index = torch.tensor([int(share * self.rows) for share in shares])
        self.each(lambda cache: cache.batch_select_indices(index))

    @precondition(lambda self: self.length)
    @rule(shares=st.lists(st.floats(0, 0.999), min_size=1, max_size=3), trim=st.booleans())
    def keep_rows(self, shares: list[float], trim: bool) -> None:
        index = list(dict.fromkeys(int(share * self.rows) for share in shares))
        self.each(lambda cache: cache.keep_rows(index, trim))

    @rule(rows=st.integers(1, 2), tokens=st.integers(1, 150))
    def add_rows(self, rows: int, tokens: int) -> None:
        if max(self.rows, 0) + rows > ROWS:
            return
        ids = self.ids(rows, tokens)

        def joined(cache: TieredKVCache) -> tuple[int, int]:
            with self.made(cache.length_limit) as other:
                passed(other, ids)
                found = cache.add_rows(other)
                assert other.get_seq_length() == 0
                return found

        self.each(joined)

    @rule()
    def reset(self) -> None:
        self.each(lambda cache: cache.reset())
        self.feed(2, 40)

    # --- tiers ---
    @precondition(lambda self: self.length)
    @rule(by_hand=st.booleans())
    def rank(self, by_hand: bool) -> None:
        self.each(lambda cache: reassign_tiers(cache) if by_hand else cache.rank())

    @precondition(lambda self: self.length)
    @rule(layer=st.integers(0, LAYERS - 1), share=st.floats(0, 1), seed=st.integers(0, 2**31))
    def assign(self, layer: int, share: float, seed: int) -> None:
        if self.config.resolved_ladder()[0].keys.axis != "token":  # type: ignore[attr-defined]
            return  # tokens that share scales move together, in tiles that a crop may have cut
        random = torch.Generator().manual_seed(seed)
        now = self.caches[0].tiered[layer].held.tier_map()
        lowest = len(self.config.resolved_ladder()) + 1
        target = torch.randint(0, lowest + 1, now.shape, generator=random)
        target = target.where(torch.rand(now.shape, generator=random) < share, 0)
        target = target[:, :1].expand_as(target).where(now == 0, target)  # heads agree on what leaves the window
        wanted = torch.maximum(target, now.where(now >= 0, lowest))
        wanted = wanted.where(wanted < lowest, -1)
        self.each(lambda cache: apply_tier_assignment_per_sequence(cache, layer, wanted))
        assert torch.equal(self.caches[0].tiered[layer].held.tier_map(), wanted)

    # --- copies ---
    @precondition(lambda self: self.length)
    @rule(swap=st.booleans())
    def load(self, swap: bool) -> None:
        """Each goes on from the state of another."""
        type(self).count += 1
        states = [cache.cache_state_dict() for cache in self.caches]
        for cache in self.caches:
            cache.detach()
        self.caches = [self.made(length) for length in self.lengths]
        for cache, state in zip(self.caches, reversed(states) if swap else states, strict=True):
            cache.load_cache_state_dict(state)

    @precondition(lambda self: self.length)
    @rule()
    def save(self) -> None:
        type(self).count += 1
        with tempfile.TemporaryDirectory() as folder:
            for number, cache in enumerate(self.caches):
                cache.save(Path(folder) / "cache.safetensors")
                cache.detach()
                self.caches[number] = TieredKVCache.load(Path(folder) / "cache.safetensors", model())
                assert self.caches[number].length_limit == self.lengths[number]

    @rule(tokens=st.integers(1, 40))
    def deepcopy(self, tokens: int) -> None:
        """A copy goes on; what happens to it does not happen to the cache that it was copied from."""
        if not self.room(tokens):
            return
        ids = self.ids(max(self.rows, 1), tokens)

        def copied(cache: TieredKVCache) -> Tensor:
            twin = copy.deepcopy(cache)
            before = cache.cache_state_dict()["tensors"]
            logits = passed(twin, ids)
            after = cache.cache_state_dict()["tensors"]
            assert all(torch.equal(after[name], held) for name, held in before.items())
            assert torch.equal(passed(cache, ids), logits)
            return logits

        self.each(copied)

    # --- what always holds ---
    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "caches"):
            return
        for cache in self.caches:
            cache.settle()
            for layer in cache.tiered:
                for store in layer.held.stores if layer.is_initialized else ():
                    check_tiles(store, reserved=cache.length_limit is not None)
            assert cache.memory_report().total == live_bytes(cache)
        self.each(lambda cache: cache.get_seq_length())
        if self.length:
            self.each(lambda cache: cache.leading_padding)
            for index in range(LAYERS):
                self.each(lambda cache, index=index: cache.tiered[index].held.tier_map())
        type(self).count -= 2 + LAYERS if self.length else 1  # looking is no operation

    def teardown(self) -> None:
        for cache in getattr(self, "caches", []):
            cache.detach()


class Growing(Operations):
    """A cache without ``max_cache_len`` alone."""

    lengths = (None,)


class Ragged(Operations):
    """Two tiers, heads with budgets of their own, a budget in bytes."""

    configs = RAGGED


class RaggedGrowing(Ragged):
    lengths = (None,)


@pytest.mark.slow
@pytest.mark.timeout(0 if OPERATIONS else 600)
@pytest.mark.parametrize("machine", [Growing, Operations, RaggedGrowing, Ragged], ids=lambda machine: machine.__name__)
def test_any_sequence_of_operations(machine: type[Operations]) -> None:
    wanted = machine.count + OPERATIONS
    examples = max(3, OPERATIONS // STEPS)
    run = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    run_state_machine_as_test(machine, settings=run)
    while machine.count < wanted:
        run_state_machine_as_test(machine, settings=run)
    print(f"{machine.count} operations")
