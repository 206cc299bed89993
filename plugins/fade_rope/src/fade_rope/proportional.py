"""``kind = "proportional"``: partial rotation over the whole head, as Gemma 4's full-attention layers use it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_rope.rotary import Rotary, geometric


class ProportionalRope(Rotary):
    """The slow pairs stand still, but pairs and frequencies are those of the whole head.

    Other partial rotations cut the head first: their pairs lie within the rotated channels, and the frequencies are
    spread over those alone.
    """

    kind: ClassVar[str] = "proportional"

    def frequencies(self) -> Tensor:
        spec = self.spec
        share = spec.number("partial_rotary_factor", 1.0)
        turning = int(share * spec.head_dim // 2)
        moving = geometric(spec.theta, 2 * turning, spread=spec.head_dim)
        return torch.cat([moving, torch.zeros(spec.head_dim // 2 - turning)]) / spec.number("factor", 1.0)
