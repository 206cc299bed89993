"""Heavy hitters by mean attention over the whole prompt (H2O, arXiv 2306.14048, normalised by age).

Statistics: "mass" and "seen", of every query of the prompt.
Cost: 8 bytes a token and head; the attention logits of the whole prompt a second time at prefill. The core's ``h2o`` sees
the observation window alone, which costs a fraction of that.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class NormalisedH2OPolicy(EvictionPolicy):
    """A token is worth the attention it received from a query that could see it, on average over all queries."""

    kind: ClassVar[str] = "normalised_h2o"
    rowwise: bool = True
    statistics: tuple[str, ...] = ("mass", "seen")
    observes: int | Literal["all"] | None = "all"

    def score(self, view: LayerView) -> Tensor:
        return view.statistic("mass") / view.statistic("seen").clamp(min=1)


class NormalisedH2OConfig(PolicyConfig):
    """``kind = "normalised_h2o"``: least attended first, over every query of the prompt."""

    kind: Literal["normalised_h2o"] = "normalised_h2o"

    def build(self) -> NormalisedH2OPolicy:
        return NormalisedH2OPolicy()
