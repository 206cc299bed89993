"""The tiers that the core brings: where a token lives and at what precision."""

from __future__ import annotations

from typing import ClassVar, Literal

from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.interfaces import QuantizerConfig, TierConfig
from fade_core.plugins.resolve import AnyQuantizer


def width_name(keys: QuantizerConfig, values: QuantizerConfig) -> str:
    """``int4`` where both sides have 4 bits, ``fp16`` where both have 16, ``k4v2`` where they differ."""
    key, value = _width(keys.bits, keys.kind), _width(values.bits, values.kind)
    if key != value:
        return f"k{key}v{value}"
    if key == "16":
        return "fp16"
    return f"int{key}" if key.isdecimal() else key


def _width(bits: float | None, kind: str) -> str:
    """A width as text; the kind for a quantizer that knows its width only when it is built."""
    return kind if bits is None else f"{bits:g}"


class FullTier(TierConfig):
    """``tier = "fp16"``: full precision, in the model's dtype."""

    tier: Literal["fp16"] = "fp16"

    def quantizers(self, keys: QuantizerConfig, values: QuantizerConfig) -> tuple[QuantizerConfig, QuantizerConfig]:
        return UniformConfig(bits=16), UniformConfig(bits=16)


class QuantizedTier(TierConfig):
    """Base of the tiers made of the configuration's quantizers.

    Attributes:
        keys: quantizer of this rung's keys, instead of the configuration's.
        values: quantizer of this rung's values, instead of the configuration's.
    """

    width: ClassVar[int | None] = None
    """Bits of both sides, unless the rung names its own quantizers; ``None`` leaves them as configured."""

    keys: AnyQuantizer | None = None
    values: AnyQuantizer | None = None

    def label(self, keys: QuantizerConfig, values: QuantizerConfig) -> str:
        return width_name(keys, values)

    def quantizers(self, keys: QuantizerConfig, values: QuantizerConfig) -> tuple[QuantizerConfig, QuantizerConfig]:
        return self.keys or self._at_width(keys), self.values or self._at_width(values)

    def _at_width(self, quantizer: QuantizerConfig) -> QuantizerConfig:
        return quantizer if self.width is None else quantizer.with_bits(self.width)


class PackedTier(QuantizedTier):
    """``tier = "packed"``: the configuration's ``keys`` and ``values`` as they are; the only rung by default."""

    tier: Literal["packed"] = "packed"


class Int4Tier(QuantizedTier):
    """``tier = "int4"``: keys and values at 4 bits, unless the rung names its own quantizers."""

    width: ClassVar[int | None] = 4
    tier: Literal["int4"] = "int4"


class Int2Tier(QuantizedTier):
    """``tier = "int2"``: keys and values at 2 bits, unless the rung names its own quantizers."""

    width: ClassVar[int | None] = 2
    tier: Literal["int2"] = "int2"


class EvictedTier(TierConfig):
    """``tier = "evicted"``: tokens that reach it are gone. May only end a ladder; a bounded last rung implies it."""

    tier: Literal["evicted"] = "evicted"
    capacity: Literal["rest"] = "rest"

    def quantizers(self, keys: QuantizerConfig, values: QuantizerConfig) -> None:
        return None
