"""``kind = "rotated"``: an orthogonal rotation, then codes with one scale a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fade_core.errors import ConfigError
from fade_core.interfaces import PlainEncoding, Quantizer, QuantizerConfig, QuantizerContext, Side
from fade_core.packed import Packed, PackedFormat
from fade_quant_rotated.levels import Metadata, ScaleRule, TokenQuantizer, check_tokens, gaussian_format
from fade_quant_rotated.rotation import Rotation, RotationKind

Codes = Literal["auto", "uniform", "lloyd-max"]

BITS = (2, 3, 4, 8)


class RotatedQuantizer(Quantizer):
    """A rotation spreads outlier channels over the whole head; each token is then coded with a scale of its own.

    Attention never un-rotates the cache: the query is rotated once (``<q, k> = <R q, R k>``), the output un-rotated
    once. "lloyd-max" codes are TurboQuant's first stage (arXiv 2504.19874); values take an unbiased scale.

    Args:
        head_dim: channels ``D``, any positive number.
        bits: 2, 3, 4 or 8.
        side: "key" or "value": word order, and which scale Lloyd-Max codes take.
        rotation: "hadamard" or "orthogonal".
        seed: of the rotation.
        codes: "uniform" (asymmetric), "lloyd-max", or "auto": Lloyd-Max below 4 bits.
        group: channels that share a scale; 0 for the whole head.
        metadata: "fp16" (kernels read it) or "log8" (8 bits a group; Lloyd-Max only).
        tile: tokens a tile.
    """

    kind: ClassVar[str] = "rotated"
    moves_tokens = True

    def __init__(
        self,
        head_dim: int,
        bits: int = 4,
        side: Side = "key",
        rotation: RotationKind = "hadamard",
        seed: int = 0,
        codes: Codes = "auto",
        group: int = 0,
        metadata: Metadata = "fp16",
        tile: int = 64,
    ) -> None:
        self.head_dim, self.bits, self.tile = head_dim, bits, tile
        self.rotation = Rotation(head_dim, rotation, seed)
        layout: Literal["token", "channel"] = "token" if side == "key" else "channel"
        if codes == "uniform" or (codes == "auto" and bits >= 4 and metadata == "fp16"):
            packed = PackedFormat(bits=bits, head_dim=head_dim, tile=tile, axis="token", group=group, layout=layout)
        else:
            packed = gaussian_format(bits, head_dim, tile, group, layout)
        scale: ScaleRule = "norm" if side == "key" else "unbiased"
        self.codes = TokenQuantizer(packed, scale, metadata)
        self.format = self.codes.format

    @property
    def bits_per_element(self) -> float:
        return self.codes.bits_per_element

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.codes.field_shapes()

    def encode(self, x: Tensor) -> Packed:
        check_tokens(x, self.head_dim, f"quantizer {self.kind!r}")
        packed = self.codes.encode(self.rotation.forward(x.float()))
        return Packed(packed.fields, packed.length, x.dtype)

    def plain_encoding(self, device: torch.device) -> PlainEncoding | None:
        if self.format is None or self.format.levels is not None:
            return None
        return PlainEncoding(self.rotation.matrix(device), outward=False)

    def decode(self, packed: Packed) -> Tensor:
        rotated = self.codes.decode(Packed(packed.fields, packed.length, torch.float32))
        return self.rotation.inverse(rotated).to(packed.dtype)

    def select(self, packed: Packed, index: Tensor) -> Packed:
        return self.codes.select(packed, index)

    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        return self.codes.scores(self.transform_query(query), packed)

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        return self.rotation.inverse(self.codes.combine(weights, packed))

    def transform_query(self, query: Tensor) -> Tensor:
        return self.rotation.forward(query)

    def transform_output(self, output: Tensor, weight_sum: Tensor) -> Tensor:
        return self.rotation.inverse(output)

    def state_dict(self) -> dict[str, Tensor]:
        return self.rotation.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rotation.load_state_dict(state)


class RotatedConfig(QuantizerConfig):
    """``kind = "rotated"``: a rotation before per-token codes.

    Attributes:
        bits: 2, 3, 4 or 8.
        rotation: "hadamard" or "orthogonal".
        seed: of the rotation.
        codes: "uniform", "lloyd-max", or "auto": Lloyd-Max below 4 bits, where it is far better.
        group: channels that share a scale; 0 for the whole head.
        metadata: "fp16" (32 bits a group, read by kernels) or "log8" (8 bits a group, Lloyd-Max codes).
    """

    kind: Literal["rotated"] = "rotated"
    rotation: RotationKind = "hadamard"
    seed: int = 0
    codes: Codes = "auto"
    group: int = Field(default=0, ge=0)
    metadata: Metadata = "fp16"

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        if bits not in BITS:
            raise ValueError(f"bits={bits} is not offered; choose one of {', '.join(map(str, BITS))}")
        return bits

    def build(self, context: QuantizerContext) -> Quantizer:
        try:
            return RotatedQuantizer(
                context.head_dim,
                self.bits,
                context.side,
                self.rotation,
                self.seed,
                self.codes,
                self.group,
                self.metadata,
                context.tile,
            )
        except ConfigError as error:
            raise ConfigError(f"{context.side} quantizer of layer {context.layer}: {error}") from error
