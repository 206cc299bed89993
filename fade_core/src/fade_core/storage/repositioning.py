"""Contiguous positions after eviction: how far each survivor is moved towards the query when it is read."""

from __future__ import annotations

import weakref
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
        turned = self.scheme.shift(keys[:, :, :near], self.offsets[:, :, start : start + near])
        return turned if near == keys.shape[2] else torch.cat([turned, keys[:, :, near:]], 2)

    def move(self, keys: Tensor, block: int) -> None:
        """Move ``keys`` (as for ``moved``) in place, ``block`` tokens at a time."""
        for start in range(0, self.reach, block):
            part = slice(start, min(start + block, self.reach))
            keys[:, :, part] = self.scheme.shift(keys[:, :, part], self.offsets[:, :, part])


class Shifts:
    """The shifts of one layer: kept as long as its book is, since tokens that come move nothing that is there.

    A token at position ``k`` is moved on by the holes after it, the positions between ``k`` and the newest that are not
    stored in its row and head. So survivors stand side by side, the newest ones where they are.

    Args:
        scheme: the layer's rotary embedding.
    """

    def __init__(self, scheme: RopeScheme) -> None:
        self.scheme = scheme
        self._found: list[Shift | None] = []
        self._book: list[weakref.ref[Tensor]] = []

    def of(self, window: Window, stores: Sequence[TierStore], end: int, shown: Tensor | None) -> list[Shift | None]:
        """The shift of each store that has tiles and then of the window; ``None`` where nothing moves.

        Args:
            window: the layer's full-precision tokens.
            stores: its packed tiers.
            end: positions below this one may be stored.
            shown: bool ``[B or 1, end]`` if the mask hides some of them from the newest query: a hidden position is no hole,
                whether models count it (``position_ids`` by default) or not (``generate``). ``None`` if it hides none but
                leading padding.
        """
        if shown is not None:
            self.forget()
            return self._worked_out(window, stores, end, shown)
        book = [window.offsets, *(t for s in stores for t in (s.table, s.counts, s.starts, s.offsets))]
        if len(book) != len(self._book) or any(k() is not t for k, t in zip(self._book, book, strict=True)):
            self._found = self._worked_out(window, stores, end, None)
            self._book = [weakref.ref(t) for t in book]
        return self._found

    def forget(self) -> None:
        """Keep nothing."""
        self._found, self._book = [], []

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor kept, by the segment that it is for."""
        return {str(i): shift.offsets for i, shift in enumerate(self._found) if shift is not None}

    def _worked_out(
        self, window: Window, stores: Sequence[TierStore], end: int, shown: Tensor | None
    ) -> list[Shift | None]:
        held = [store for store in stores if store.tiles]
        positions = [store.positions()[:, :1] if store.alike else store.positions() for store in held]
        if window.longest:
            positions.append(window.positions())
        found: list[Shift | None] = []
        for part in holes_after(positions, end, shown) if positions else ():
            moving = part.amax((0, 1)).nonzero()
            reach = int(moving[-1]) + 1 if len(moving) else 0
            found.append(Shift(self.scheme, part[:, :, :reach].int()) if reach else None)
        return found


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
