"""A prompt, or a chunk of one, on its way into a layer: one left-aligned run of tokens with the window before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fade_core.cache.inspection import window_of
from fade_core.ops.attention import READ_AT_ONCE
from fade_core.ops.step import gathered
from fade_core.storage.repositioning import Shift
from fade_core.storage.slots import picked
from fade_core.storage.window import Window
from fade_core.support.transfer import sent

if TYPE_CHECKING:
    from fade_core.cache.layer import TieredLayer


def left_aligned(
    window: Window, chunk: list[Tensor], logical: int, padding: Tensor | None, statistics: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]:
    """The window's tokens and a chunk's, each row from its first token on.

    Args:
        window: full-precision tokens, which are not changed.
        chunk: keys and values ``[B, H_kv, Q, D]``; emptied, so that each is freed as soon as it is copied.
        logical: tokens the model has seen, the chunk's included.
        padding: leading columns of the chunk that are padding, int64 ``[B]`` (CPU), for rows still empty.
        statistics: what attention observed of the chunk's tokens, float32 ``[B, H_kv, Q]`` a name.

    Returns:
        keys, values, positions ``[B, T]``, statistics by name, tokens of each row ``[B]`` (CPU), and padding of each
        ``[B]`` (CPU).
    """
    count, device = chunk[0].shape[2], chunk[0].device
    lengths = window.lengths
    dropped = torch.zeros_like(lengths) if padding is None else padding.clamp_max(count) * (lengths == 0)
    positions = torch.arange(logical - count, logical, device=device).expand(len(lengths), -1)
    none = chunk[0].new_zeros(chunk[0].shape[:3], dtype=torch.float32) if window.statistics else chunk[0]
    observed = {name: statistics.get(name, none) for name in window.statistics}
    held = window.longest
    if not held and not bool(dropped.any()):
        return chunk.pop(0), chunk.pop(), positions, observed, lengths + count, dropped
    slots = torch.arange(held + count)
    at = sent((slots - lengths[:, None] + dropped[:, None]).clamp(0, count - 1), device)  # [B, T]
    old_here = sent(slots[:held] < lengths[:, None], device)  # [B, held]

    def join(old: Tensor, new: Tensor) -> Tensor:
        wide = at[:, None, :, None] if new.dim() == 4 else at[:, None]
        both = new.gather(2, wide.expand(-1, new.shape[1], -1, *new.shape[3:]))
        if held:
            here = old_here[:, None, :, None] if new.dim() == 4 else old_here[:, None]
            both[:, :, :held] = torch.where(here, old, both[:, :, :held])
        return both

    keys = join(window.live()[0], chunk.pop(0))
    values = join(window.live()[1], chunk.pop())
    observed = {name: join(window.statistics[name][:, :, :held], t) for name, t in observed.items()}
    positions = join(window.live_positions(), positions[:, None])[:, 0]
    return keys, values, positions, observed, lengths + count - dropped, dropped


def keep_in_window(
    window: Window,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    observed: Mapping[str, Tensor],
    lengths: Tensor,
    due: Tensor,
    n_sink: int,
) -> None:
    """Leave in ``window`` what stays of a left-aligned run of ``lengths`` tokens: sinks, and those after the ``due`` ones."""
    kept = lengths - due
    slots = torch.arange(int(kept.max()))
    source = torch.where(slots < n_sink, slots, slots + due[:, None]).clamp_max(keys.shape[2] - 1)
    source = sent(source, keys.device)  # [B, kept]
    tokens = {"keys": keys, "values": values, "positions": positions[:, None]}
    tokens |= {f"statistic.{name}": held for name, held in observed.items()}
    window.assign({name: picked(held, source[:, None]) for name, held in tokens.items()}, kept)


# --- the past that a chunk reads ---


def dense_with_past(layer: TieredLayer, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of all that is stored and then of the pending chunk, in full precision ``[B, H_kv, T, D]``.

    Args:
        layer: the layer.
        mask: that of the pending queries, bool ``[B, 1, Q, logical]`` or ``None``; it only decides which holes count.
    """
    window, (keys, values) = window_of(layer), cast(tuple[Tensor, Tensor], layer.pending)
    held = [store for store in layer.stores if store.tiles]
    sizes = [*(store.tiles * store.tile for store in held), window.longest]
    both = tuple(t.new_empty((*t.shape[:2], sum(sizes) + keys.shape[2], t.shape[3])) for t in (keys, values))
    start, starts = 0, []
    for store, size in zip(held, sizes, strict=False):  # the window comes after them
        store.decode_into(*(t[:, :, start : start + size] for t in both))
        starts.append(start)
        start += size
    starts.append(start)
    for out, recent, new in zip(both, window.live(), (keys, values), strict=True):
        out[:, :, start : start + window.longest] = recent
        out[:, :, start + window.longest :] = new
    for begin, size, shift in zip(starts, sizes, _past_shifts(layer, mask), strict=True):
        if shift is not None and size:
            shift.move(both[0][:, :, begin : begin + size], READ_AT_ONCE)
    return both[0], both[1]


def _past_shifts(layer: TieredLayer, mask: Tensor | None) -> list[Shift | None]:
    """How far each part of what is stored moves, the window last."""
    shown = None if mask is None else layer.shown_shifts(mask)
    held = [store for store in layer.stores if store.tiles]
    if shown is not None:
        return [*shown, None] if len(shown) == len(held) else [*shown]
    if layer.plan.rope is None or not layer.plan.shifted:
        return [None] * (len(held) + 1)
    window = window_of(layer)
    notes = [store.table.notes["shift"][:, :, : store.tiles].flatten(2) for store in held]
    return [Shift(layer.plan.rope, by) for by in [*notes, window.notes["shift"][:, :, : window.longest]]]


def past_masks(layer: TieredLayer, mask: Tensor) -> list[Tensor]:
    """The share of ``mask`` (bool ``[B or 1, 1, Q, logical]``) of each part of what is stored, the window last."""
    window, found = window_of(layer), []
    for store in layer.stores:
        if store.tiles:
            where = store.positions()[:, :1] if store.heads_aligned else store.positions()
            found.append(gathered(mask, where, where >= 0))
    if window.longest:
        where = window.live_positions()
        found.append(gathered(mask, where, where >= 0))
    return found
