"""The ops of a step in plain torch: the references that every other implementation is tested against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fade_core.interfaces import Kernel, Op, Support
from fade_core.ops.buffers import LOGICAL, NONFINITE, AppendRule, StepBuffers
from fade_core.packed import Packed, PackedFormat
from fade_core.storage.repositioning import Shift
from fade_core.storage.tile_view import TileView
from fade_core.support.checks import check_finite

# --- taking tokens in ---------------------------------------------------------------------------------------------------


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
    new = torch.arange(count, device=keys.device)  # [Q]
    at: tuple[Any, Any]
    if lengths and min(lengths) == max(lengths) <= capacity - count:  # the same slots in all rows
        at = slice(None), slice(lengths[0], lengths[0] + count)
    else:
        slots = (buffers.lengths[:, :1] + new).clamp_max(capacity - 1).long()  # [B, Q]
        at = torch.arange(len(keys), device=keys.device)[:, None], slots
    buffers.keys.transpose(1, 2)[at] = keys.transpose(1, 2)  # [B, Q, H_kv, D]
    buffers.values.transpose(1, 2)[at] = values.transpose(1, 2)
    buffers.positions[at] = (buffers.counters[LOGICAL] + new).int()
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


def _encode_oldest(buffers: StepBuffers, rule: AppendRule, on_host: bool) -> None:
    """Encode the oldest tiles of full windows into the pool, and close the gaps that they leave.

    On the host these are the tiles that are due, and no more. Elsewhere as many are encoded as can be due at all: what is
    not due repeats a tile that is, so that no two write different things to one place; if none is, all write what was there.
    """
    pools = *buffers.key_fields.values(), *buffers.value_fields.values()
    if rule.tier is None or not all(map(len, pools)):
        return
    tier, first, tile, capacity = rule.tier, rule.n_sink, rule.tile, buffers.keys.shape[2]
    # most tiles that can leave any row's window, known from shapes alone
    most = min((capacity - rule.threshold) // tile + 1, (capacity - first) // tile, buffers.ids.shape[2])
    if most <= 0:
        return
    over = (buffers.lengths[:, 0].long() - rule.threshold).div(tile, rounding_mode="floor") + 1
    due = over.minimum((buffers.reserved - buffers.used)[:, 0]).clamp(0, most)  # [B]
    leaves = (torch.arange(most, device=due.device) < due[:, None]).flatten()  # [B * most]
    if on_host:
        chosen, rows, wanted = leaves.nonzero().flatten(), due.nonzero().flatten(), None
        if not len(chosen):
            return
    else:
        numbers = torch.arange(len(leaves), device=due.device)
        chosen, rows, wanted = torch.where(leaves, numbers, leaves.int().argmax()), numbers[: len(due)], leaves.any()
    row, number = chosen // most, chosen % most  # [P]
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


# --- attention ----------------------------------------------------------------------------------------------------------

READ_AT_ONCE = 4096
"""Packed tokens that are unpacked together: what a step needs beside the cache does not grow with the context."""


@dataclass(frozen=True)
class FullSegment:
    """Tokens in full precision.

    Attributes:
        keys: ``[B, H_kv, T, D]``.
        values: ``[B, H_kv, T, D_v]``.
        mask: bool broadcastable to ``[B, H_kv, Q, T]``, true where a query may attend; ``None`` for everywhere.
        plain: the last ``Q`` tokens of each row are the queries' own, and ``mask`` says no more than causality and
            ``lengths`` do: an implementation that knows these need not read it.
        lengths: leading tokens of each row that are meant, int64 ``[B]`` on the CPU, or int32 ``[B, H_kv]`` where the
            tokens are (then no one has to read them back); ``None`` for all ``T``.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    plain: bool = False
    lengths: Tensor | None = None
    shift: ClassVar[None] = None  # its keys have been moved

    def seen(self, queries: int) -> Tensor | None:
        """``mask``, or what a ``plain`` segment says without one; ``None`` if all is seen."""
        if self.mask is not None or not self.plain or (queries == 1 and self.lengths is None):
            return self.mask
        tokens, device = self.keys.shape[2], self.keys.device
        lengths = torch.tensor([tokens], device=device) if self.lengths is None else self.lengths.to(device)
        newest = lengths.reshape(len(lengths), -1)[:, :1, None] - queries + torch.arange(queries, device=device)
        return torch.arange(tokens, device=device) <= newest.transpose(1, 2)[:, None]  # [B, 1, Q, T]

    def scores(self, query: Tensor) -> Tensor:
        """``[B, H_kv, N, T]`` float32."""
        return query @ self.keys.to(query.dtype).transpose(-1, -2)

    def combine(self, weights: Tensor) -> Tensor:
        """``[B, H_kv, N, D_v]`` float32."""
        return weights @ self.values.to(weights.dtype)


