"""``kind = "llama3"``: the scaling of Llama 3.1 (arXiv 2407.21783)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fade_rope.rotary import Rotary


class Llama3Rope(Rotary):
    """Long wavelengths are divided by ``factor``, short ones kept, those between blended."""

    kind: ClassVar[str] = "llama3"

    def frequencies(self) -> Tensor:
        spec, plain = self.spec, super().frequencies()
        factor, trained = spec.number("factor"), spec.trained_length()
        low, high = spec.number("low_freq_factor"), spec.number("high_freq_factor")
        wavelength = 2 * math.pi / plain
        weight = (trained / wavelength - low) / (high - low)
        blended = (1 - weight) * plain / factor + weight * plain
        stretched = torch.where(wavelength > trained / low, plain / factor, blended)
        return torch.where(wavelength < trained / high, plain, stretched)
