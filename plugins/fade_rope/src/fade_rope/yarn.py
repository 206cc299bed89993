"""``kind = "yarn"``: YaRN (arXiv 2309.00071), as gpt-oss and long Qwen models use it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fade_rope.rotary import Rotary


def magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention temperature for a context ``factor`` times longer."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class YarnRope(Rotary):
    """Interpolates pairs that turn rarely within the trained length, keeps those that turn often, blends between."""

    kind: ClassVar[str] = "yarn"

    @property
    def factor(self) -> float:
        """New over trained length; where the config gives no factor, ``max_position_embeddings`` over the latter."""
        return self.spec.optional("factor") or self.spec.served_length() / self.spec.trained_length()

    def frequencies(self) -> Tensor:
        spec, width = self.spec, self.spec.rotary_dim
        period = spec.theta ** (torch.arange(0, width, 2).float() / width)
        low, high = self._pair_turning(spec.number("beta_fast", 32)), self._pair_turning(spec.number("beta_slow", 1))
        if spec.parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = (torch.arange(width // 2).float() - low) / (high - low if high != low else 0.001)
        keep = 1 - ramp.clamp(0, 1)
        return 1.0 / (self.factor * period) * (1 - keep) + 1.0 / period * keep

    def scaling(self) -> float:
        spec = self.spec
        given, mscale, all_dim = (spec.parameters.get(n) for n in ("attention_factor", "mscale", "mscale_all_dim"))
        if given is not None:
            return spec.number("attention_factor")
        if mscale and all_dim:
            return magnitude(self.factor, mscale) / magnitude(self.factor, all_dim)
        return magnitude(self.factor)

    def _pair_turning(self, times: float) -> float:
        """The pair, a real number, that turns ``times`` times within the trained length."""
        ratio = self.spec.trained_length() / (times * 2 * math.pi)
        return (self.spec.rotary_dim * math.log(ratio)) / (2 * math.log(self.spec.theta))
