"""What a layer of the cache is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fade_core.cache.masks import MaskReader
from fade_core.eviction.byte_budget import ByteBudget
from fade_core.eviction.ladder import tokens_of
from fade_core.eviction.plan import EvictionPlan
from fade_core.interfaces import Event, Kernel, Quantizer, RopeScheme
from fade_core.ops.buffers import MOST_TOKENS, AppendRule
from fade_core.ops.reference import TorchAppend, TorchAttentionMass, TorchDecodeAttention
from fade_core.ops.step import StepPlan
from fade_core.storage.codec import Codec
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window
from fade_core.support.checks import FiniteCheck

REJECTABLE = 64
"""Newest tokens of a chunk that stay in full precision until ``crop`` while past states are recorded."""


@dataclass
class LayerPlan(EvictionPlan):
    """What a layer is made of; built once by the cache.

    Attributes:
        attention: "fade" if FADE's attention function drives the layer, "stock" if any other does.
        on_nonfinite: "raise" or "zero".
        kernel: implementation of ``decode_attention``.
        mass_kernel: implementation of ``attention_mass``, for kernels that give no probabilities.
        append: implementation of ``append``.
        codec: how prompts are packed and tiers unpacked.
        emit: where events go.
        rope: rotary embedding by which survivors of an eviction are read at contiguous positions; ``None`` where they keep
            theirs, or carry none.
        turns: tells quantizers that learn how keys carry their positions; ``None`` if that is not known. Made anew each time:
            the cache holds nothing of it.
        finite: refuses what is not finite; shared by the layers of a cache.
        compatibility: what the quantizers were made from, written out; layers that agree in it share compiled steps.
        query_heads: query heads of the model.
        masks: reads the masks of passes; shared by the layers of a cache.
        told: op and reason of the "fallback" events that were sent.
    """

    attention: str = "fade"
    on_nonfinite: str = "raise"
    kernel: Kernel = field(default_factory=TorchDecodeAttention)
    mass_kernel: Kernel = field(default_factory=TorchAttentionMass)
    append: Kernel = field(default_factory=TorchAppend)
    codec: Codec = field(default_factory=Codec)
    emit: Callable[[Event], None] = lambda event: None
    rope: RopeScheme | None = None
    turns: Callable[[], RopeScheme | None] = lambda: None
    finite: FiniteCheck = field(default_factory=FiniteCheck)
    compatibility: str = ""
    query_heads: int = 0
    masks: MaskReader = field(default_factory=MaskReader)
    told: set[tuple[str, str]] = field(default_factory=set)

    @property
    def ranked(self) -> bool:
        """Whether heads keep tokens of their own, each with its position."""
        return self.ladder.bounded and not self.policy.positional

    @property
    def shifted(self) -> bool:
        """Whether tokens carry how far they are moved when they are read."""
        return self.rope is not None

    @property
    def heard(self) -> bool:
        """Whether anybody hears of events: what they tell costs as much as a small ranking to find out."""
        return bool(getattr(self.emit, "sinks", True))

    @cached_property
    def observes(self) -> bool:
        """Whether attention leaves statistics behind."""
        return self.ladder.bounded and (self.tracker.active or bool(self.tracker.query_statistics))

    @cached_property
    def learners(self) -> list[Quantizer]:
        """The quantizers that learn from a prompt."""
        return [q for tier in self.ladder.tiers for q in (tier.keys, tier.values) if q.learns]

    def emit_once(self, detail: dict[str, str]) -> None:
        """Send a "fallback" event, once an op and reason."""
        if (detail["op"], detail["reason"]) not in self.told:
            self.told.add((detail["op"], detail["reason"]))
            self.emit(Event("fallback", self.index, detail=detail))

    def step(self) -> StepPlan:
        """What the layer's steps have in common, without a name."""
        ladder = self.ladder
        threshold = ladder.threshold if ladder.tiers else NEVER
        rule = AppendRule(
            ladder.tiers[0] if ladder.tiers else None, ladder.n_sink, threshold, self.on_nonfinite, self.index
        )
        return StepPlan("", rule, ladder.tiers, self.append, self.kernel, self.mass_kernel, self.tracker, self.rope)

    def allocate(self, keys: Tensor, values: Tensor, slots: int) -> tuple[Window, *tuple[TierStore, ...]]:
        """An empty window and empty stores for tokens like these, ``[B, H_kv, T, D]``.

        Args:
            keys: give rows, heads, channels, dtype and device.
            values: likewise.
            slots: tokens that buffers are made for, so that they stay where they are; 0 for buffers that grow.
        """
        ladder, (batch, heads, _, dim) = self.ladder, keys.shape
        statistics = self.tracker.statistics if ladder.bounded else ()
        spare = 0 if ladder.bounded else max(REJECTABLE, MOST_TOKENS)  # a cache that evicts is there to be small
        floor = ladder.threshold + spare if slots else 0
        layout = TokenLayout(heads, keys.dtype, keys.device, statistics, self.shifted)
        window = Window(batch, dim, values.shape[3], floor, layout, floor)
        most = max(1, slots // ladder.tile) if slots and self.allocates else 0
        stores = (
            TierStore(tier, batch, layout, self.ranked, self.codec, fixed, most)
            for tier, fixed in zip(ladder.tiers, self.room(slots, max(1, batch)), strict=True)
        )
        return window, *stores

    def room(self, slots: int, rows: int) -> list[int]:
        """Tiles of each tier that a row and head needs on average, for ``slots`` tokens in each of ``rows``.

        Those are of what is kept, and of what comes before a ranking. A budget in bytes has both in it. A tier after the
        first needs room for what finer ones leave of the budget, and for what is demoted at a ranking.
        """
        ladder, tile = self.ladder, self.ladder.tile
        if not slots:
            return [0 for _ in ladder.tiers]
        window = ladder.n_sink + ladder.recent_window
        most = max(1, -(-(slots - window) // tile))
        if not ladder.bounded:
            return [most for _ in ladder.tiers]
        lengths = torch.full((rows,), slots)
        left = int(ladder.packed_budget(lengths, torch.full((rows,), window)).max())
        in_bytes, tiles = isinstance(ladder.budget, ByteBudget), []
        for tier in ladder.tiers:
            kept = min(left, int(tokens_of(tier.capacity, lengths).max()))
            if in_bytes:
                tiles.append(min(most, kept // tile - (-self.every // tile)))
                continue
            tiles.append(min(most, -(-kept // tile) - (-(self.every + MOST_TOKENS) // tile)))
            left -= max(0, kept - tile)  # what is over capacity goes in whole tiles: up to one less stays
        return tiles


NEVER = 1 << 30
"""A threshold that no window reaches."""
