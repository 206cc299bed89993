"""What ranking needs to know of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from fade_core.eviction.attention_tracker import AttentionTracker
from fade_core.eviction.ladder import Ladder
from fade_core.interfaces import EvictionPolicy


@dataclass
class EvictionPlan:
    """Who may stay in a layer, and who decides.

    Attributes:
        index: layer index.
        num_layers: layers of the model.
        ladder: tiers, capacities, budget, sinks and window.
        policy: ranks tokens when something is bounded.
        every: decode steps between two rankings.
        tracker: attention statistics, shared by all layers.
    """

    index: int
    num_layers: int
    ladder: Ladder
    policy: EvictionPolicy
    every: int = 64
    tracker: AttentionTracker = field(default_factory=lambda: AttentionTracker(()))

    @property
    def allocates(self) -> bool:
        """Whether the policy gives heads budgets of their own."""
        return self.ladder.budget is not None and type(self.policy).allocate is not EvictionPolicy.allocate
