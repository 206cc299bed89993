"""Asymmetric uniform quantization: per-token groups, or per-channel groups as KIVI uses for keys."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fade_core.builtin.quantizers.full import FullQuantizer
from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import PlainEncoding, Quantizer, QuantizerConfig, QuantizerContext
from fade_core.packed import (
    Axis,
    Layout,
    Packed,
    PackedFormat,
    pack_codes,
    pack_meta,
    planes_of,
    unpack_codes,
    unpack_meta,
)

FP16_MAX = 65504.0
BITS = (2, 3, 4, 8, 16)


def to_tiles(x: Tensor, tile: int) -> Tensor:
    """``[B, H, T, D]`` to ``[B, H, n, tile, D]``; the last tile repeats its last token, which changes no minimum."""
    length = x.shape[2]
    short = -length % tile
    if short:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], dim=2)
    tiles: Tensor = x.unflatten(2, (-1, tile))
    return tiles


def half_below(x: Tensor) -> Tensor:
    """The largest fp16 that is not above float32 ``x`` (within fp16's range): a minimum that no value falls under."""
    half = x.half()
    bits = half.view(torch.int16)
    lower = torch.where(bits > 0, bits - 1, (bits & 0x7FFF | -0x8000) + 1).view(torch.float16)
    return torch.where(half.float() > x, lower, half)


def half_above(x: Tensor) -> Tensor:
    """The smallest fp16 that is not below ``x >= 0`` by more than float32's own rounding: a step that spans its range."""
    half = x.half()
    higher = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < x * (1 - 2.0**-20), higher, half)


