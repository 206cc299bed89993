"""What a layer holds: its tokens, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.eviction.ladder import whole
from fade_core.eviction.plan import EvictionPlan
from fade_core.eviction.query_moments import QueryMoments
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window


@dataclass(eq=False)
class LayerContents:
    """The tokens of one layer: whoever moves them here moves them in the layer.

    Attributes:
        plan: who may stay, and who decides.
        window: the full-precision tokens.
        stores: the packed tokens, finest tier first.
        queries: statistics of the queries, if any are kept.
        padding: columns of padding before each row's first token, int64 ``[B]`` on the CPU.
        ranked_at: logical length at which each row was last ranked, int64 ``[B]`` on the CPU.
        logical: tokens the model has seen.
        contiguous: whether each row's window, its sinks aside, is a run of positions up to the newest: the host then knows
            them all. Only tokens that were moved by hand leave gaps.
    """

    plan: EvictionPlan
    window: Window
    stores: tuple[TierStore, ...]
    queries: QueryMoments | None
    padding: Tensor
    ranked_at: Tensor
    logical: int = 0
    contiguous: bool = True

    @property
    def rows(self) -> int:
        """Rows ``B``."""
        return len(self.padding)

    @property
    def heads(self) -> int:
        """KV heads ``H_kv``."""
        return self.window.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where tokens live."""
        return self.window.keys.device

    @property
    def lengths(self) -> Tensor:
        """Real tokens each row has seen, int64 ``[B]`` on the CPU: the logical length less leading padding."""
        return self.logical - self.padding

    @property
    def everything(self) -> list[Any]:
        """The window and all stores, whether they hold tokens or not."""
        return [self.window, *self.stores]

    @property
    def packed(self) -> list[TierStore]:
        """The stores that hold tokens."""
        return [store for store in self.stores if store.tiles]

    @property
    def parts(self) -> list[TierStore | Window]:
        """What holds tokens: stores, then the window."""
        return [*self.packed, *([self.window] if self.window.longest else [])]

    @property
    def encoded(self) -> int:
        """Tokens of the tiles of the first tier, whole or not, over all rows and heads."""
        return sum(int(store.table.used.host.sum()) * store.tile for store in self.stores[:1])

    def statistics(self) -> list[dict[str, Tensor]]:
        """Statistics of each part's tokens, float32 ``[B, H_kv, longest]`` a name: views, updated in place."""
        return [part.statistics for part in self.parts]

    def due(self, lengths: Tensor) -> Tensor:
        """Tokens that rows of ``lengths`` full-precision tokens send down, int64 ``[B]``, whole tiles."""
        ladder = self.plan.ladder
        if not ladder.tiers:
            return torch.zeros_like(lengths)
        return whole((lengths - ladder.n_sink - ladder.recent_window).clamp_min(0), ladder.tile)

    def tier_map(self) -> Tensor:
        """int64 ``[B, H_kv, logical]``: 0 full precision, ``i`` the ladder's ``i``-th tier, -1 nowhere."""
        shape = (self.rows, self.heads, self.logical + 1)
        where = torch.full(shape, -1, dtype=torch.long, device=self.device)
        for level, part in enumerate(self.everything):
            index = part.live_positions().expand(-1, self.heads, -1)
            where.scatter_(2, index.where(index >= 0, torch.full_like(index, self.logical)), level)
        return where[..., : self.logical]

    # --- what happens to all of it ---
    def crop(self, end: int) -> None:
        """Forget every token at position ``end`` or later."""
        for part in self.everything:
            part.crop(end)
        self.ranked_at = self.ranked_at + end - self.logical  # what came since is counted, not where
        self.logical, self.padding = end, self.padding.clamp_max(end)

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        for part in (*self.everything, *([] if self.queries is None else [self.queries])):
            part.select_rows(index)
        self.padding, self.ranked_at = self.padding[index.cpu()], self.ranked_at[index.cpu()]

    def shift(self, by: int) -> None:
        """Every row has ``by`` more columns of padding on its left (fewer, if negative); keys stay as they are."""
        for part in self.everything:
            part.shift(by)
        self.logical += by
        self.padding, self.ranked_at = self.padding + by, self.ranked_at + by

    def join(self, other: LayerContents) -> None:
        """Put copies of the rows of ``other``, of an equal layer and logical length, behind one's own."""
        self.window.join(other.window)
        for here, there in zip(self.stores, other.stores, strict=True):
            here.join(there)
        if self.queries is not None and other.queries is not None:
            self.queries.join(other.queries, (self.rows, other.rows))
        self.padding = torch.cat([self.padding, other.padding])
        self.ranked_at = torch.cat([self.ranked_at, other.ranked_at])
        self.contiguous = self.contiguous and other.contiguous

    def look_for_gaps(self) -> None:
        """Read the window's positions back, to say whether it is ``contiguous``."""
        slots, lengths = torch.arange(self.window.longest), self.window.lengths[:, None]
        behind = (slots >= self.plan.ladder.n_sink) & (slots < lengths)
        run = self.logical - lengths + slots
        self.contiguous = torch.equal(self.window.live_positions()[:, 0].cpu()[behind], run[behind])

    # --- a pass ---
    def drop_newest(self, logical: int) -> None:
        """Forget what a step has brought since the length was ``logical``."""
        self.window.set_lengths((self.window.lengths - (self.logical - logical)).clamp_min(0))
        self.logical = logical

    def snapshot(self, step: bool, logical: int) -> Callable[[], None]:
        """What takes a pass back: called, it makes everything as it was before.

        Args:
            step: the pass takes its tokens straight into the window: then only they are dropped again, since a tile that it
                encodes holds the same tokens.
            logical: tokens that the model had seen before the pass.
        """
        facts = {name: getattr(self, name) for name in ("padding", "ranked_at", "contiguous")} | {"logical": logical}
        queries = {} if self.queries is None else {name: t.clone() for name, t in self.queries.tensors().items()}
        tracked = self.statistics() if step and self.plan.tracker.active else []
        noted = [(t, t.clone()) for held in tracked for t in held.values()]
        parts = [] if step else [part.snapshot() for part in self.everything]

        def restore() -> None:
            if step:
                self.drop_newest(logical)
            for held, was in noted:
                held.copy_(was)
            for part in parts:
                part()
            if self.queries is not None:
                self.queries.restore(queries)
            vars(self).update(facts)

        return restore
