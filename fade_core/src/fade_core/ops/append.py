"""Taking new tokens into a layer's buffers, in plain torch: the reference of the op ``append``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Support, Tier
from fade_core.packed import PackedFormat
from fade_core.support.checks import check_finite

LOGICAL, NONFINITE, ODD_MASK = 0, 1, 2
"""What the three ``counters`` count: tokens seen, tokens that were not finite, steps whose mask said more than it may."""

MOST_TOKENS = 32
"""Tokens a row that one call takes in."""


@dataclass(frozen=True)
class AppendRule:
    """How a layer takes tokens in; shared by all of its steps.

    Attributes:
        tier: where tokens go that leave the window; ``None`` if none ever does.
        n_sink: leading tokens that never leave it.
        threshold: tokens that a full window holds; tiles leave before the next tokens come, until there are fewer.
        on_nonfinite: "raise" or "zero"; "checked" if the tokens have been looked at already.
        layer: layer index, for messages.
    """

    tier: Tier | None
    n_sink: int
    threshold: int
    on_nonfinite: str = "raise"
    layer: int = 0

    @property
    def packed(self) -> Tier:
        """The tier. Raises ``InputError`` for a ladder without one, whose window nothing leaves."""
        if self.tier is None:
            raise InputError(f"layer {self.layer} has no tier to encode to")
        return self.tier

    @property
    def tile(self) -> int:
        """Tokens that leave the window together."""
        return 0 if self.tier is None else self.tier.keys.tile


@dataclass(frozen=True)
class StepBuffers:
    """What a step reads and writes of a layer; all of it is written in place, and counts are read where they lie.

    ``N`` is the number of tiles in the pool, ``T`` the most tiles that a row and head may have.

    Attributes:
        keys: full-precision window ``[B, H_kv, capacity, D]``, left-aligned: sinks, then the newest tokens.
        values: likewise, ``[B, H_kv, capacity, D_v]``.
        positions: int32 ``[B, capacity]``: logical position of each token of the window.
        lengths: int32 ``[B, H_kv]``: tokens in the window, the same in all heads of a row.
        counters: int64 ``[3]``: see ``LOGICAL``.
        key_fields: pool of packed tiles by the quantizer's names, ``[N, *tile_shape]`` each.
        value_fields: likewise.
        ids: int32 ``[B, H_kv, T]``: pool tile of each tile of a row and head.
        used: int32 ``[B, H_kv]``: tiles in use; heads that evict tokens of their own have numbers of their own.
        reserved: int32 ``[B, H_kv]``: tiles that may be used. ``ids`` up to here are valid, and from ``used`` on they are
            this row's and head's own. Heads of a row have the same number ahead (``reserved - used``).
        starts: int32 ``[B, H_kv, T]``: position of each tile's first token, where a tile's tokens follow one another.
        tile_positions: int32 ``[B, H_kv, T, tile]``: position of each packed token, where positions are kept one by one.
        window_notes: further numbers of 4 bytes a token of the window, ``[B, H_kv, capacity]`` each; 0 for a new token.
        tile_notes: the same of packed tokens, ``[B, H_kv, T, tile]`` each.
        runs: whether ``ids[b, h, n]`` is ``(b * H_kv + h) * T + n`` throughout, so that nobody has to read them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    counters: Tensor
    key_fields: Mapping[str, Tensor]
    value_fields: Mapping[str, Tensor]
    ids: Tensor
    used: Tensor
    reserved: Tensor
    starts: Tensor | None = None
    tile_positions: Tensor | None = None
    window_notes: Sequence[Tensor] = ()
    tile_notes: Sequence[Tensor] = ()
    runs: bool = False

    def clone(self) -> StepBuffers:
        """The same contents in other memory."""

        def copy(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: field.clone() for name, field in value.items()}
            if isinstance(value, Sequence):
                return [note.clone() for note in value]
            return value.clone() if isinstance(value, Tensor) else value

        return StepBuffers(**{name: copy(value) for name, value in vars(self).items()})


