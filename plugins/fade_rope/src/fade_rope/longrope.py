"""``kind = "longrope"`` (also "su"): LongRoPE (arXiv 2402.13753), as Phi-3 and Phi-4 use it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fade_core.errors import ConfigError
from fade_rope.growing import GrowingRotary
from fade_rope.spec import RopeSpec


class LongRope(GrowingRotary):
    """A searched divisor for each pair: ``short_factor`` up to the trained length, ``long_factor`` beyond."""

    kind: ClassVar[str] = "longrope"

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__(spec)
        self._long = {self.inv_freq.device: self._divided("long_factor", self.inv_freq.device)}

    @property
    def threshold(self) -> int:
        return self.spec.trained_length()

    def frequencies(self) -> Tensor:
        return self._divided("short_factor", torch.device("cpu"))

    def extended(self, length: Tensor) -> Tensor:
        if length.device not in self._long:  # where the models compute theirs, for the last bits
            self._long[length.device] = self._divided("long_factor", length.device)
        return self._long[length.device]

    def scaling(self) -> float:
        given = self.spec.optional("attention_factor")
        if given is not None:
            return given
        trained = self.spec.trained_length()
        factor = self.spec.optional("factor") or self.spec.served_length() / trained
        return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0

    def _divided(self, name: str, device: torch.device) -> Tensor:
        spec, width = self.spec, self.spec.rotary_dim
        exponent = torch.arange(0, width, 2, device=device).float() / width
        divisors = spec.parameters.get(name)
        if not isinstance(divisors, list | tuple) or len(divisors) != len(exponent):
            found = f"{len(divisors)} of them" if isinstance(divisors, list | tuple) else repr(divisors)
            raise ConfigError(
                f"RoPE {self.kind!r}: {name} must be {len(exponent)} numbers, one a pair of the {width} rotated "
                f"channels; found {found}"
            )
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device=device) * spec.theta**exponent)
