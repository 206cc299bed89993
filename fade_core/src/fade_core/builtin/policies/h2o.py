"""Keep the heavy hitters (H2O, arXiv 2306.14048): the tokens that received the most attention so far."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class H2OPolicy(EvictionPolicy):
    """A token is worth the attention it accumulated.

    Args:
        normalised: divide by the number of queries that could attend to the token. The plain sum of the paper favours
            old tokens, which more queries have seen.
    """

    kind: ClassVar[str] = "h2o"
    rowwise: bool = True
    statistics: tuple[str, ...] = ("mass", "seen")

    def __init__(self, normalised: bool = True) -> None:
        self.normalised = normalised

    def score(self, view: LayerView) -> Tensor:
        mass = view.statistic("mass")
        return mass / view.statistic("seen").clamp(min=1) if self.normalised else mass


class H2OConfig(PolicyConfig):
    """``kind = "h2o"``: least attended first.

    Attributes:
        normalised: attention a query that could see the token (the default) instead of the sum.
    """

    kind: Literal["h2o"] = "h2o"
    normalised: bool = True

    def build(self) -> H2OPolicy:
        return H2OPolicy(self.normalised)
