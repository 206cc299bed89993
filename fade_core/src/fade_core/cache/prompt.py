"""A prompt, or a chunk of one: what it reads of the past, and how it goes into a layer; and what leaves a full window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fade_core.eviction.contents import LayerContents
from fade_core.eviction.ranking import place
from fade_core.interfaces import RopeScheme
from fade_core.ops.reference import READ_AT_ONCE
from fade_core.ops.step import gathered
from fade_core.storage.repositioning import Shift, shown_shifts
from fade_core.storage.slots import picked
from fade_core.storage.tier_store import Tokens
from fade_core.storage.window import Window
from fade_core.support.transfer import sent


def place_prompt(
    held: LayerContents,
    chunk: list[Tensor],
    padding: Tensor | None,
    statistics: Mapping[str, Tensor],
    kept: int | None,
) -> tuple[int, int]:
    """Merge a chunk with the window and send what does not fit down the ladder.

    Args:
        held: the layer's tokens; ``logical`` counts the chunk's already.
        chunk: keys and values ``[B, H_kv, Q, D]``; emptied, so that each is freed as soon as it is copied.
        padding: leading columns of the chunk that are padding, int64 ``[B]`` (CPU), for rows still empty.
        statistics: what attention observed of the chunk's tokens, float32 ``[B, H_kv, Q]`` a name.
        kept: newest tokens that stay in full precision beside the recent window; ``None`` for all.

    Returns:
        tokens that were encoded, and that were evicted, summed over rows and heads.
    """
    window, ladder = held.window, held.plan.ladder
    held.ranked_at = held.ranked_at + chunk[0].shape[2]
    run, dropped = _with_window(held, chunk, padding, statistics)
    held.padding = held.padding + dropped
    lengths = run.counts[:, 0]
    due = torch.zeros_like(lengths) if kept is None else held.due(lengths - kept)
    evicted = _send_down(held, run, due, prompt=True)
    keep(window, run, due, ladder.n_sink)
    if kept is not None and ladder.tiers:
        window.shrink(0)
    return int(due.sum()) * held.heads - evicted, evicted


def compress_due(held: LayerContents, prompt: bool) -> tuple[int, int]:
    """Encode what has left the window; ``prompt``: it may be placed on any tier. Returns as ``place_prompt``."""
    window, ladder = held.window, held.plan.ladder
    due = held.due(window.lengths)
    counts = window.lengths[:, None].expand(-1, held.heads)
    run = Tokens(window.decode(0), window.decode(1), window.live_positions(), counts, window.statistics)
    evicted = _send_down(held, run, due, prompt)
    keep(window, run, due, ladder.n_sink)
    window.shrink(0 if prompt else ladder.threshold)
    return int(due.sum()) * held.heads - evicted, evicted


def _with_window(
    held: LayerContents, chunk: list[Tensor], padding: Tensor | None, statistics: Mapping[str, Tensor]
) -> tuple[Tokens, Tensor]:
    """The window's tokens and a chunk's, each row from its first token on; and the padding that was dropped, ``[B]``."""
    window, (count, device) = held.window, (chunk[0].shape[2], chunk[0].device)
    lengths, longest = window.lengths, window.longest
    dropped = torch.zeros_like(lengths) if padding is None else padding.clamp_max(count) * (lengths == 0)
    counts = (lengths + count - dropped)[:, None].expand(-1, held.heads)
    positions = torch.arange(held.logical - count, held.logical, device=device).expand(len(lengths), 1, -1)
    none = chunk[0].new_zeros(chunk[0].shape[:3], dtype=torch.float32) if window.statistics else chunk[0]
    observed = {name: statistics.get(name, none) for name in window.statistics}
    if not longest and not bool(dropped.any()):
        return Tokens(chunk.pop(0), chunk.pop(), positions, counts, observed), dropped
    slots = torch.arange(longest + count)
    at = sent((slots - lengths[:, None] + dropped[:, None]).clamp(0, count - 1), device)[:, None]  # [B, 1, T]
    old_here = sent(slots[:longest] < lengths[:, None], device)[:, None]  # [B, 1, longest]

    def join(old: Tensor, new: Tensor) -> Tensor:
        both, here = picked(new, at), old_here[..., None] if new.dim() == 4 else old_here
        both[:, :, :longest] = torch.where(here, old, both[:, :, :longest])
        return both

    keys, values = join(window.decode(0), chunk.pop(0)), join(window.decode(1), chunk.pop())
    observed = {name: join(old, observed[name]) for name, old in window.statistics.items()}
    return Tokens(keys, values, join(window.live_positions(), positions), counts, observed), dropped


def _send_down(held: LayerContents, run: Tokens, due: Tensor, prompt: bool) -> int:
    """Encode the ``due[b]`` tokens of each row of a ``run`` that come after the sinks; says how many were evicted.

    Those of a ``prompt`` are placed on all tiers at once, if nothing is there yet.
    """
    if not bool(due.any()):
        return 0
    ladder, first = held.plan.ladder, held.plan.ladder.n_sink
    part = slice(first, first + int(due.max()))
    known = (held.logical - run.counts[:, :1] + first) if held.contiguous else None
    counts = due[:, None].expand(-1, held.heads).contiguous()
    moving = replace(run.part(part, torch.arange(len(due)), None), counts=counts, first=known)
    if prompt and ladder.bounded and not held.packed:
        return place(held, run, moving, due)
    held.stores[0].append(moving)
    if prompt:  # it can overflow a tier at once
        held.ranked_at = held.ranked_at.where(due == 0, held.logical - held.plan.every)
    return 0


def keep(window: Window, run: Tokens, due: Tensor, n_sink: int) -> None:
    """Leave in ``window`` what stays of a ``run``: sinks, and those after the ``due[b]`` ones of each row."""
    kept = run.counts[:, 0] - due
    slots = torch.arange(int(kept.max()))
    source = torch.where(slots < n_sink, slots, slots + due[:, None]).clamp_max(run.keys.shape[2] - 1)
    tokens = {"keys": run.keys, "values": run.values, "positions": run.positions}
    tokens |= {f"statistic.{name}": held for name, held in run.statistics.items()}
    at = sent(source, run.keys.device)[:, None]  # [B, 1, kept]
    window.assign({name: picked(held, at) for name, held in tokens.items()}, kept)


# --- the past that a chunk reads ---


def dense_with_past(
    held: LayerContents, keys: Tensor, values: Tensor, mask: Tensor | None, rope: RopeScheme | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of all that is stored and then of a chunk, in full precision ``[B, H_kv, T, D]``.

    Args:
        held: the layer's tokens; ``logical`` counts the chunk's already.
        keys: the chunk's, ``[B, H_kv, Q, D]``.
        values: likewise.
        mask: bool ``[B or 1, T]``, what the newest query may see; ``None`` for all. It only decides which holes count.
        rope: by which keys are moved when they are read; ``None`` if they stay.
    """
    stored = sum(part.longest for part in held.parts)
    both = tuple(t.new_empty((*t.shape[:2], stored + keys.shape[2], t.shape[3])) for t in (keys, values))
    noted = [None if rope is None else Shift(rope, part.note("shift")) for part in held.parts]
    start, shifts = 0, past_shifts(held, rope, mask, held.logical - keys.shape[2]) or noted
    for part, shift in zip(held.parts, shifts, strict=True):
        here = [t[:, :, start : start + part.longest] for t in both]
        part.decode_into(*here)
        if shift is not None:
            shift.move(here[0], READ_AT_ONCE)
        start += part.longest
    for out, new in zip(both, (keys, values), strict=True):
        out[:, :, stored:] = new
    return both[0], both[1]


def past_shifts(
    held: LayerContents, rope: RopeScheme | None, mask: Tensor | None, end: int
) -> list[Shift | None] | None:
    """How far each part of what is stored moves, where ``mask`` (as above) hides more than padding; ``None``: as noted."""
    if rope is None or mask is None:
        return None
    shown = mask[:, :end]
    padded = torch.arange(end, device=mask.device) < sent(held.padding, mask.device)[:, None]
    return None if bool((shown | padded).all()) else shown_shifts(rope, held.window, held.stores, end, shown)


def past_masks(held: LayerContents, mask: Tensor) -> list[Tensor]:
    """The share of ``mask`` (bool ``[B or 1, 1, Q, logical]``) of each part of what is stored."""
    found = []
    for part in held.parts:
        where = part.live_positions()
        where = where[:, :1] if part.heads_aligned else where
        found.append(gathered(mask, where, where >= 0))
    return found
