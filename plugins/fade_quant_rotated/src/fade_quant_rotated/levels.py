"""Codes with one scale a token (or a group of its channels): a uniform grid, or Gaussian levels with a chosen scale."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import Quantizer
from fade_core.packed import (
    Layout,
    Packed,
    PackedFormat,
    pack_codes,
    pack_meta,
    planes_of,
    unpack_codes,
    unpack_meta,
)
from fade_quant_rotated.lloyd_max import edges_on, gaussian_levels, levels_on

ScaleRule = Literal["norm", "unbiased"]
Metadata = Literal["fp16", "log8"]

FP16_MAX = 65504.0
LOG8_STEPS = 8
LOG8_ZERO = 160
"""An 8-bit log scale ``c`` means ``2 ** ((c - 160) / 8)``, 2^-19.9 to 2^11.9 in steps of 9%; 0 means 0."""


def to_log8(scale: Tensor) -> Tensor:
    """Nearest 8-bit log scale (uint8) of floats that are not negative; less than 2^-20 is 0."""
    steps = torch.log2(scale.float().clamp_min(1e-30)) * LOG8_STEPS + LOG8_ZERO
    return steps.round().clamp(0, 255).to(torch.uint8)


def from_log8(code: Tensor) -> Tensor:
    """The float32 scale of an 8-bit log code."""
    return torch.exp2((code.float() - LOG8_ZERO) / LOG8_STEPS).masked_fill(code == 0, 0.0)


def to_tiles(x: Tensor, tile: int) -> Tensor:
    """``[B, H, T, D]`` to ``[B, H, n, tile, D]``, the last token repeated to fill the last tile."""
    short = -x.shape[2] % tile
    if short:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], dim=2)
    result: Tensor = x.unflatten(2, (-1, tile))
    return result


def check_tokens(x: Tensor, head_dim: int, who: str) -> None:
    """Refuse anything but a non-empty floating ``[B, H_kv, T, head_dim]``. Raises ``InputError``."""
    if x.dim() != 4 or x.shape[-1] != head_dim or not x.shape[2]:
        raise InputError(f"{who} takes [B, H_kv, T >= 1, D={head_dim}]; found a tensor of shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"{who} takes floating-point tokens; found {x.dtype}")


class TokenQuantizer(Quantizer):
    """Codes whose metadata belongs to one token, so that tokens can be regrouped without re-encoding.

    Without ``levels`` the grid is uniform between a group's minimum and maximum. With ``levels`` (for a unit Gaussian)
    ``x = levels[code] * scale``; "norm" takes the scale from the group's root mean square, "unbiased" then stretches it
    until the reconstruction's inner product with the original is the original's squared norm, which keeps weighted sums
    of values from shrinking.

    Args:
        format: codes, groups and layout; its axis must be "token".
        scale: how a levels scale is chosen.
        metadata: "fp16" is ``PackedFormat``'s own word (which kernels read); "log8" stores 8 bits a group, levels only.
    """

    kind: ClassVar[str] = "token"
    moves_tokens = True

    def __init__(self, format: PackedFormat, scale: ScaleRule = "norm", metadata: Metadata = "fp16") -> None:
        if format.axis != "token":
            raise ConfigError(f"axis={format.axis!r} shares scales between tokens; a token quantizer needs 'token'")
        if metadata == "log8" and format.levels is None:
            raise ConfigError("metadata='log8' has no place for a minimum; use codes='lloyd-max' or metadata='fp16'")
        self.fmt, self.rule, self.metadata = format, scale, metadata
        self.head_dim, self.tile = format.head_dim, format.tile
        self.format = format if metadata == "fp16" else None

    @property
    def bits_per_element(self) -> float:
        return self.fmt.bits + (32 if self.metadata == "fp16" else 8) / self.fmt.group

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = self.fmt.field_shapes()
        if self.metadata == "log8":
            shapes["scale"] = (shapes.pop("meta")[0], torch.uint8)
        return shapes

    # --- codes ---
    def encode(self, x: Tensor) -> Packed:
        check_tokens(x, self.head_dim, f"quantizer {self.kind!r}")
        tiles = to_tiles(x.float(), self.tile)
        grouped = tiles.unflatten(-1, (self.fmt.groups, self.fmt.group))  # [B, H, n, tile, g, G]
        codes, scale, minimum = self._uniform(grouped) if self.fmt.levels is None else self._gaussian(grouped)
        fields = self._pack(codes.reshape(tiles.shape))
        scale, minimum = scale.transpose(-1, -2), minimum.transpose(-1, -2)  # [B, H, n, g, tile]
        if self.metadata == "fp16":
            fields["meta"] = pack_meta(scale, minimum)
        else:
            fields["scale"] = to_log8(scale).contiguous()
        return Packed(fields, x.shape[2], x.dtype)

    def _uniform(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        top = 2**self.fmt.bits - 1
        minimum = low.clamp(-FP16_MAX, FP16_MAX).half()
        steps = high.new_full((), top)  # on the device: by a number of the host's CUDA divides inexactly
        scale = ((high - minimum.float()) / steps).clamp(0, FP16_MAX).half()
        step = scale.float()
        codes = ((x - minimum.float()) / step.where(step > 0, 1)).round_().clamp_(0, top).to(torch.int16)
        return codes, scale.squeeze(-1), minimum.squeeze(-1)

    def _gaussian(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        names = self.fmt.levels or ()
        levels, edges = levels_on(names, x.dtype, x.device), edges_on(names, x.dtype, x.device)
        scale = self._stored(x.square().mean(-1, keepdim=True).sqrt())
        codes = torch.bucketize(x / scale.where(scale > 0, 1), edges)
        if self.rule == "unbiased":
            along = (x * levels[codes]).sum(-1, keepdim=True)
            scale = self._stored(x.square().sum(-1, keepdim=True) / along.where(along > 0, 1)).where(along > 0, scale)
        return codes.to(torch.int16), scale.squeeze(-1), torch.zeros_like(scale).squeeze(-1)

    def _stored(self, scale: Tensor) -> Tensor:
        """The scale as decoding will see it."""
        return from_log8(to_log8(scale)) if self.metadata == "log8" else scale.clamp(0, FP16_MAX).half().float()

    def decode(self, packed: Packed) -> Tensor:
        scale, minimum = self._meta(packed)
        x = self._values(packed, torch.float32).unflatten(-1, (self.fmt.groups, self.fmt.group))
        x = x * scale.transpose(-1, -2)[..., None]
        if minimum is not None:
            x = x + minimum.transpose(-1, -2)[..., None]
        result: Tensor = x.flatten(-2).flatten(2, 3)[:, :, : packed.length].to(packed.dtype)
        return result

    def select(self, packed: Packed, index: Tensor) -> Packed:
        if index.shape[-1] % self.tile:
            raise InputError(f"{index.shape[-1]} tokens selected; a multiple of the tile ({self.tile}) is needed")
        codes = self._codes(packed, torch.int16)
        if self.fmt.layout == "channel":
            codes = codes.transpose(-1, -2)
        codes = codes.flatten(2, 3).gather(2, index[..., None].expand(-1, -1, -1, self.head_dim))
        fields = self._pack(codes.unflatten(2, (-1, self.tile)))
        name = "meta" if self.metadata == "fp16" else "scale"
        meta = packed.fields[name].transpose(2, 3).flatten(3, 4)  # [B, H, g, n * tile]
        meta = meta.gather(3, index[:, :, None].expand(-1, -1, self.fmt.groups, -1))
        fields[name] = meta.unflatten(3, (-1, self.tile)).transpose(2, 3).contiguous()
        return Packed(fields, index.shape[-1], packed.dtype)

    # --- attention: the scale meets the score, not the token ---
    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        scale, minimum = self._meta(packed)  # [B, H, n, g, tile]
        values = self._values(packed, query.dtype).flatten(2, 3).unflatten(-1, (self.fmt.groups, self.fmt.group))
        split = query.unflatten(-1, (self.fmt.groups, self.fmt.group))  # [B, H, N, g, G]
        dots = split.transpose(2, 3) @ values.permute(0, 1, 3, 4, 2)  # [B, H, g, N, T]
        out = dots * _by_token(scale, query)
        if minimum is not None:
            out = out + split.sum(-1).transpose(2, 3)[..., None] * _by_token(minimum, query)
        result: Tensor = out.sum(2)[..., : packed.length]
        return result

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        short = -weights.shape[-1] % self.tile
        weights = torch.nn.functional.pad(weights, (0, short))[:, :, None]  # [B, H, 1, N, T]
        scale, minimum = self._meta(packed)
        values = self._values(packed, weights.dtype).flatten(2, 3).unflatten(-1, (self.fmt.groups, self.fmt.group))
        out = (weights * _by_token(scale, weights)) @ values.transpose(2, 3)  # [B, H, g, N, G]
        if minimum is not None:
            out = out + (weights * _by_token(minimum, weights)).sum(-1, keepdim=True)
        result: Tensor = out.transpose(2, 3).flatten(3)
        return result

    # --- words ---
    def _meta(self, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """Float32 scale and minimum ``[B, H, n, g, tile]``."""
        if self.metadata == "log8":
            return from_log8(packed.fields["scale"]), None
        scale, minimum = unpack_meta(packed.fields["meta"])
        return scale.float(), minimum.float() if self.fmt.levels is None else None

    def _pack(self, codes: Tensor) -> dict[str, Tensor]:
        fields, below = {}, self.fmt.bits
        for width in planes_of(self.fmt.bits):
            below -= width
            fields[f"codes{width}"] = pack_codes((codes >> below) & ((1 << width) - 1), width, self.fmt.layout)
        return fields

    def _codes(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        widths = planes_of(self.fmt.bits)
        codes = unpack_codes(packed.fields[f"codes{widths[0]}"], widths[0], self.fmt.layout, dtype)
        for width in widths[1:]:
            codes = codes * (1 << width) + unpack_codes(packed.fields[f"codes{width}"], width, self.fmt.layout, dtype)
        return codes

    def _values(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """What the codes mean before scale and minimum, ``[B, H, n, tile, D]``."""
        if self.fmt.levels is None:
            values = self._codes(packed, dtype)
        else:
            codes = self._codes(packed, torch.int32)
            values = levels_on(self.fmt.levels, dtype, codes.device)[codes]
        return values.transpose(-1, -2) if self.fmt.layout == "channel" else values


def gaussian_format(bits: int, head_dim: int, tile: int, group: int, layout: Layout) -> PackedFormat:
    """Lloyd-Max codes for a unit Gaussian, one scale a token and group."""
    return PackedFormat(
        bits=bits, head_dim=head_dim, tile=tile, axis="token", group=group, layout=layout, levels=gaussian_levels(bits)
    )


def _by_token(meta: Tensor, like: Tensor) -> Tensor:
    """``[B, H, n, g, tile]`` to ``[B, H, g, 1, n * tile]``."""
    return meta.to(like.dtype).transpose(2, 3).flatten(3)[:, :, :, None]
