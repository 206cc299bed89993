"""``kind = "default"``: RoFormer's embedding as it is (arXiv 2104.09864), whole or partial."""

from __future__ import annotations

from typing import ClassVar

from fade_rope.rotary import Rotary


class DefaultRope(Rotary):
    """Frequencies ``theta ** (-2i / rotary_dim)``."""

    kind: ClassVar[str] = "default"