def append(keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule, on_host: bool | None = None) -> None:
    """Write new tokens behind the window; where the window is full, encode its oldest tiles into the pool first.

    A row gives up a tile as often as its window holds ``rule.threshold`` tokens and more and a tile is reserved.

    On a CPU the lengths are read, so that nothing is encoded in vain. Elsewhere nothing is read back: every call encodes
    the tiles that would be next and keeps those of full windows.

    Args:
        keys: ``[B, H_kv, Q, D]`` in the window's dtype, ``1 <= Q <= 32``.
        values: likewise, ``[B, H_kv, Q, D_v]``.
        buffers: what the layer holds. Tokens past the window's capacity are all written to its last slot; which of them
            stays there is not said.
        rule: when and how tokens leave the window.
        on_host: whether lengths and tokens may be read on the host; ``None``: if they lie there.

    Raises:
        NonFiniteError: if they may, for NaN or infinity under ``on_nonfinite="raise"``; nothing has changed then. ``counters``
            says so otherwise.
    """
    on_host = keys.device.type == "cpu" if on_host is None else on_host
    keys, values = _finite(keys, values, buffers, rule, on_host)
    lengths: list[int] = buffers.lengths[:, 0].tolist() if on_host else []
    if not lengths or max(lengths) >= rule.threshold:
        _encode_oldest(buffers, rule, on_host)
        lengths = buffers.lengths[:, 0].tolist() if on_host else []
    count, capacity = keys.shape[2], buffers.keys.shape[2]
    fresh = buffers.counters[LOGICAL]  # []
    if count > 1:
        fresh = fresh + torch.arange(count, device=keys.device)  # [Q]
    if lengths and min(lengths) == max(lengths) <= capacity - count:  # the same slots in all rows
        start = lengths[0]
        buffers.keys.narrow(2, start, count).copy_(keys)
        buffers.values.narrow(2, start, count).copy_(values)
        buffers.positions.narrow(1, start, count).copy_(fresh)
        for note in buffers.window_notes:
            note.narrow(2, start, count).zero_()
    else:
        slots = buffers.lengths[:, :1] + torch.arange(count, device=keys.device)  # [B, Q]
        at = torch.arange(len(keys), device=keys.device)[:, None], slots.clamp_max(capacity - 1).long()
        buffers.keys.transpose(1, 2)[at] = keys.transpose(1, 2)  # [B, Q, H_kv, D]
        buffers.values.transpose(1, 2)[at] = values.transpose(1, 2)
        buffers.positions[at] = fresh.int()
        for note in buffers.window_notes:
            note.transpose(1, 2)[at] = note.new_zeros(())  # a number of Python's would come from the host
    buffers.lengths.add_(count)
    buffers.counters[LOGICAL] += count


