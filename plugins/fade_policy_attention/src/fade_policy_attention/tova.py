"""What the newest query looks at (TOVA, arXiv 2401.06104).

Statistic: "last", the attention of the newest query.
Cost: 4 bytes a token and head; attention logits of one query at prefill, of every query at decode.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig
from fade_policy_attention.slots import mean_over_heads


class TovaPolicy(EvictionPolicy):
    """A token is worth the newest query's attention, averaged over the layer's heads: all of them keep the same tokens.

    The paper drops one token at every step; that is ``every = 1`` with ``tile`` the smallest step there is. Rankings
    further apart drop several, by the query of that moment.
    """

    kind: ClassVar[str] = "tova"
    rowwise: bool = True
    statistics: tuple[str, ...] = ("last",)
    observes: int | Literal["all"] | None = 1

    def score(self, view: LayerView) -> Tensor:
        return mean_over_heads(view.statistic("last"), view.positions)


class TovaConfig(PolicyConfig):
    """``kind = "tova"``: least attended by the newest query first, the same for all heads of a layer."""

    kind: Literal["tova"] = "tova"

    def build(self) -> TovaPolicy:
        return TovaPolicy()