@dataclass(frozen=True)
class PackedSegment:
    """Tokens of one packed tier, read in place.

    Attributes:
        store: the tier's tiles; torch reads them through the quantizers, a kernel word by word.
        mask: as in ``FullSegment``, over ``store.tiles * store.tile`` slots.
        plain: every token is older than the queries, and ``mask`` says no more than the table does; it may be ``None``.
        shift: how far keys are moved before a query meets them; ``None`` if none is. Only kernels that declare ``shifts``
            are given one.
    """

    store: TileView
    mask: Tensor | None = None
    plain: bool = False
    shift: Shift | None = None

    def seen(self, queries: int) -> Tensor | None:
        """``mask``, or which slots of a ``plain`` segment hold a token; ``None`` if all do."""
        if self.mask is not None or not self.plain:
            return self.mask
        valid = self.store.valid()
        return None if valid is None else valid[:, :, None]  # [B, H_kv, 1, T]

    def scores(self, query: Tensor) -> Tensor:
        """``[B, H_kv, N, T]`` float32."""
        parts = self._parts(self.store.packed_keys())
        found = [self._scores(query, part, number * parts[0].length) for number, part in enumerate(parts)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _scores(self, query: Tensor, part: Packed, start: int) -> Tensor:
        """Scores of the tokens of slots ``start`` and on."""
        keys = self.store.tier.keys
        if self.shift is None or start >= self.shift.reach:
            return keys.scores(query, part)
        moved = self.shift.moved(keys.decode(replace(part, dtype=query.dtype)), start)
        return query @ moved.transpose(-1, -2)

    def combine(self, weights: Tensor) -> Tensor:
        """``[B, H_kv, N, D_v]`` float32."""
        parts = self._parts(self.store.packed_values())
        shares = weights.split([part.length for part in parts], dim=-1)
        first, *rest = (self.store.tier.values.combine(share, part) for share, part in zip(shares, parts, strict=True))
        return sum(rest, first)

    def _parts(self, packed: Packed) -> list[Packed]:
        tile = self.store.tile
        return packed.split(tile, max(1, READ_AT_ONCE // tile))


Segment = FullSegment | PackedSegment


@dataclass(frozen=True)
class AttentionOutput:
    """What ``decode_attention`` returns.

    Attributes:
        output: ``[B, H_q, Q, D_v]`` in the query's dtype.
        lse: log-sum-exp of all logits, float32 ``[B, H_q, Q]``; ``-inf`` where a query sees nothing.
        probabilities: float32 ``[B, H_kv, Q, T]`` a segment, averaged over the query heads of a KV head, or ``None``
            where they were not asked for or the implementation does not give them.
    """

    output: Tensor
    lse: Tensor
    probabilities: list[Tensor] | None = None


def decode_attention(
    query: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    probabilities: bool = False,
) -> AttentionOutput:
    """Attention of a few queries over tiers, each tier on its own, merged by log-sum-exp.

    Computed in float32; in float64 where the query is float64, then what is float32 below is float64.

    Args:
        query: ``[B, H_q, Q, D]``; ``H_q`` is a multiple of the segments' ``H_kv``.
        segments: at least one.
        scaling: factor of the logits.
        softcap: logits become ``softcap * tanh(logit / softcap)`` (arXiv 2408.00118).
        sinks: one extra logit a query head ``[H_q]`` that takes mass and gives nothing (gpt-oss).
        probabilities: also return the attention probabilities.
    """
    parts = []
    for segment in segments:
        logits = _logits(query, segment, scaling, softcap)
        top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weights = torch.exp_(logits.sub_(top))
        parts.append((segment.combine(weights), top, weights.sum(-1, keepdim=True), weights))
    (batch, heads, queries, _), kv_heads = query.shape, logits.shape[1]
    extra = [] if sinks is None else [sinks.to(logits.dtype).view(1, kv_heads, -1, 1).repeat_interleave(queries, 2)]
    peak = functools.reduce(torch.maximum, [*(top for _, top, _, _ in parts), *extra])
    shares = [torch.exp(top - peak) for _, top, _, _ in parts]
    total = sum((mass * share for (_, _, mass, _), share in zip(parts, shares, strict=True)), torch.zeros_like(peak))
    total = sum((torch.exp(sink - peak) for sink in extra), total)
    safe = total.clamp_min(torch.finfo(torch.float32).tiny)
    output = torch.stack([part * (share / safe) for (part, _, _, _), share in zip(parts, shares, strict=True)]).sum(0)
    lse = (peak + total.log()).view(batch, heads, queries)
    found = None
    if probabilities:
        found = [
            (weights * (share / safe)).view(batch, kv_heads, -1, queries, weights.shape[-1]).mean(2)
            for (_, _, _, weights), share in zip(parts, shares, strict=True)
        ]
    return AttentionOutput(output.reshape(batch, heads, queries, -1).to(query.dtype), lse, found)


def attention_mass(
    query: Tensor, segment: Segment, lse: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """Probabilities ``[B, H_kv, Q, T]`` of one segment's tokens, given the ``lse`` ``[B, H_q, Q]`` over all of them."""
    logits = _logits(query, segment, scaling, softcap)
    shifted = logits - lse.reshape(*logits.shape[:3], 1).clamp_min(torch.finfo(torch.float32).min)
    grouped: Tensor = shifted.exp().unflatten(2, (-1, query.shape[2]))  # [B, H_kv, G, Q, T]
    return grouped.mean(2)


def _logits(query: Tensor, segment: Segment, scaling: float, softcap: float | None) -> Tensor:
    """Capped and masked logits ``[B, H_kv, G * Q, T]`` in float32, or in float64 if the query already is."""
    (batch, _, queries, dim), wide = query.shape, torch.promote_types(query.dtype, torch.float32)
    kv_heads = segment.keys.shape[1] if isinstance(segment, FullSegment) else segment.store.heads
    logits = segment.scores((query.to(wide) * scaling).reshape(batch, kv_heads, -1, dim))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    mask = segment.seen(queries)
    if mask is None:
        return logits
    split: Tensor = logits.unflatten(2, (-1, queries))  # [B, H_kv, G, Q, T]
    return split.masked_fill(~mask[:, :, None], -torch.inf).view(logits.shape)


# --- as kernels ---------------------------------------------------------------------------------------------------------


class _Reference(Kernel):
    """Runs everywhere, with every quantizer."""

    name: ClassVar[str] = "torch"
    run: ClassVar[Callable[..., Any]]

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self).run(*args, **kwargs)


class TorchAppend(_Reference):
    """``append`` in torch."""

    op: ClassVar[Op] = "append"
    run = append


class TorchDecodeAttention(_Reference):
    """``decode_attention`` in torch."""

    op: ClassVar[Op] = "decode_attention"
    shifts: ClassVar[bool] = True
    run = decode_attention


class TorchAttentionMass(_Reference):
    """``attention_mass`` in torch."""

    op: ClassVar[Op] = "attention_mass"
    shifts: ClassVar[bool] = True
    run = attention_mass


REFERENCES: dict[str, Kernel] = {
    kernel.op: kernel for kernel in (TorchAppend(), TorchDecodeAttention(), TorchAttentionMass())
}
"""By op."""
