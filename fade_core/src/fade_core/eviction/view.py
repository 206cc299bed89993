"""What a layer holds at one moment, for whoever ranks its tokens or moves them by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.eviction.plan import EvictionPlan
from fade_core.eviction.query_moments import QueryMoments
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window


@dataclass(frozen=True)
class Contents:
    """A layer's tokens, by reference: whoever moves them here moves them in the layer.

    Attributes:
        plan: who may stay, and who decides.
        window: the full-precision tokens.
        stores: the packed tokens, finest tier first.
        logical: tokens the model has seen.
        lengths: real tokens each row has seen, int64 ``[B]`` on the CPU.
        queries: statistics of the queries, if any are kept.
    """

    plan: EvictionPlan
    window: Window
    stores: tuple[TierStore, ...]
    logical: int
    lengths: Tensor
    queries: QueryMoments | None

    @property
    def index(self) -> int:
        """Layer index."""
        return self.plan.index

    @property
    def rows(self) -> int:
        """Rows ``B``."""
        return len(self.lengths)

    @property
    def heads(self) -> int:
        """KV heads ``H_kv``."""
        return self.window.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where tokens live."""
        return self.window.keys.device

    def query_statistics(self) -> dict[str, Tensor]:
        """By name; empty if none are kept."""
        return {} if self.queries is None else self.queries.statistics()
