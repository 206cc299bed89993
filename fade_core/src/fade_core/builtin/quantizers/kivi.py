"""``kind = "kivi"``: keys grouped along the tokens of a channel, values along the channels of a token."""

from __future__ import annotations

from math import gcd
from typing import ClassVar, Literal

from pydantic import field_validator

from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import ConfigError
from fade_core.interfaces import Quantizer, QuantizerConfig, QuantizerContext, Side
from fade_core.support.validation import Count

BITS = (2, 3, 4)


class KiviQuantizer(UniformQuantizer):
    """KIVI's codes (arXiv 2402.02750) as a packed format: asymmetric, an fp16 scale and minimum for each group.

    A few channels of the keys are large at every token, so ``group`` tokens of one channel share a scale; values have
    no such channels, so ``group`` channels of one token do. The paper's residual of full-precision tokens is
    ``recent_window`` here.

    Args:
        head_dim: channels ``D``.
        bits: 2, 3 or 4.
        side: "key" or "value".
        group: tokens of a key's channel, or channels of a value, that share a scale.
        tile: tokens a tile.

    Raises:
        ConfigError: if whole groups do not fill a tile (keys) or a token (values).
    """

    kind: ClassVar[str] = "kivi"

    def __init__(self, head_dim: int, bits: int = 4, side: Side = "key", group: int = 32, tile: int = 64) -> None:
        keys = side == "key"
        what, whole = ("the tokens of a tile", tile) if keys else ("the channels of a head", head_dim)
        if whole % group:
            fits = gcd(group, whole)
            larger = f", or tile = {group * -(-tile // group)}" if keys and group % 16 == 0 and group < 256 else ""
            raise ConfigError(f"groups of {group} do not fill {what}, {whole}; write group = {fits}{larger}")
        if keys:
            super().__init__(head_dim, bits, "channel", group, tile, "token")
        else:
            super().__init__(head_dim, bits, "token", group, tile, "channel")


class KiviConfig(QuantizerConfig):
    """``kind = "kivi"``: per-channel groups of tokens for keys, per-token groups of channels for values.

    Attributes:
        bits: 2, 3 or 4.
        group: elements that share a scale.
    """

    kind: Literal["kivi"] = "kivi"
    group: Count = 32

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        if bits not in BITS:
            raise ValueError(f"bits={bits} is not offered; choose one of {', '.join(map(str, BITS))}")
        return bits

    def build(self, context: QuantizerContext) -> Quantizer:
        try:
            return KiviQuantizer(context.head_dim, self.bits, context.side, self.group, context.tile)
        except ConfigError as error:
            raise ConfigError(f"{context.side} quantizer of layer {context.layer}: {error}") from error
