"""``kind = "dynamic"``: NTK-aware scaling that grows with what the model has read."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fade_rope.growing import GrowingRotary
from fade_rope.rotary import geometric


class DynamicRope(GrowingRotary):
    """Plain up to ``max_position_embeddings``; at length ``n`` beyond, the base grows by ``s ** (R / (R - 2))``.

    With ``s = factor * n / max_position_embeddings - (factor - 1)``.
    """

    kind: ClassVar[str] = "dynamic"

    @property
    def threshold(self) -> int:
        return self.spec.served_length()

    def scaling(self) -> float:
        self.spec.stretched_theta(self.spec.number("factor"))  # refuse a bad config now, not at the first long input
        return 1.0

    def extended(self, length: Tensor) -> Tensor:
        factor = self.spec.number("factor")
        stretch = factor * length.clamp(min=self.threshold) / self.threshold - (factor - 1)
        return geometric(self.spec.stretched_theta(stretch), self.spec.rotary_dim)
