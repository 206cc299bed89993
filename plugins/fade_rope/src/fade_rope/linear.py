"""``kind = "linear"``: position interpolation (arXiv 2306.15595)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fade_rope.rotary import Rotary


class LinearRope(Rotary):
    """All frequencies divided by ``factor``."""

    kind: ClassVar[str] = "linear"

    def frequencies(self) -> Tensor:
        return super().frequencies() / self.spec.number("factor")
