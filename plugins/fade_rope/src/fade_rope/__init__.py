"""RoPE schemes for FADE: rotate, un-rotate and shift keys as functions of position."""

from __future__ import annotations

from fade_rope.none import NoRope
from fade_rope.schemes import scheme_from_config
from fade_rope.verification import verify

__all__ = ["NoRope", "scheme_from_config", "verify"]
