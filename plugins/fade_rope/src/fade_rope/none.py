"""``kind = "none"``: keys that carry no position (ALiBi, learned or no positions)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fade_core.interfaces import RopeScheme


class NoRope(RopeScheme):
    """Leaves everything as it is, exactly: each method returns its argument.

    For ALiBi (a bias on the scores), learned and sinusoidal positions (added to the embeddings), and the layers that
    some models leave without positions.
    """

    kind: ClassVar[str] = "none"

    def __repr__(self) -> str:
        return "NoRope()"

    def rotate(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """``x`` itself."""
        return x

    def unrotate(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """``x`` itself."""
        return x

    def shift(
        self,
        x: Tensor,
        offset: Tensor | int,
        positions: Tensor | int | None = None,
        length: Tensor | int | None = None,
    ) -> Tensor:
        """``x`` itself."""
        return x
