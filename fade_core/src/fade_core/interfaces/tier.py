"""Rungs of the ladder."""

from __future__ import annotations

from dataclasses import dataclass

from fade_core.interfaces.component import ComponentConfig
from fade_core.interfaces.quantizer import Quantizer, QuantizerConfig
from fade_core.support.validation import Capacity


class TierConfig(ComponentConfig):
    """One rung of the ladder. Subclasses set ``tier: Literal["name"] = "name"``.

    Attributes:
        tier: literal name.
        capacity: tokens (int), a fraction of the context (float), or "rest".
    """

    tier: str
    capacity: Capacity = "rest"

    def label(self, keys: QuantizerConfig, values: QuantizerConfig) -> str:
        """What reports call this rung, given the quantizers that ``quantizers`` answered."""
        return self.tier

    def quantizers(
        self, keys: QuantizerConfig, values: QuantizerConfig
    ) -> tuple[QuantizerConfig, QuantizerConfig] | None:
        """Quantizers of this tier given the configuration's ``keys`` and ``values``; ``None`` evicts."""
        raise NotImplementedError(f"{type(self).__name__} must define quantizers(keys, values)")


@dataclass(frozen=True)
class Tier:
    """A rung of one layer's ladder, ready to hold tokens: name, capacity and its two quantizers."""

    name: str
    capacity: Capacity
    keys: Quantizer
    values: Quantizer
