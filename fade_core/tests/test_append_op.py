"""Taking tokens in, in plain torch: against a loop over tokens, with and without looking, NaN wherever nothing is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fresh_seed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fade_core import Tier
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import NonFiniteError
from fade_core.ops.buffers import LOGICAL, NONFINITE, AppendRule, StepBuffers
from fade_core.ops.reference import append

TILE, SINK, RECENT = 16, 3, 8


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


# --- the ops ---


def rule_and_buffers(
    rows: int, heads: int, dim: int, tiles: int, axis: str, bits: int, runs: bool = True
) -> tuple[AppendRule, StepBuffers]:
    """Random rows of different lengths; what is not in use is NaN, in packed tiles as well.

    Without ``runs`` tiles lie anywhere in a larger pool, and heads have numbers of their own.
    """
    sides = [
        UniformQuantizer(dim, bits, axis, tile=TILE),  # type: ignore[arg-type]
        UniformQuantizer(dim, bits, tile=TILE, layout="channel"),
    ]
    rule = AppendRule(Tier("int", "rest", *sides), SINK, SINK + RECENT + TILE)
    capacity = rule.threshold + 2 * TILE + 5
    window = [torch.randn(rows, heads, capacity, dim) for _ in sides]
    lengths = torch.randint(1, rule.threshold + 1, (rows, 1), dtype=torch.int32).expand(-1, heads).contiguous()
    lengths[0] = rule.threshold
    used = torch.randint(0, tiles, (rows, 1), dtype=torch.int32).expand(-1, heads).contiguous()
    reserved = torch.full_like(used, tiles)
    count = rows * heads * tiles
    ids = torch.arange(count, dtype=torch.int32).view(rows, heads, tiles)
    if not runs:
        ids = torch.randperm(count + 7)[:count].int().view(rows, heads, tiles)
        less = torch.arange(heads, dtype=torch.int32).clamp_max(used)  # [rows, heads]
        used, reserved = used - less, reserved - less
        ids[torch.arange(tiles) >= reserved[..., None]] = -1
    nan = int(torch.tensor([float("nan")] * 2, dtype=torch.float16).view(torch.int32))
    fields = []
    for quantizer in sides:
        packed = quantizer.encode(torch.randn(count + 7, 1, TILE, dim)).fields
        held = {name: field.flatten(0, 2) for name, field in packed.items()}  # [N, *tile_shape]
        unused = torch.ones(len(held["meta"]), dtype=torch.bool)
        unused[ids[torch.arange(tiles) < used[..., None]].long()] = False
        held["meta"][unused] = nan
        fields.append({name: field[:count] for name, field in held.items()} if runs else held)
    for held in window:
        held[torch.arange(capacity) >= lengths[..., None]] = torch.nan
    return rule, StepBuffers(
        *window,
        torch.randint(0, 1000, (rows, capacity), dtype=torch.int32),
        lengths,
        torch.zeros(3, dtype=torch.long),
        *fields,
        ids,
        used,
        reserved,
        starts=torch.full_like(ids, -1) if runs else None,
        tile_positions=None if runs else torch.full((rows, heads, tiles, TILE), -1, dtype=torch.int32),
        window_notes=[torch.rand(rows, heads, capacity)],
        tile_notes=[torch.rand(rows, heads, tiles, TILE)],
        runs=runs,
    )


def same_live(ours: StepBuffers, theirs: StepBuffers) -> None:
    """All that is in use is alike, bit by bit, and no packed tile but the row's and head's own was touched."""
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.used, theirs.used)
    assert torch.equal(ours.counters, theirs.counters)
    live = torch.arange(ours.keys.shape[2]) < ours.lengths[..., None]
    for mine, his in zip(
        (ours.keys, ours.values, *ours.window_notes), (theirs.keys, theirs.values, *theirs.window_notes), strict=True
    ):
        assert torch.equal(mine[live], his[live])
    assert torch.equal(ours.positions[live[:, 0]], theirs.positions[live[:, 0]])
    for mine, his in ((ours.key_fields, theirs.key_fields), (ours.value_fields, theirs.value_fields)):
        for name, field in mine.items():
            assert torch.equal(field, his[name])
    for mine, his in zip(tile_tensors(ours), tile_tensors(theirs), strict=True):
        assert torch.equal(mine, his)


def tile_tensors(buffers: StepBuffers) -> list[Tensor]:
    """What is noted of packed tiles, ``[B, H_kv, T, ...]``."""
    return [t for t in (buffers.starts, buffers.tile_positions, *buffers.tile_notes) if t is not None]


def by_hand(keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule) -> None:
    """``append`` row by row, head by head and token by token."""
    tile, first = rule.tile, rule.n_sink
    rows, heads, count = keys.shape[:3]
    for row in range(rows):
        while int(buffers.lengths[row, 0]) >= rule.threshold and int(buffers.used[row, 0]) < int(
            buffers.reserved[row, 0]
        ):
            for head in range(heads):
                n = int(buffers.used[row, head])
                at = int(buffers.ids[row, head, n])
                for q, window, fields in (
                    (rule.tier.keys, buffers.keys, buffers.key_fields),
                    (rule.tier.values, buffers.values, buffers.value_fields),
                ):
                    for name, field in q.encode(window[row, head, first : first + tile][None, None]).fields.items():
                        fields[name][at] = field[0, 0, 0]
                if buffers.starts is not None:
                    buffers.starts[row, head, n] = buffers.positions[row, first]
                if buffers.tile_positions is not None:
                    buffers.tile_positions[row, head, n] = buffers.positions[row, first : first + tile]
                for note, packed in zip(buffers.window_notes, buffers.tile_notes, strict=True):
                    packed[row, head, n] = note[row, head, first : first + tile]
            end = int(buffers.lengths[row, 0])
            for held in (buffers.keys[row], buffers.values[row], *(n[row] for n in buffers.window_notes)):
                held[:, first : end - tile] = held[:, first + tile : end].clone()
            buffers.positions[row, first : end - tile] = buffers.positions[row, first + tile : end].clone()
            buffers.lengths[row] -= tile
            buffers.used[row] += 1
        for token in range(count):
            slot = int(buffers.lengths[row, 0])
            buffers.keys[row, :, slot], buffers.values[row, :, slot] = keys[row, :, token], values[row, :, token]
            buffers.positions[row, slot] = int(buffers.counters[LOGICAL]) + token
            for note in buffers.window_notes:
                note[row, :, slot] = 0
            buffers.lengths[row] += 1
    buffers.counters[LOGICAL] += count


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize(("axis", "bits"), [("channel", 4), ("token", 2), ("token", 3)])
def test_append_is_what_it_is_by_hand_whether_it_looks_or_not(axis: str, bits: int, runs: bool) -> None:
    """Through a table and without; steps of one token and of many, so that up to two tiles are due at once."""
    torch.manual_seed(fresh_seed())
    rule, seen = rule_and_buffers(4, 2, 12, 5, axis, bits, runs)
    blind, wanted = seen.clone(), seen.clone()
    for count in (1, 1, 5, 2 * TILE, 1, TILE, 1, 3):
        keys, values = torch.randn(2, 4, 2, count, 12)
        if int(wanted.lengths.max()) + count > wanted.keys.shape[2]:
            break  # a row has used its tiles up
        append(keys, values, seen, rule, on_host=True)
        with NoHostRead():
            append(keys, values, blind, rule, on_host=False)
        by_hand(keys, values, wanted, rule)
        same_live(seen, wanted)
        same_live(blind, wanted)


def test_two_tiles_leave_at_once() -> None:
    torch.manual_seed(fresh_seed())
    rule, seen = rule_and_buffers(3, 2, 8, 5, "channel", 4, runs=False)
    for held in (seen.keys, seen.values):
        held.nan_to_num_()
    seen.used.zero_()
    seen.reserved[:] = torch.tensor([1, 2, 3])[:, None]
    seen.ids.copy_(torch.arange(30).flip(0).view(3, 2, 5))
    seen.lengths[:] = torch.tensor([rule.threshold + TILE, rule.threshold + TILE, rule.threshold - 1])[:, None]
    blind, wanted = seen.clone(), seen.clone()
    keys, values = torch.randn(2, 3, 2, 1, 8)
    append(keys, values, seen, rule, on_host=True)
    append(keys, values, blind, rule, on_host=False)
    by_hand(keys, values, wanted, rule)
    assert seen.used[:, 0].tolist() == [1, 2, 0]
    same_live(seen, wanted)
    same_live(blind, wanted)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_layer_without_tiles_fills_its_window(on_host: bool) -> None:
    rule, buffers = rule_and_buffers(2, 2, 8, 3, "channel", 4)
    rule = AppendRule(rule.tier, rule.n_sink, 2**30)
    none = torch.zeros(2, 2, dtype=torch.int32)
    ids = none[..., None][..., :0]
    bare = StepBuffers(
        buffers.keys, buffers.values, buffers.positions, buffers.lengths, buffers.counters, {}, {}, ids, none, none, ids
    )
    before = buffers.lengths.clone()
    new = torch.randn(2, 2, 3, 8)
    append(new, new, bare, rule, on_host)
    assert torch.equal(bare.lengths, before + 3)
    assert torch.equal(bare.keys[1, :, int(before[1, 0]) :][:, :3], new[1])


def test_a_full_store_is_never_written_over() -> None:
    torch.manual_seed(fresh_seed())
    rule, held = rule_and_buffers(2, 2, 8, 3, "channel", 4)
    held.used.fill_(3)
    held.lengths.fill_(rule.threshold)
    for on_host in (True, False):
        ours = held.clone()
        for name, field in ours.key_fields.items():
            held.key_fields[name].copy_(field)
        for _ in range(20):
            append(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), ours, rule, on_host)
        for name, field in ours.key_fields.items():
            assert torch.equal(field, held.key_fields[name])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_or_counted_or_stored_as_zero(bad: float) -> None:
    rule, held = rule_and_buffers(2, 2, 8, 3, "token", 4)
    before, token = held.clone(), torch.randn(2, 2, 1, 8)
    token[1, 0, 0, 3] = bad
    with pytest.raises(NonFiniteError, match="row 1"):
        append(token, token, held, rule, on_host=True)
    same_live(held, before)
    append(token, token, held, rule, on_host=False)
    assert held.counters.tolist() == [1, 1, 0]
    zero = AppendRule(rule.tier, rule.n_sink, rule.threshold, "zero")
    for on_host in (True, False):
        held = before.clone()
        append(token, token, held, zero, on_host)
        assert float(held.keys[1, 0, int(held.lengths[1, 0]) - 1, 3]) == 0
        assert int(held.counters[NONFINITE]) == 0
