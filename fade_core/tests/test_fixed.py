"""A layer of fixed size: its buffers, the torch ops that steps go through, and what the growing layer's ways do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fade_core import FadeConfig, Tier, TieredKVCache, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.cache.fixed import FixedLayer
from fade_core.cache.fixedplan import bucket
from fade_core.errors import CheckpointError, InputError, NonFiniteError
from fade_core.ops.append import LOGICAL, NONFINITE, ODD_MASK, AppendRule, FixedBuffers, append
from fade_core.ops.attention import decode_attention
from fade_core.ops.step import step_segments
from fade_core.storage.fixedstore import TileView
from fade_core.support.memory import live_bytes

TILE, SINK, RECENT = 16, 3, 8
CONFIG = FadeConfig(n_sink=SINK, recent_window=RECENT, tile=TILE, keys={"kind": "uniform", "axis": "channel"})


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


# --- the ops ---


def rule_and_buffers(
    rows: int, heads: int, dim: int, tiles: int, axis: str, bits: int
) -> tuple[AppendRule, FixedBuffers]:
    """Random rows of different lengths; what is not in use is NaN, in packed tiles as well."""
    sides = [
        UniformQuantizer(dim, bits, axis, tile=TILE),  # type: ignore[arg-type]
        UniformQuantizer(dim, bits, tile=TILE, layout="channel"),
    ]
    rule = AppendRule(Tier("int", "rest", *sides), SINK, SINK + RECENT + TILE)
    capacity = rule.threshold + 5
    window = [torch.randn(rows, heads, capacity, dim) for _ in sides]
    lengths = torch.randint(1, rule.threshold + 1, (rows, 1), dtype=torch.int32).expand(-1, heads).contiguous()
    lengths[0] = rule.threshold
    used = torch.randint(0, tiles, (rows, 1), dtype=torch.int32).expand(-1, heads).contiguous()
    nan = int(torch.tensor([float("nan")] * 2, dtype=torch.float16).view(torch.int32))
    fields = []
    for quantizer in sides:
        packed = quantizer.encode(torch.randn(rows, heads, tiles * TILE, dim)).fields
        unused = torch.arange(tiles) >= used[..., None]
        packed["meta"][unused] = nan
        fields.append(packed)
    for held in window:
        held[torch.arange(capacity) >= lengths[..., None]] = torch.nan
    return rule, FixedBuffers(*window, *fields, lengths, used, torch.zeros(3, dtype=torch.long))


def copied(held: FixedBuffers) -> FixedBuffers:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else {name: field.clone() for name, field in value.items()}

    return FixedBuffers(*(copy(value) for value in vars(held).values()))


def same_live(ours: FixedBuffers, theirs: FixedBuffers) -> None:
    """All that is in use is alike, bit by bit."""
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.used, theirs.used)
    assert torch.equal(ours.counters, theirs.counters)
    live = torch.arange(ours.keys.shape[2]) < ours.lengths[..., None]
    assert torch.equal(ours.keys[live], theirs.keys[live])
    assert torch.equal(ours.values[live], theirs.values[live])
    for mine, his in ((ours.key_fields, theirs.key_fields), (ours.value_fields, theirs.value_fields)):
        for name, field in mine.items():
            there = torch.arange(field.shape[2]) < ours.used[..., None]
            assert torch.equal(field[there], his[name][there])


@pytest.mark.parametrize(("axis", "bits"), [("channel", 4), ("token", 2), ("token", 3)])
def test_append_without_looking_is_append_with_it(axis: str, bits: int) -> None:
    torch.manual_seed(fresh_seed())
    rule, seen = rule_and_buffers(4, 2, 12, 5, axis, bits)
    blind = copied(seen)
    for step in range(TILE + 3):
        keys, values = torch.randn(2, 4, 2, 1, 12)
        before = copied(seen)
        append(keys, values, seen, rule, look=True)
        with NoHostRead():
            append(keys, values, blind, rule, look=False)
        same_live(seen, blind)
        assert int(seen.counters[LOGICAL]) == step + 1
        grown = seen.used[:, 0] - before.used[:, 0]
        full = (before.lengths[:, 0] >= rule.threshold) & (before.used[:, 0] < 5)
        assert torch.equal(grown, full.int())
        assert torch.equal(seen.lengths[:, 0], before.lengths[:, 0] + 1 - TILE * full)


def test_a_full_store_is_never_written_over() -> None:
    torch.manual_seed(fresh_seed())
    rule, held = rule_and_buffers(2, 2, 8, 3, "channel", 4)
    held.used.fill_(3)
    held.lengths.fill_(rule.threshold)
    for look in (True, False):
        ours = copied(held)
        for name, field in ours.key_fields.items():
            held.key_fields[name].copy_(field)
        for _ in range(20):
            append(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), ours, rule, look)
        for name, field in ours.key_fields.items():
            assert torch.equal(field, held.key_fields[name])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_or_counted_or_stored_as_zero(bad: float) -> None:
    rule, held = rule_and_buffers(2, 2, 8, 3, "token", 4)
    before, token = copied(held), torch.randn(2, 2, 1, 8)
    token[1, 0, 0, 3] = bad
    with pytest.raises(NonFiniteError, match="row 1"):
        append(token, token, held, rule, look=True)
    same_live(held, before)
    append(token, token, held, rule, look=False)
    assert held.counters.tolist() == [1, 1, 0]
    zero = AppendRule(rule.tier, rule.n_sink, rule.threshold, "zero")
    for look in (True, False):
        held = copied(before)
        append(token, token, held, zero, look)
        assert float(held.keys[1, 0, int(held.lengths[1, 0]) - 1, 3]) == 0
        assert int(held.counters[NONFINITE]) == 0


@pytest.mark.parametrize("holes", [False, True])
def test_segments_without_looking_are_segments_with_it(holes: bool) -> None:
    torch.manual_seed(fresh_seed())
    rule, held = rule_and_buffers(3, 2, 16, 4, "channel", 4)
    for field in (held.key_fields["meta"], held.value_fields["meta"]):
        field[torch.arange(4) >= held.used[..., None]] = 0  # as allocated: torch multiplies what it masks by zero
    held.keys.nan_to_num_()
    held.values.nan_to_num_()
    padding = torch.tensor([0, 5, 2])
    stored = padding + held.used[:, 0] * TILE + held.lengths[:, 0]
    where = torch.arange(int(stored.max()) + 9)
    mask = ((where >= padding[:, None]) & (where < stored[:, None]))[:, None, None]
    if holes:
        mask &= (torch.rand(mask.shape) < 0.8) | (where == stored[:, None, None, None] - 1)
    query = torch.randn(3, 4, 1, 16)
    view = TileView(rule.tier, held.key_fields, held.value_fields, held.used, torch.float32)
    found = []
    for look in (True, False):
        segments = step_segments(
            view, held.keys, held.values, held.lengths, padding, mask if holes else None, SINK, look
        )
        found.append(decode_attention(query, segments, 0.3))
    with NoHostRead():
        step_segments(view, held.keys, held.values, held.lengths, padding, mask if holes else None, SINK, False)
    torch.testing.assert_close(found[0].output, found[1].output)
    for row in range(3):  # token by token, in order of position
        quantizers, count = (rule.tier.keys, rule.tier.values), int(held.used[row, 0]) * TILE
        packed = [q.decode(p)[row, :, :count] for q, p in zip(quantizers, view.packed(), strict=True)]
        live = int(held.lengths[row, 0])
        sinks = min(SINK, live)
        keys, values = (
            torch.cat([w[row, :, :sinks], p, w[row, :, sinks:live]], 1)
            for w, p in zip((held.keys, held.values), packed, strict=True)
        )
        seen = mask[row, 0, 0, int(padding[row]) :][: keys.shape[1]] if live > SINK else None
        if seen is None:
            continue  # a row with packed tokens and sinks alone occurs only after a crop
        logits = query[row].view(2, 2, 16) @ keys.transpose(1, 2) * 0.3
        wanted = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        torch.testing.assert_close(found[1].output[row].view(2, 2, 16), wanted, rtol=1e-4, atol=1e-4)


# --- the layer ---


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


@pytest.mark.parametrize("removed", [1, 5, 12, 30, 47, 59])
def test_a_crop_is_a_crop_of_the_growing_cache_until_a_tile_is_cut(removed: int) -> None:
    """Tokens of a cut tile go back to the window as they decode: the same tokens are attended to."""
    model = tiny_llama()
    found = []
    for options in ({}, {"max_cache_len": 100}):
        with fed(model, 40, 20, **options) as cache:
            cache.crop(-removed)
            assert cache.get_seq_length() == 60 - removed
            assert all(int(layer.tier_map().min()) >= 0 for layer in cache.tiered)
            found.append(go_on(model, cache, 9))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("first", "second"), [(None, 200), (200, None), (200, 200)])
def test_checkpoints_go_on_in_caches_of_either_kind(first: int | None, second: int | None, tmp_path: Path) -> None:
    model = tiny_llama()
    with fed(model, 40, 23, max_cache_len=first) as cache:
        cache.settle()
        state = cache.cache_state_dict()
        wanted = go_on(model, cache)
    with create_tiered_cache(model, CONFIG, max_cache_len=second) as other:
        other.load_cache_state_dict(state)
        assert other.get_seq_length() == 63
        torch.testing.assert_close(go_on(model, other), wanted)
        other.save(tmp_path / "cache.safetensors")
    with TieredKVCache.load(tmp_path / "cache.safetensors", model) as loaded:
        assert (type(loaded.tiered[0]) is FixedLayer) == (second is not None)
        assert loaded.get_seq_length() == 83
        go_on(model, loaded)


def test_what_a_fixed_cache_cannot_hold_is_not_loaded() -> None:
    model = tiny_llama()
    with fed(model, 60, 0) as cache:
        cache.crop(-30)  # a tile is cut short
        state = cache.cache_state_dict()
    with create_tiered_cache(model, CONFIG, max_cache_len=200) as other:
        with pytest.raises(CheckpointError, match="whole tiles"):
            other.load_cache_state_dict(state)
        assert other.get_seq_length() == 0


@pytest.mark.parametrize("steps", [1, 7])
def test_a_pass_that_fails_in_a_later_layer_leaves_the_cache_as_it_was(steps: int) -> None:
    model = tiny_llama()
    with fed(model, 40, 11, max_cache_len=100) as cache:
        wanted = cache.cache_state_dict()["tensors"]
        layer = model.model.layers[2].self_attn.k_proj.weight
        kept = layer.data.clone()
        layer.data[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="The cache is as it was before this step"):
            model(prompt(5, steps), past_key_values=cache, use_cache=True)
        layer.data.copy_(kept)
        found = cache.cache_state_dict()["tensors"]
        assert cache.get_seq_length() == 51
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
        with fed(model, 40, 11) as growing:
            torch.testing.assert_close(go_on(model, cache), go_on(model, growing))


def test_trusted_masks_that_hide_stored_tokens_are_told_of_afterwards() -> None:
    """Off a CPU a step's mask is not read back: it is taken for the prompt's, and counted where it was another."""
    model = tiny_llama()
    with fed(model, 40, 0, max_cache_len=100) as cache:
        for layer in cache.tiered:
            layer.trusting = True
        slots = cache.tiered[0].slots
        mask = (torch.arange(slots) <= 40).expand(2, 1, 1, -1).clone()
        model(prompt(3, 1), attention_mask=mask, past_key_values=cache, use_cache=True)
        assert cache.tiered[0]._counters.tolist() == [41, 0, 0]
        mask[..., 41], mask[1, ..., 20] = True, False
        model(prompt(3, 1), attention_mask=mask, past_key_values=cache, use_cache=True)
        assert int(cache.tiered[0]._counters[ODD_MASK]) == 1
        cache.tiered[0]._stale = True  # as after a compiled step
        with pytest.raises(InputError, match="1 steps came with a mask that hides stored tokens"):
            cache.memory_report()


def test_tokens_are_not_moved_by_hand() -> None:
    model = tiny_llama()
    with fed(model, 40, 0, max_cache_len=100) as cache, pytest.raises(InputError, match="without max_cache_len"):
        cache.tiered[0].assign(cache.tiered[0].tier_map())


def test_a_rehearsal_leaves_nothing_behind() -> None:
    model, found = tiny_llama(), []
    for rehearsed in (False, True):
        with create_tiered_cache(model, CONFIG, max_cache_len=100) as cache:
            if rehearsed:
                for layer in cache.tiered:
                    like = torch.zeros(2, 2, 1, 16)
                    layer.lazy_initialization(like, like)
                    layer.rehearse()
                    assert layer._counters.tolist() == [0, 0, 0]
                    assert not layer._lengths.any()
                    assert layer.logical == 0
            model(prompt(1, 40), past_key_values=cache, use_cache=True)
            found.append(go_on(model, cache))
    assert torch.equal(*found)


def test_rows_leave_a_fixed_cache_and_none_come() -> None:
    model, found = tiny_llama(), []
    for options in ({}, {"max_cache_len": 100}):
        with fed(model, 40, 3, rows=3, **options) as cache:
            assert cache.keep_rows([2, 0]) == 0
            found.append(go_on(model, cache))
    torch.testing.assert_close(*found)
    with fed(model, 40, 0, max_cache_len=100) as cache, fed(model, 20, 0, max_cache_len=100) as other:
        with pytest.raises(InputError, match="buffers of fixed size, which take no rows in"):
            cache.add_rows(other)
        assert (cache.get_seq_length(), other.get_seq_length()) == (40, 20)
