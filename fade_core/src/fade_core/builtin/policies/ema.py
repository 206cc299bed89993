"""Keep what was attended to lately: an exponential moving average of each token's attention."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class EmaPolicy(EvictionPolicy):
    """A token is worth its decayed attention: ``ema = decay * ema + attention`` at every query.

    Attributes:
        decay: what the tracker multiplies the statistic "ema" by at each query; half-life ``log(0.5) / log(decay)``.
    """

    kind: ClassVar[str] = "ema"
    rowwise: bool = True
    statistics: tuple[str, ...] = ("ema",)

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay

    def score(self, view: LayerView) -> Tensor:
        return view.statistic("ema")


class EmaConfig(PolicyConfig):
    """``kind = "ema"``: least attended of late first.

    Attributes:
        decay: weight that yesterday's attention keeps at each query, above 0 and below 1.
    """

    kind: Literal["ema"] = "ema"
    decay: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.99

    def build(self) -> EmaPolicy:
        return EmaPolicy(self.decay)