def check_tokens(x: Tensor, head_dim: int, who: str) -> None:
    """Refuse anything but a non-empty floating ``[B, H_kv, T, head_dim]``. Raises ``InputError``."""
    if x.dim() != 4 or x.shape[-1] != head_dim or not x.shape[2]:
        raise InputError(f"{who} takes [B, H_kv, T >= 1, D={head_dim}]; found a tensor of shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"{who} takes floating-point tokens; found {x.dtype}")


def _grid(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp16 scale and minimum of the grid over ``[low, high]``, and the nearest codes of ``x`` as floats."""
    top = 2**bits - 1
    minimum = half_below(low.clamp(-FP16_MAX, FP16_MAX))
    steps = high.new_full((), top)  # on the device: by a number of the host's CUDA divides inexactly
    scale = half_above(((high - minimum.float()) / steps).clamp(0, FP16_MAX))
    step = scale.float()
    codes = ((x - minimum.float()) / step.where(step > 0, torch.ones_like(step))).round_().clamp_(0, top)
    return scale, minimum, codes


class UniformQuantizer(Quantizer):
    """``x = code * scale + minimum`` with fp16 scale and minimum a group (arXiv 2402.02750 for per-channel keys).

    Args:
        head_dim: channels ``D``.
        bits: 2, 3, 4 or 8.
        axis: "token" shares a scale along the channels of a token, "channel" along the tokens of a channel.
        group: elements a scale; 0 for the whole axis.
        tile: tokens a tile.
        layout: word order, "token" for keys and "channel" for values.
    """

    kind: ClassVar[str] = "uniform"

    def __init__(
        self,
        head_dim: int,
        bits: int = 4,
        axis: Axis = "token",
        group: int = 0,
        tile: int = 64,
        layout: Layout = "token",
    ) -> None:
        self.head_dim, self.tile, self.bits = head_dim, tile, bits
        self.fmt = PackedFormat(bits=bits, head_dim=head_dim, tile=tile, axis=axis, group=group, layout=layout)
        self.format = self.fmt
        self.moves_tokens = axis == "token"

    @property
    def bits_per_element(self) -> float:
        return self.fmt.bits_per_element

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.fmt.field_shapes()

    # --- codes ---
    def encode(self, x: Tensor) -> Packed:
        check_tokens(x, self.head_dim, f"quantizer {self.kind!r}")
        tiles = to_tiles(x.float(), self.tile)
        fmt = self.fmt
        if fmt.axis == "token":
            grouped, dim = tiles.unflatten(-1, (fmt.groups, fmt.group)), -1  # [B, H, n, tile, g, G]
        else:
            grouped, dim = tiles.unflatten(-2, (fmt.groups, fmt.group)), -2  # [B, H, n, g, G, D]
        low, high = torch.aminmax(grouped, dim=dim, keepdim=True)
        scale, minimum, codes = _grid(grouped, low, high, fmt.bits)
        codes = codes.reshape(tiles.shape).to(torch.int16)
        if fmt.axis == "token":
            meta = pack_meta(scale.squeeze(-1).transpose(-1, -2), minimum.squeeze(-1).transpose(-1, -2))
        else:
            meta = pack_meta(scale.squeeze(-2), minimum.squeeze(-2))
        return Packed({**self._pack(codes), "meta": meta}, x.shape[2], x.dtype)

    def plain_encoding(self, device: torch.device) -> PlainEncoding | None:
        decodes = type(self).decode is UniformQuantizer.decode
        return PlainEncoding(decodes=decodes) if type(self).encode is UniformQuantizer.encode else None

    def decode(self, packed: Packed) -> Tensor:
        fmt = self.fmt
        codes = self._codes(packed, torch.float32)
        if fmt.layout == "channel":
            codes = codes.transpose(-1, -2)
        scale, minimum = (m.float() for m in unpack_meta(packed.fields["meta"]))
        if fmt.axis == "token":
            grouped = codes.unflatten(-1, (fmt.groups, fmt.group))
            x = grouped * scale.transpose(-1, -2)[..., None] + minimum.transpose(-1, -2)[..., None]
        else:
            grouped = codes.unflatten(-2, (fmt.groups, fmt.group))
            x = grouped * scale[..., None, :] + minimum[..., None, :]
        tokens: Tensor = x.reshape(*codes.shape).flatten(2, 3)
        return tokens[:, :, : packed.length].to(packed.dtype)

    def select(self, packed: Packed, index: Tensor) -> Packed:
        if not self.moves_tokens:
            return super().select(packed, index)
        fmt = self.fmt
        if index.shape[-1] % self.tile:
            raise InputError(f"{index.shape[-1]} tokens selected; a multiple of the tile ({self.tile}) is needed")
        codes = self._codes(packed, torch.int16)
        if fmt.layout == "channel":
            codes = codes.transpose(-1, -2)
        codes = codes.flatten(2, 3).gather(2, index[..., None].expand(-1, -1, -1, self.head_dim))
        meta = packed.fields["meta"].transpose(2, 3).flatten(3, 4)  # [B, H, g, n * tile]
        meta = meta.gather(3, index[:, :, None].expand(-1, -1, fmt.groups, -1))
        fields = self._pack(codes.unflatten(2, (-1, self.tile)))
        fields["meta"] = meta.unflatten(3, (-1, self.tile)).transpose(2, 3).contiguous()
        return Packed(fields, index.shape[-1], packed.dtype)

    # --- attention without reconstruction ---
    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        fmt = self.fmt
        if fmt.layout != "token" or (fmt.axis == "token" and fmt.groups > 1):
            return super().scores(query, packed)
        codes = self._codes(packed, query.dtype)  # [B, H, n, tile, D]
        scale, minimum = unpack_meta(packed.fields["meta"])  # [B, H, n, 1, tile] or [B, H, n, g, D]
        scale, minimum = scale.to(query.dtype), minimum.to(query.dtype)
        if fmt.axis == "token":
            dots = query @ codes.flatten(2, 3).transpose(-1, -2)  # [B, H, N, n * tile]
            s = dots * scale.flatten(2)[:, :, None] + query.sum(-1, keepdim=True) * minimum.flatten(2)[:, :, None]
        else:
            codes = codes.unflatten(3, (fmt.groups, fmt.group)).flatten(2, 3)  # [B, H, n * g, G, D]
            scale, minimum = (m.flatten(2, 3)[:, :, :, None] for m in (scale, minimum))  # [B, H, n * g, 1, D]
            s = (query[:, :, None] * scale) @ codes.transpose(-1, -2) + query[:, :, None] @ minimum.transpose(-1, -2)
            s = s.transpose(2, 3).flatten(3)
        return s[..., : packed.length]

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        fmt = self.fmt
        if fmt.axis != "token" or (fmt.groups > 1 and fmt.layout != "channel"):
            return super().combine(weights, packed)
        short = -weights.shape[-1] % self.tile
        if short:
            weights = torch.nn.functional.pad(weights, (0, short))
        codes = self._codes(packed, weights.dtype)
        scale, minimum = (m.to(weights.dtype) for m in unpack_meta(packed.fields["meta"]))  # [B, H, n, g, tile]
        if fmt.layout == "channel":  # codes [B, H, n, D, tile]
            tiles = weights.unflatten(-1, (-1, self.tile)).transpose(2, 3)[:, :, :, None]  # [B, H, n, 1, N, tile]
            grouped = codes.unflatten(3, (fmt.groups, fmt.group)).transpose(-1, -2)  # [B, H, n, g, tile, G]
            parts = (tiles * scale[..., None, :]) @ grouped + (tiles * minimum[..., None, :]).sum(-1, keepdim=True)
            combined: Tensor = parts.sum(2).transpose(2, 3).flatten(3)  # [B, H, N, D]
            return combined
        scale, minimum = scale.flatten(2)[:, :, None], minimum.flatten(2)[:, :, None]
        offset = (weights * minimum).sum(-1, keepdim=True)
        return (weights * scale) @ codes.flatten(2, 3) + offset

    def _pack(self, codes: Tensor) -> dict[str, Tensor]:
        fields, below = {}, self.fmt.bits
        for width in planes_of(self.fmt.bits):
            below -= width
            plane = (codes >> below) & ((1 << width) - 1)
            fields[f"codes{width}"] = pack_codes(plane, width, self.fmt.layout)
        return fields

    def _codes(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        first, *rest = planes_of(self.fmt.bits)
        codes = unpack_codes(packed.fields[f"codes{first}"], first, self.fmt.layout, torch.int16 if rest else dtype)
        for width in rest:  # in integers: half the bytes of floats
            codes <<= width
            codes |= unpack_codes(packed.fields[f"codes{width}"], width, self.fmt.layout)
        return codes.to(dtype)


class UniformConfig(QuantizerConfig):
    """``kind = "uniform"``: asymmetric integer codes.

    Attributes:
        bits: 2, 3, 4, 8, or 16 for full precision.
        axis: "token" or "channel".
        group: elements a scale, 0 for the whole axis.
    """

    kind: Literal["uniform"] = "uniform"
    axis: Axis = "token"
    group: int = Field(default=0, ge=0)

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: int) -> int:
        if bits not in BITS:
            raise ValueError(f"bits={bits} cannot be stored; choose one of {', '.join(map(str, BITS))}")
        return bits

    def build(self, context: QuantizerContext) -> Quantizer:
        if self.bits == 16:
            return FullQuantizer(context.head_dim, context.tile)
        try:
            return UniformQuantizer(
                context.head_dim,
                self.bits,
                self.axis,
                self.group,
                context.tile,
                "token" if context.side == "key" else "channel",
            )
        except ConfigError as error:
            raise ConfigError(f"{context.side} quantizer of layer {context.layer}: {error}") from error
