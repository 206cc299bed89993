"""``kind = "ntk"``: NTK-aware scaling with a fixed factor (HunYuan's ``alpha``)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fade_rope.rotary import Rotary, geometric


class NtkRope(Rotary):
    """The base grows to ``theta * factor ** (R / (R - 2))``: the slowest pair slows by ``factor``, the fastest not."""

    kind: ClassVar[str] = "ntk"

    def frequencies(self) -> Tensor:
        return geometric(self.spec.stretched_theta(self.spec.number("factor")), self.spec.rotary_dim)
