"""Contiguous positions after eviction: how far each survivor is moved towards the query when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.interfaces import RopeScheme
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window


@dataclass(frozen=True)
class Shift:
    """How far the tokens of one segment are moved. Storage never changes: keys are moved each time they are read.

    Attributes:
        scheme: the layer's rotary embedding.
        offsets: int32 ``[B, H_kv or 1, reach]``, positions that the token of each slot is moved on; the slots after these
            stay where they are.
    """

    scheme: RopeScheme
    offsets: Tensor

    @property
    def reach(self) -> int:
        """Slots up to the last one that moves."""
        return self.offsets.shape[2]

    def moved(self, keys: Tensor, start: int = 0) -> Tensor:
        """Keys ``[B, H_kv, T, D]`` of slots ``start`` and on, at the positions where a query meets them; dtype kept."""
        near = min(keys.shape[2], self.reach - start)
        if near <= 0:
            return keys
        by = self.offsets[:, :, start : start + near]
        turned = self.scheme.shift(keys[:, :, :near], by)
        turned = torch.where((by == 0)[..., None], keys[:, :, :near], turned)  # a turn by nothing rounds, too
        return turned if near == keys.shape[2] else torch.cat([turned, keys[:, :, near:]], 2)

    def move(self, keys: Tensor, block: int) -> None:
        """Move ``keys`` (as for ``moved``) in place, ``block`` tokens at a time."""
        for start in range(0, self.reach, block):
            part = slice(start, min(start + block, self.reach))
            ahead = Shift(self.scheme, self.offsets[:, :, part])
            keys[:, :, part] = ahead.moved(keys[:, :, part])


def note_shifts(window: Window, stores: Sequence[TierStore], end: int) -> None:
    """Write into the notes "shift" of all tokens how far each is moved; to be done again when tokens went.

    A token at position ``k`` is moved on by the holes after it, the positions between ``k`` and ``end`` that are not
    stored in its row and head. So survivors stand side by side, the newest ones where they are; tokens that come move
    nothing that is there.

    Args:
        window: the layer's full-precision tokens.
        stores: its packed tiers.
        end: positions below this one may be stored.
    """
    held = [store for store in stores if store.tiles]
    for store in stores:
        store.table.slots["shift"].zero_()
    window.slots["shift"].zero_()
    parts = [store.live_positions() for store in held] + ([window.live_positions()] if window.longest else [])
    if not parts:
        return
    found = holes_after(parts, end)
    for store, part in zip(held, found, strict=False):  # the window's comes after them
        store.table.slots["shift"][:, :, : store.tiles] = part.unflatten(2, (-1, store.tile)).int()
    if window.longest:
        window.slots["shift"][:, :, : window.longest] = found[-1].int()


def shown_shifts(
    scheme: RopeScheme, window: Window, stores: Sequence[TierStore], end: int, shown: Tensor
) -> list[Shift | None]:
    """The shift of each store that has tiles and then of the window, under a mask that hides stored tokens.

    Args:
        scheme: the layer's rotary embedding.
        window: the layer's full-precision tokens.
        stores: its packed tiers.
        end: positions below this one may be stored.
        shown: bool ``[B or 1, end]``: a position that is hidden from the newest query is no hole, whether models count it
            (``position_ids`` by default) or not (``generate``).
    """
    parts = [store.live_positions() for store in stores if store.tiles]
    parts += [window.live_positions()] if window.longest else []
    found = holes_after(parts, end, shown) if parts else []
    return [Shift(scheme, part.int()) if bool(part.any()) else None for part in found]


def holes_after(positions: Sequence[Tensor], end: int, shown: Tensor | None = None) -> list[Tensor]:
    """How many positions between each token and ``end`` are not stored in its row and head.

    Args:
        positions: of the tokens of each segment, int64 ``[B, H_kv or 1, T]``, -1 where there is none.
        end: positions below this one may be stored.
        shown: bool ``[B or 1, end]``: positions that count; ``None`` for all.

    Returns:
        int64 ``[B, H_kv or 1, T]`` a segment, 0 where there is no token.
    """
    heads = max(part.shape[1] for part in positions)
    every = torch.cat([part.expand(-1, heads, -1) for part in positions], 2)
    at = every.clamp_min(0)
    if shown is None:
        after, counted = end - 1 - at, every
    else:
        until = shown.expand(every.shape[0], -1).long().cumsum(1)[:, None].expand(-1, heads, -1)
        after = until[..., -1:] - until.gather(2, at)
        counted = every.where(shown.expand(every.shape[0], -1)[:, None].expand(-1, heads, -1).gather(2, at), -1)
    stored = torch.searchsorted(counted.sort(-1).values, every, right=True)
    holes = (after - (every.shape[2] - stored)).masked_fill(every < 0, 0)
    return list(holes.split([part.shape[2] for part in positions], 2))
