"""How many tokens each tier may hold, and which ones have to go down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fade_core.eviction.byte_budget import ByteBudget
from fade_core.interfaces import Tier
from fade_core.support.transfer import sent
from fade_core.support.validation import Capacity

UNBOUNDED = torch.iinfo(torch.int64).max // 4


@dataclass(frozen=True)
class Ladder:
    """The packed tiers of a layer, finest first, with their capacities and the budget over all of them.

    Attributes:
        tiers: the tiers; overflow of one moves to the next, overflow of the last is evicted.
        n_sink: leading tokens kept in full precision.
        recent_window: newest tokens kept in full precision.
        budget: tokens kept in all, sinks and window included: a count, a fraction of the context, bytes of the layer, or
            ``None``.
        tile: tokens move in multiples of this.
    """

    tiers: tuple[Tier, ...]
    n_sink: int
    recent_window: int
    budget: int | float | ByteBudget | None
    tile: int

    @cached_property
    def bounded(self) -> bool:
        """Whether a token can ever be moved down or evicted once it is packed."""
        return self.budget is not None or any(t.capacity != "rest" for t in self.tiers)

    @cached_property
    def threshold(self) -> int:
        """Tokens that a full window holds: one tile leaves it before the next token comes."""
        return self.n_sink + self.recent_window + self.tile

    def packed_budget(self, lengths: Tensor, window: Tensor) -> Tensor:
        """Tokens that may stay packed, int64 ``[B]``, given real lengths and full-precision tokens of each row."""
        if self.budget is None:
            return torch.full_like(lengths, UNBOUNDED)
        if isinstance(self.budget, ByteBudget):
            return self.budget.packed([tokens_of(tier.capacity, lengths) for tier in self.tiers], window)
        return (tokens_of(self.budget, lengths) - window).clamp_min(0)

    def fill(self, available: Tensor, lengths: Tensor, window: Tensor, room: Tensor | None = None) -> list[Tensor]:
        """Tokens each tier takes when ranked tokens are poured in from the top.

        Whole tiles only, except that a ladder nothing bounds takes everything.

        Args:
            available: ranked tokens, int64 ``[B]``, or ``[B, H_kv]`` with ``room``.
            lengths: real tokens of each row, ``[B]``.
            window: full-precision tokens of each row, ``[B]``.
            room: as in ``overflow``.

        Returns:
            a tensor like ``available`` for each tier.
        """
        left = torch.minimum(available, whole(self.packed_budget(lengths, window) if room is None else room, self.tile))
        taken = []
        for tier in self.tiers:
            take = torch.minimum(left, whole(_share(tokens_of(tier.capacity, lengths), room), self.tile))
            taken.append(take)
            left = left - take
        return taken

    def overflow(
        self, held: Tensor, index: int, above: Tensor, lengths: Tensor, window: Tensor, room: Tensor | None = None
    ) -> Tensor:
        """Tokens, a multiple of the tile, that tier ``index`` must give up.

        Args:
            held: tokens it holds, int64 ``[B, H_kv]``.
            index: which tier.
            above: tokens that finer tiers keep, ``[B, H_kv]``.
            lengths: real tokens of each row, ``[B]``.
            window: full-precision tokens of each row, ``[B]``.
            room: tokens that may stay packed, ``[B, H_kv]``; ``None`` for the budget in every head. Heads with more room
                have more of each tier.
        """
        capacity = _share(tokens_of(self.tiers[index].capacity, lengths), room)
        if room is None:
            capacity, room = capacity[:, None], self.packed_budget(lengths, window)[:, None]
        over = (held - torch.minimum(capacity, (room - above).clamp_min(0))).clamp_min(0)
        return torch.minimum(-(-over // self.tile) * self.tile, held)


def _share(capacity: Tensor, room: Tensor | None) -> Tensor:
    """A tier's capacity ``[B]`` dealt out to heads as ``room`` ``[B, H_kv]`` is, the sum over heads kept."""
    if room is None:
        return capacity
    each, heads = capacity[:, None], room.shape[1]
    dealt = each.clamp_max(UNBOUNDED // (room.sum() + 1) // heads) * room * heads // room.sum(1, True).clamp_min(1)
    return torch.where(each >= UNBOUNDED, each, dealt)


def tokens_of(capacity: Capacity, lengths: Tensor) -> Tensor:
    """A capacity as tokens, int64 like ``lengths``: a count, a fraction of the length, or "rest" (no bound)."""
    if capacity == "rest":
        return torch.full_like(lengths, UNBOUNDED)
    if isinstance(capacity, float):
        return (lengths.double() * capacity).floor().long()
    return torch.full_like(lengths, int(capacity))


def whole(tokens: Tensor, tile: int) -> Tensor:
    """``tokens`` rounded down to whole tiles; "no bound" stays it."""
    return torch.where(tokens >= UNBOUNDED, tokens, tokens // tile * tile)


def in_tiles(wanted: Tensor, held: Tensor, tile: int) -> Tensor:
    """Tokens ``wanted`` ``[B, H_kv]`` in whole tiles, their sum over heads kept to within a tile.

    Each head is rounded down or up, those with the largest remainders up; none gets more than it has, ``held``.
    """
    wanted = torch.minimum(wanted, held)
    sure = wanted // tile * tile
    spare = wanted.sum(1, True) // tile - sure.sum(1, True) // tile
    order = torch.argsort(wanted - sure, dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1)
    return torch.minimum(sure + tile * (rank < spare), held)


def lowest(scores: Tensor, live: Tensor, count: Tensor) -> Tensor:
    """bool like ``scores`` ``[B, H_kv, T]``: the ``count[b, h]`` live tokens of lowest score; ties go to the older."""
    ranked = scores.masked_fill(~live, torch.inf)
    rank = torch.argsort(torch.argsort(ranked, dim=-1, stable=True), dim=-1)
    return (rank < sent(count[..., None], scores.device)) & live


def describe(tiers: Sequence[Tier]) -> str:
    """Such as ``int4(K 4.50 V 4.50) rest``."""
    return " > ".join(
        f"{t.name}(K {t.keys.bits_per_element:.2f} V {t.values.bits_per_element:.2f}) {t.capacity}" for t in tiers
    )
