"""Budgets of their own for heads (AdaKV, arXiv 2407.11550), around any policy.

Statistics: those of the policy inside.
Cost: one sort of a layer's scores at every ranking; heads of unequal length.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fade_core import AnyPolicy
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig
from fade_policy_attention.snapkv import SnapKVConfig


class AdaKVPolicy(EvictionPolicy):
    """Scores as another policy does, and lets all heads of a layer compete for one budget.

    That favours heads whose attention is spread: their tokens are worth more than the same rank is worth to a head that
    looks at few. It takes scores of different heads to be comparable, which shares of attention are.

    Args:
        base: the policy that scores.
        floor: share of an equal split that every head keeps whatever the others have, 0 to 1.
    """

    kind: ClassVar[str] = "adakv"

    def __init__(self, base: EvictionPolicy, floor: float = 0.2) -> None:
        self.base, self.floor = base, floor
        self.statistics, self.observes, self.decay = base.statistics, base.observes, base.decay

    def score(self, view: LayerView) -> Tensor:
        return self.base.score(view)

    def prefill(self, *args: Any, **options: Any) -> Any:
        return self.base.prefill(*args, **options)

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """The best ``H_kv * budget`` tokens of each row, counted by head, after each head's floor has been served."""
        held = (scores > -torch.inf).sum(-1)
        sure = torch.minimum((budget * self.floor).long()[:, None], held)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        first = scores.masked_fill(rank < sure[..., None], torch.inf).flatten(1)
        place = first.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        chosen = (place < (budget * scores.shape[1])[:, None]).view(scores.shape) & (scores > -torch.inf)
        counts: Tensor = chosen.sum(-1)
        return counts


class AdaKVConfig(PolicyConfig):
    """``kind = "adakv"``: as ``base`` ranks, heads sharing one budget.

    Attributes:
        floor: share of an equal split that every head keeps.
        base: the policy that scores; ``budget`` and ``every`` are written here, not there.
    """

    kind: Literal["adakv"] = "adakv"
    floor: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.2
    base: AnyPolicy = SnapKVConfig()

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        usual = PolicyConfig.model_fields["every"].default
        for name, found, allowed in (
            ("budget", self.base.budget, (None,)),
            ("every", self.base.every, (usual, self.every)),
        ):
            if found not in allowed:
                raise ValueError(f"base.{name}={found} has no effect; write {name} beside base, not in it")
        return self

    def check_model(self, model: Any) -> None:
        self.base.check_model(model)

    def build(self) -> AdaKVPolicy:
        return AdaKVPolicy(self.base.build(), self.floor)
