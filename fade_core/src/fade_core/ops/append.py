"""Taking one token into buffers of fixed size, in plain torch: the oracle of the op ``append``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fade_core.interfaces import Kernel, Op, Quantizer, Support, Tier
from fade_core.packed import PackedFormat
from fade_core.support.checks import check_finite

LOGICAL, NONFINITE, ODD_MASK = 0, 1, 2
"""What the three ``counters`` count: tokens seen, tokens that were not finite, steps whose mask said more than it may."""


@dataclass(frozen=True)
class AppendRule:
    """How a layer of fixed size takes tokens in; shared by all of its steps.

    Attributes:
        tier: where tokens go that leave the window.
        n_sink: leading tokens that never leave it.
        threshold: tokens that a full window holds; one tile leaves before the next token comes.
        on_nonfinite: "raise" or "zero".
        layer: layer index, for messages.
    """

    tier: Tier
    n_sink: int
    threshold: int
    on_nonfinite: str = "raise"
    layer: int = 0

    @property
    def tile(self) -> int:
        """Tokens that leave the window together."""
        return self.tier.keys.tile


@dataclass(frozen=True)
class FixedBuffers:
    """What a layer of fixed size holds; all of it is written in place, and lengths are read where they lie.

    Attributes:
        keys: full-precision window ``[B, H_kv, capacity, D]``, left-aligned: sinks, then the newest tokens.
        values: likewise.
        key_fields: packed fields ``[B, H_kv, tiles, ...]`` by the quantizer's names.
        value_fields: likewise.
        lengths: int32 ``[B, H_kv]``: tokens in the window, the same in all heads of a row.
        used: int32 ``[B, H_kv]``: tiles in use; heads that evict tokens of their own have numbers of their own.
        counters: int64 ``[3]``: see ``LOGICAL``.
    """

    keys: Tensor
    values: Tensor
    key_fields: Mapping[str, Tensor]
    value_fields: Mapping[str, Tensor]
    lengths: Tensor
    used: Tensor
    counters: Tensor


def append(keys: Tensor, values: Tensor, held: FixedBuffers, rule: AppendRule, look: bool | None = None) -> None:
    """Write one token a row behind the window; where the window is full, encode its oldest tile in place first.

    On a CPU the lengths are looked at, so that nothing is encoded in vain. Elsewhere nothing is read back: every step
    encodes the tile that would be next and keeps it where the window is full.

    Args:
        keys: ``[B, H_kv, 1, D]`` in the window's dtype.
        values: likewise.
        held: the buffers.
        rule: when and how tokens leave the window.
        look: whether lengths and tokens may be read on the host; ``None``: if they lie there.

    Raises:
        NonFiniteError: if they may, for NaN or infinity under ``on_nonfinite="raise"``; nothing has changed then. ``counters``
            says so otherwise.
    """
    host = keys.device.type == "cpu" if look is None else look
    if host:
        keys, values = check_finite(rule.layer, keys, values, int(held.counters[LOGICAL]), rule.on_nonfinite)
    elif rule.on_nonfinite == "zero":
        keys, values = (t.masked_fill(~torch.isfinite(t), 0) for t in (keys, values))
    else:
        held.counters[NONFINITE] += ~torch.isfinite(keys.float().sum() + values.float().sum())
    full = _full(held, rule)
    if not host:
        _encode_oldest(held, rule, torch.arange(len(full), device=full.device), full)
    elif bool(full.any()):
        rows = full.nonzero().flatten()
        _encode_oldest(held, rule, rows, full[rows])
    rows = torch.arange(len(full), device=full.device)
    slots = held.lengths[:, 0].clamp_max(held.keys.shape[2] - 1).long()
    held.keys[rows, :, slots] = keys[:, :, 0]
    held.values[rows, :, slots] = values[:, :, 0]
    held.lengths.add_(1)
    held.counters[LOGICAL] += 1


def carry(
    window: Sequence[Tensor],
    tiles: Sequence[Tensor],
    fresh: Sequence[Tensor],
    held: FixedBuffers,
    rule: AppendRule,
) -> None:
    """Do with what is noted of tokens what ``append`` did with the tokens.

    Args:
        window: a number a token of the window, ``[B, H_kv or 1, capacity]`` each.
        tiles: the same of packed tokens, ``[B, H_kv, tiles, tile]`` each.
        fresh: that of the token that came, a tensor of one element each.
        held: the buffers, with ``lengths`` and ``used`` as they were before.
        rule: when tokens leave the window.
    """
    full = _full(held, rule)
    moves = held.keys.device.type != "cpu" or bool(full.any())
    first, last, capacity = rule.n_sink, rule.n_sink + rule.tile, held.keys.shape[2]
    slots = torch.arange(capacity, device=full.device)
    source = torch.where((slots >= first) & full[:, None], slots + rule.tile, slots).clamp_max(capacity - 1)
    slot = (held.lengths[:, :1] - rule.tile * full.int()[:, None]).clamp_max(capacity - 1).long()
    for recent, packed, new in zip(window, tiles, fresh, strict=True):
        if moves:
            number = held.used.clamp_max(packed.shape[2] - 1).long()[..., None, None].expand(-1, -1, 1, rule.tile)
            oldest = recent[:, :, None, first:last].expand_as(number)
            packed.scatter_(2, number, torch.where(full[:, None, None, None], oldest, packed.gather(2, number)))
            recent.copy_(recent.gather(2, source[:, None].expand_as(recent)))
        at = slot[:, None].expand(-1, recent.shape[1], -1)
        recent.scatter_(2, at, new.to(recent.dtype).expand_as(at))


def _full(held: FixedBuffers, rule: AppendRule) -> Tensor:
    """bool ``[B]``: rows whose oldest tile leaves the window before the next token comes."""
    room = held.used.amax(1) < next(iter(held.key_fields.values())).shape[2]
    return (held.lengths[:, 0] >= rule.threshold) & room


def _encode_oldest(held: FixedBuffers, rule: AppendRule, rows: Tensor, full: Tensor) -> None:
    """Encode the oldest tile of ``rows`` and close the gap, where they are ``full`` (bool, one a row)."""
    first, last = rule.n_sink, rule.n_sink + rule.tile
    most = next(iter(held.key_fields.values())).shape[2] - 1
    number = held.used[rows].clamp_max(most).long()
    heads = torch.arange(number.shape[1], device=rows.device)
    slots = torch.arange(held.keys.shape[2], device=rows.device)
    source = torch.where((slots >= first) & full[:, None], slots + rule.tile, slots).clamp_max(len(slots) - 1)
    sides: tuple[tuple[Quantizer, Tensor, Mapping[str, Tensor]], ...] = (
        (rule.tier.keys, held.keys, held.key_fields),
        (rule.tier.values, held.values, held.value_fields),
    )
    for quantizer, window, fields in sides:
        ours = window[rows]
        packed = quantizer.encode(ours[:, :, first:last])
        for name, field in fields.items():
            new, at = packed.fields[name][:, :, 0].to(field.dtype), (rows[:, None], heads, number)
            field[at] = torch.where(full.view(-1, *(1,) * (new.dim() - 1)), new, field[at])
        window[rows] = ours.gather(2, source[:, None, :, None].expand_as(ours))
    held.lengths[rows] -= rule.tile * full.int()[:, None]
    held.used[rows] += full.int()[:, None]


class TorchAppend(Kernel):
    """``append`` in torch: runs everywhere, with every quantizer."""

    name: ClassVar[str] = "torch"
    op: ClassVar[Op] = "append"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        append(*args, **kwargs)
