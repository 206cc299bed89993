"""Budgets in bytes, and budgets of single layers: what a policy's ``budget`` and ``schedule`` come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.interfaces import PolicyConfig, Quantizer, Tier
from fade_core.support.validation import bytes_of

_BOOK = 48
"""Bytes that a tile's entries in the tables take, a head."""

_GROWTH = 33 / 32
"""A pool of tiles grows by a 32nd more than it needs."""


def layer_budgets(policy: PolicyConfig, layers: int) -> list[int | float | None]:
    """The budget of each of ``layers``: tokens, a fraction of the context, or bytes if ``policy.budget`` is in bytes."""
    budget = policy.budget
    weights = [1.0] * layers if policy.schedule is None else policy.schedule.weights(layers)
    if budget is None:
        return [None] * layers
    if isinstance(budget, str):
        return [int(bytes_of(budget) * weight / layers) for weight in weights]
    if isinstance(budget, int):
        return [round(budget * weight) for weight in weights]
    return list(_capped([budget * weight for weight in weights]))


def _capped(shares: list[float]) -> list[float]:
    """``shares`` with none above 1; what is cut off goes to the others in proportion, so that their mean stays."""
    total, full = sum(shares), 0
    while full < len(shares) and max(shares) > 1:
        full = sum(share >= 1 for share in shares)
        rest = sum(share for share in shares if share < 1)
        stretch = (total - full) / rest if rest else 1.0
        shares = [1.0 if share >= 1 else share * stretch for share in shares]
    return shares


@dataclass(frozen=True)
class ByteBudget:
    """Bytes that one layer may hold, its rows having equal shares.

    Attributes:
        nbytes: of the layer, what all rows share (codebooks) taken off.
        fixed: bytes a row takes whatever is packed: buffers of sinks and window, statistics of queries.
        slots: tokens that those buffers hold.
        slot: bytes of each further full-precision token of a row.
        packed_token: bytes of a packed token of a row in each tier, all heads and metadata counted.
        reserve: tokens of the first tier for which room is kept: those that come between two rankings.
    """

    nbytes: int
    fixed: int
    slots: int
    slot: int
    packed_token: tuple[float, ...]
    reserve: int

    def packed(self, capacities: Sequence[Tensor], window: Tensor) -> Tensor:
        """Tokens that may stay packed, int64 ``[B]``, filling tiers of ``capacities`` (``[B]`` each) from the top.

        Args:
            capacities: tokens that each tier may hold.
            window: full-precision tokens of each row, ``[B]``.
        """
        beyond = (window - self.slots).clamp_min(0) * self.slot
        left = self.nbytes // max(len(window), 1) - self.fixed - self.reserve * self.packed_token[0] - beyond.double()
        total = torch.zeros_like(window)
        for cost, capacity in zip(self.packed_token, capacities, strict=True):
            take = torch.minimum((left.clamp_min(0) / cost).long(), capacity)
            left, total = left - take * cost, total + take
        return total

    def shortfall(self, rows: int) -> str:
        """What is wrong if ``rows`` rows always hold more than there is; empty if they do not."""
        if rows * self.fixed <= self.nbytes:
            return ""
        return (
            f"sinks and recent window of {rows} row{'s' * (rows > 1)} take {rows * self.fixed:,} bytes a layer, more than this "
            f"layer's share of policy.budget, {max(self.nbytes, 0):,}; take a larger budget, a smaller recent_window or "
            "fewer rows"
        )


@dataclass(frozen=True)
class LayerShape:
    """What decides how many bytes a token takes in a layer.

    Attributes:
        heads: KV heads.
        query_heads: query heads.
        head_dim: channels of a head.
        itemsize: bytes of a full-precision element.
        statistics: tracked statistics of a token.
        ranked: whether every packed token has its own position.
        query_statistics: names of the tracked statistics of the queries.
        shifted: whether survivors are re-positioned, which takes a number a token.
    """

    heads: int
    query_heads: int
    head_dim: int
    itemsize: int
    statistics: int
    ranked: bool
    query_statistics: tuple[str, ...]
    shifted: bool = False

    def budget(self, nbytes: int, tiers: Sequence[Tier], slots: int, every: int) -> ByteBudget:
        """``nbytes`` of a layer with these tiers, ``slots`` full-precision tokens and ``every`` steps between rankings."""
        tracked = 4 * self.statistics + 4 * self.shifted
        slot = self.heads * (2 * self.head_dim * self.itemsize + tracked) + 4
        queries = 0
        if self.query_statistics:
            channels = self.head_dim * (1 + self.head_dim * ("query_covariance" in self.query_statistics))
            queries = 4 * (1 + self.query_heads * channels)
        costs = []
        for tier in tiers:
            tile = self._tile_bytes(tier.keys) + self._tile_bytes(tier.values)
            extra = tracked + (4 if self.ranked else 0) + 1
            costs.append(self.heads * ((tile * _GROWTH + _BOOK) / tier.keys.tile + extra))
        shared = sum(quantizer.state_bytes() for tier in tiers for quantizer in (tier.keys, tier.values))
        tile = tiers[0].keys.tile
        reserve = (-(-every // tile) + 1) * tile  # tiles are whole, and one is ahead
        return ByteBudget(nbytes - shared, slots * slot + queries + 16, slots, slot, tuple(costs), reserve)

    def _tile_bytes(self, quantizer: Quantizer) -> int:
        """Bytes of a tile; what is kept raw has the model's own precision."""
        fields = quantizer.field_shapes().items()
        return sum(
            math.prod(shape) * (self.itemsize if name == "raw" else dtype.itemsize) for name, (shape, dtype) in fields
        )
