"""Packing many tokens at once and unpacking them: the ops ``encode`` and ``dequantize``; the quantizers are their reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import Packed, PackedFormat, Tiles
from fade_core.support.transfer import sent


class TorchEncode(Kernel):
    """``encode`` in torch: every quantizer, as it encodes itself."""

    name: ClassVar[str] = "torch"
    op: ClassVar[Op] = "encode"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, quantizer: Quantizer, tokens: Tensor, into: Tiles | None = None) -> Packed | None:
        packed = quantizer.encode(tokens)
        if into is None:
            return packed
        put(packed, into)
        return None


class TorchDequantize(Kernel):
    """``dequantize`` in torch: every quantizer, as it decodes itself."""

    name: ClassVar[str] = "torch"
    op: ClassVar[Op] = "dequantize"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, quantizer: Quantizer, packed: Packed, ids: Tensor | None = None) -> Tensor:
        if ids is None:
            return quantizer.decode(packed)
        known, shape = ids.clamp_min(0).long().flatten(), ids.shape
        tiles = {n: field.index_select(0, known).unflatten(0, shape) for n, field in packed.fields.items()}
        tokens = quantizer.decode(Packed(tiles, packed.length, packed.dtype))
        if ids.device.type == "cpu" and bool((ids >= 0).all()):
            return tokens
        nowhere = (ids < 0).repeat_interleave(quantizer.tile, 2)[..., : packed.length]  # [B, H_kv, T]
        return tokens.masked_fill(nowhere[..., None], 0)


def put(packed: Packed, into: Tiles) -> None:
    """Write tiles ``[B, H_kv, n, ...]`` to their places in a pool, reading nothing back from another device."""
    ids = into.ids.flatten().long()
    there = ids >= 0
    if not ids.numel():
        return
    if ids.device.type == "cpu":  # the host knows which tiles have a place
        device = next(iter(into.fields.values())).device
        chosen, places = (sent(index, device) for index in (there.nonzero().flatten(), ids[there]))
    else:
        # what has no place is written where the first that has one goes, as that one: no two write different things to one
        # place
        chosen = torch.where(there, torch.arange(len(ids), device=ids.device), there.int().argmax())
        places = ids[chosen].clamp_min(0)
    for name, pool in into.fields.items():
        new = packed.fields[name].flatten(0, 2)[chosen].to(pool.dtype)  # [B * H_kv * n, *tile_shape]
        pool[places] = new if ids.device.type == "cpu" else torch.where(there.any(), new, pool[places])


_DECODE = TorchDequantize()


@dataclass(frozen=True)
class Codec:
    """How a layer packs and unpacks: by the kernels that were chosen where they take a call, by the quantizer elsewhere.

    Attributes:
        encoder: implementation of ``encode``.
        decoder: implementation of ``dequantize``.
    """

    encoder: Kernel = field(default_factory=TorchEncode)
    decoder: Kernel = field(default_factory=TorchDequantize)

    def encode(self, quantizer: Quantizer, tokens: Tensor) -> Packed:
        """``tokens`` ``[B, H_kv, T, D]`` packed."""
        ours = bool(self.encoder.accepts(quantizer, tokens))
        packed: Packed = self.encoder(quantizer, tokens) if ours else quantizer.encode(tokens)
        return packed

    def encode_into(self, quantizer: Quantizer, tokens: Tensor, fields: Mapping[str, Tensor], ids: Tensor) -> None:
        """Pack ``tokens`` ``[B, H_kv, T, D]`` straight into a pool.

        Args:
            quantizer: what packs.
            tokens: the last tile may be partly filled.
            fields: the pool, ``[N, *tile_shape]`` each.
            ids: int32 or int64 ``[B, H_kv, n]``: pool tile of each tile, no two alike; negative: not written. Where they lie
                on the CPU, nothing is asked of the device.
        """
        if self.in_one_pass(quantizer, tokens, fields, ids):
            self.encoder(quantizer, tokens, Tiles(fields, sent(ids, tokens.device)))
        else:
            put(self.encode(quantizer, tokens), Tiles(fields, ids))

    def in_one_pass(self, quantizer: Quantizer, tokens: Tensor, fields: Mapping[str, Tensor], ids: Tensor) -> bool:
        """Whether ``encode_into``, given these, has a kernel write all tiles, however many, and makes nothing beside them."""
        return not isinstance(self.encoder, TorchEncode) and bool(
            self.encoder.accepts(quantizer, tokens, Tiles(fields, ids))
        )

    def decode(self, quantizer: Quantizer, packed: Packed) -> Tensor:
        """Tokens ``[B, H_kv, T, D]`` in ``packed.dtype``."""
        ours = bool(self.decoder.accepts(quantizer, packed))
        tokens: Tensor = self.decoder(quantizer, packed) if ours else quantizer.decode(packed)
        return tokens

    def decode_from(
        self, quantizer: Quantizer, fields: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """All tokens ``[B, H_kv, n * tile, D]`` of tiles of a pool.

        Args:
            quantizer: what packed them.
            fields: the pool, ``[N, *tile_shape]`` each.
            ids: int32 or int64 ``[B, H_kv, n]``: pool tile of each tile; zeros are given for negative ones.
            dtype: of the tokens.
        """
        packed = Packed(dict(fields), ids.shape[2] * quantizer.tile, dtype)
        decoder = self.decoder if self.decoder.accepts(quantizer, packed, ids) else _DECODE
        tokens: Tensor = decoder(quantizer, packed, ids)
        return tokens