def _finite(
    keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule, on_host: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values as they are, with zeros for what is not finite, refused, or counted where the host may not read."""
    if rule.on_nonfinite == "checked":
        return keys, values
    if on_host:
        if bool(torch.isfinite(keys.sum() + values.sum())):
            return keys, values
        return check_finite(rule.layer, keys, values, int(buffers.counters[LOGICAL]), rule.on_nonfinite)
    if rule.on_nonfinite == "zero":
        return keys.masked_fill(~torch.isfinite(keys), 0), values.masked_fill(~torch.isfinite(values), 0)
    buffers.counters[NONFINITE] += ~torch.isfinite(keys.float().sum() + values.float().sum())
    return keys, values


def _most_due(buffers: StepBuffers, rule: AppendRule) -> int:
    """Most tiles that can leave any row's window, known from shapes alone; 0 where there is no tile."""
    pools = *buffers.key_fields.values(), *buffers.value_fields.values()
    if rule.tier is None or not all(map(len, pools)):
        return 0
    capacity = buffers.keys.shape[2]
    over, inside = (capacity - rule.threshold) // rule.tile + 1, (capacity - rule.n_sink) // rule.tile
    return max(0, min(over, inside, buffers.ids.shape[2]))


def _encode_oldest(buffers: StepBuffers, rule: AppendRule, on_host: bool) -> None:
    """Encode the oldest tiles of full windows into the pool, and close the gaps that they leave.

    On the host these are the tiles that are due, and no more. Elsewhere as many are encoded as can be due at all: what is
    not due repeats a tile that is, so that no two write different things to one place; if none is, all write what was there.
    """
    most = _most_due(buffers, rule)
    if not most:
        return
    tier, first, tile, capacity = rule.packed, rule.n_sink, rule.tile, buffers.keys.shape[2]
    over = (buffers.lengths[:, 0].long() - rule.threshold).div(tile, rounding_mode="floor") + 1
    due = over.minimum((buffers.reserved - buffers.used)[:, 0]).clamp(0, most)  # [B]
    leaves = torch.arange(most, device=due.device) < due[:, None]  # [B, most]
    if on_host:
        wanted, rows = None, due.nonzero().flatten()
        row, number = leaves.nonzero(as_tuple=True)  # [P]
        if not len(row):
            return
    else:
        wanted, rows = leaves.any(), torch.arange(len(due), device=due.device)
        flat = leaves.flatten()  # [P], P = B * most
        chosen = torch.where(flat, torch.arange(len(flat), device=due.device), flat.int().argmax())
        row, number = chosen // most, chosen % most
    pairs, heads = row[:, None], torch.arange(buffers.ids.shape[1], device=due.device)
    at = (buffers.used[row] + number[:, None]).clamp_max(buffers.ids.shape[2] - 1).long()  # [P, H_kv]
    place = (pairs, heads, at)
    pool = buffers.ids[place].long()  # [P, H_kv]
    slots = first + number[:, None] * tile + torch.arange(tile, device=due.device)  # [P, tile]
    for quantizer, window, fields in (
        (tier.keys, buffers.keys, buffers.key_fields),
        (tier.values, buffers.values, buffers.value_fields),
    ):
        tokens = window.transpose(1, 2)[pairs, slots].transpose(1, 2)  # [P, H_kv, tile, D]
        packed = quantizer.encode(tokens)
        for name, field in fields.items():  # [N, *tile_shape]
            inside = pool.clamp(0, len(field) - 1)  # ids of what does not leave may be anything
            _put(field, (inside,), packed.fields[name][:, :, 0], wanted)
    positions = buffers.positions[pairs, slots]  # [P, tile]
    if buffers.starts is not None:
        _put(buffers.starts, place, positions[:, :1].expand_as(at), wanted)
    if buffers.tile_positions is not None:
        _put(buffers.tile_positions, place, positions[:, None].expand(-1, len(heads), -1), wanted)
    for recent, packed_notes in zip(buffers.window_notes, buffers.tile_notes, strict=True):
        _put(packed_notes, place, recent.transpose(1, 2)[pairs, slots].transpose(1, 2), wanted)
    source = torch.arange(first, capacity, device=due.device) + tile * due[rows][:, None]  # [R, capacity - first]
    source = source.clamp_max(capacity - 1)
    by_slot = [t.transpose(1, 2) for t in (buffers.keys, buffers.values, *buffers.window_notes)]
    for held in (*by_slot, buffers.positions):  # [B, capacity, ...]
        held[rows, first:] = held[rows[:, None], source]
    buffers.lengths.sub_((tile * due[:, None]).int())
    buffers.used.add_(due[:, None].int())


def _put(held: Tensor, at: tuple[Tensor, ...], new: Tensor, wanted: Tensor | None) -> None:
    """Write ``new`` to the places ``at``; what is there stays where ``wanted`` is false."""
    new = new.to(held.dtype)
    held[at] = new if wanted is None else torch.where(wanted, new, held[at])


class TorchAppend(Kernel):
    """``append`` in torch: runs everywhere, with every quantizer."""

    name: ClassVar[str] = "torch"
    op: ClassVar[Op] = "append"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        append(*args, **kwargs)
