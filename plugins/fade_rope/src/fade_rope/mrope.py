"""``kind = "mrope"``: multimodal RoPE (Qwen2-VL, arXiv 2409.12191): time, height and width each turn some pairs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import RopeScheme
from fade_rope.rotary import Rotary, newest
from fade_rope.shapes import check_heads
from fade_rope.spec import RopeSpec


class MRope(RopeScheme):
    """A rotary embedding whose pairs read one of three positions.

    A text token has the same position on all three axes, and positions are then given as for any other scheme. An
    image or video token has three: give ``[3, B, H, T]`` (``H`` may be 1). ``shift`` moves all axes alike, which is
    what moving a cached token means.

    Attributes:
        inner: the embedding that turns, with any scaling.
        axis: int64 ``[P]``, the axis that each pair reads.
    """

    kind: ClassVar[str] = "mrope"

    def __init__(self, inner: Rotary, axes: tuple[int, ...]) -> None:
        if len(axes) != inner.rotary_dim // 2 or not set(axes) <= {0, 1, 2}:
            raise ConfigError(
                f"mrope_section divides {len(axes)} frequencies among three axes; {inner!r} has {inner.rotary_dim // 2}"
            )
        self.inner = inner
        self.axis = torch.tensor(axes)

    def __repr__(self) -> str:
        return f"MRope({self.inner!r}, frequencies a axis={self.axis.bincount(minlength=3).tolist()})"

    @property
    def spec(self) -> RopeSpec:
        """What it was built from."""
        return self.inner.spec

    @property
    def attention_scaling(self) -> float:
        """Factor on rotated keys and queries."""
        return self.inner.attention_scaling

    @property
    def fixed_until(self) -> int | None:
        """That of the inner embedding."""
        return self.inner.fixed_until

    def rotate(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """As ``Rotary.rotate``; ``positions`` may also be ``[3, B, H, T]``."""
        return self._by_axis(x, positions, length, 1.0)

    def unrotate(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """Undo ``rotate``. Arguments as there."""
        return self._by_axis(x, positions, length, -1.0)

    def shift(
        self,
        x: Tensor,
        offset: Tensor | int,
        positions: Tensor | int | None = None,
        length: Tensor | int | None = None,
    ) -> Tensor:
        """As ``Rotary.shift``, the same offset on all axes; ``positions`` of text tokens only."""
        return self.inner.shift(x, offset, positions, length)

    def _by_axis(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None, sign: float) -> Tensor:
        inner = self.inner
        if not isinstance(positions, Tensor) or positions.dim() < 4:
            return inner.rotate(x, positions, length) if sign > 0 else inner.unrotate(x, positions, length)
        check_heads(x, inner.head_dim)
        if positions.dim() != 4 or positions.shape[0] != 3:
            raise InputError(f"positions have shape {tuple(positions.shape)}; give [3, B, H, T] for three axes")
        length = newest(positions) if length is None else length
        angles = torch.stack([inner.angles(x, at, length) for at in positions])  # [3, b, h, t, P]
        axis = self.axis.to(x.device).expand(1, *angles.shape[1:])
        angle = angles.gather(0, axis).squeeze(0)
        return inner.turn_by(x, angle) if sign > 0 else inner.turn_back(x, angle)
