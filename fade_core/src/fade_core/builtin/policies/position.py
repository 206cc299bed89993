"""Keep the newest tokens (StreamingLLM, arXiv 2309.17453): the sinks that go with it are the core's."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class PositionPolicy(EvictionPolicy):
    """A token is worth its position: the oldest go first. Needs no attention statistics."""

    kind: ClassVar[str] = "position"
    rowwise: bool = True
    positional: bool = True

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()


class PositionConfig(PolicyConfig):
    """``kind = "position"``: oldest first."""

    kind: Literal["position"] = "position"

    def build(self) -> PositionPolicy:
        return PositionPolicy()
