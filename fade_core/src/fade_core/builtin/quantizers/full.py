"""Full precision behind the quantizer interface: the ``fp16`` tier."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import Quantizer
from fade_core.packed import Packed


class FullQuantizer(Quantizer):
    """Keeps tokens as they are, in the model's dtype; fields ``raw`` ``[B, H_kv, n, tile, D]``.

    Args:
        head_dim: channels ``D``.
        tile: tokens a tile.
        dtype: dtype of the stored field; the first ``encode`` fixes it otherwise.
    """

    kind: ClassVar[str] = "full"
    moves_tokens = True

    def __init__(self, head_dim: int, tile: int = 64, dtype: torch.dtype = torch.float16) -> None:
        self.head_dim, self.tile, self.dtype = head_dim, tile, dtype

    @property
    def bits_per_element(self) -> float:
        return self.dtype.itemsize * 8.0

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"raw": ((self.tile, self.head_dim), self.dtype)}

    def encode(self, x: Tensor) -> Packed:
        if x.dim() != 4 or x.shape[-1] != self.head_dim or not x.shape[2]:
            raise InputError(f"full precision takes [B, H_kv, T >= 1, D={self.head_dim}]; found {tuple(x.shape)}")
        if not x.is_floating_point():
            raise InputError(f"full precision takes floating-point tokens; found {x.dtype}")
        self.dtype = x.dtype
        length = x.shape[2]
        short = -length % self.tile
        if short:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], dim=2)
        return Packed({"raw": x.unflatten(2, (-1, self.tile)).contiguous()}, length, x.dtype)

    def decode(self, packed: Packed) -> Tensor:
        return packed.fields["raw"].flatten(2, 3)[:, :, : packed.length].to(packed.dtype)

    def select(self, packed: Packed, index: Tensor) -> Packed:
        if index.shape[-1] % self.tile:
            raise InputError(f"{index.shape[-1]} tokens selected; a multiple of the tile ({self.tile}) is needed")
        raw = packed.fields["raw"].flatten(2, 3).gather(2, index[..., None].expand(-1, -1, -1, self.head_dim))
        return Packed({"raw": raw.unflatten(2, (-1, self.tile)).contiguous()}, index.shape[-1], packed.dtype)
