"""FADE's ``dequantize`` op, run by a Triton kernel: packed tiles to tokens in one pass over the codes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import Packed, PackedFormat
from fade_kernels_triton.device import interpreted, unusable
from fade_kernels_triton.encode import off_table, table_of, unsupported
from fade_kernels_triton.operands import TOKEN_DTYPES, planes


class TritonDequantize(Kernel):
    """``dequantize`` for uniform codes of 2, 3 and 4 bits: a scale a token, a group of its channels, or a channel."""

    name: ClassVar[str] = "triton"
    op: ClassVar[Op] = "dequantize"
    priority: ClassVar[int] = -10 if interpreted() else 10

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        reason = unusable(device)
        if not reason and dtype not in TOKEN_DTYPES:
            reason = f"{dtype} (it gives {', '.join(map(str, TOKEN_DTYPES))})"
        reason = reason or unsupported(format)
        return Support(not reason, reason)

    def accepts(self, quantizer: Quantizer, packed: Packed, ids: Tensor | None = None) -> Support:
        reason = _refusal(quantizer, packed, ids)
        return Support(not reason, reason)

    def __call__(self, quantizer: Quantizer, packed: Packed, ids: Tensor | None = None) -> Tensor:
        """What ``quantizer.decode(packed)`` gives: ``[B, H_kv, T, D]`` in ``packed.dtype``.

        Args:
            quantizer: of uniform codes.
            packed: the tiles; with ``ids`` its fields are a pool ``[N, *tile_shape]``.
            ids: ``[B, H_kv, n]``, pool tile of each tile; zeros are given for negative ones.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if refused := _refusal(quantizer, packed, ids):
            raise InputError(f"the Triton dequantize kernel does not take this call: {refused}")
        from fade_kernels_triton.jit.decoded import dequantize_kernel

        fmt = quantizer.format
        if fmt is None:
            raise InputError(f"quantizer {quantizer.kind!r} has no packed format")
        (codes, low), meta = planes(packed.fields, fmt), packed.fields["meta"]
        (rows, heads), dim = (codes if ids is None else ids).shape[:2], fmt.head_dim
        out = torch.empty(rows, heads, packed.length, dim, dtype=packed.dtype, device=codes.device)
        tiles = -(-packed.length // fmt.tile)
        dequantize_kernel[(tiles, rows * heads)](
            codes,
            low,
            meta,
            table_of(ids, tiles),
            out,
            heads,
            packed.length,
            *codes.stride()[:2],
            *((0, 0) if low is None else low.stride()[:2]),
            *meta.stride()[:2],
            BITS=fmt.bits,
            CHANNEL=fmt.axis == "channel",
            GROUPS=fmt.groups,
            TRANSPOSED=fmt.layout == "channel",
            TILE=fmt.tile,
            D=dim,
            DP=max(16, 1 << (dim - 1).bit_length()),
            num_warps=4,
        )
        return out


def _refusal(quantizer: Quantizer, packed: Packed, ids: Tensor | None = None) -> str:
    """Why the kernel cannot take this call; empty if it can."""
    fmt = quantizer.format
    if reason := unsupported(fmt):
        return reason
    plain = quantizer.plain_encoding(packed.fields["meta"].device)
    if fmt is None or plain is None or not plain.decodes or plain.rotation is not None:
        return f"quantizer {quantizer.kind!r} has a way of its own to decode"
    if packed.dtype not in TOKEN_DTYPES or not packed.length:
        return f"{packed.length} tokens of {packed.dtype} (it gives {', '.join(map(str, TOKEN_DTYPES))})"
    if ids is not None:
        return off_table(packed.fields, ids, packed.length, fmt.tile)
    if any(not field[0, 0].is_contiguous() for field in packed.fields.values()):
        return "tiles that do not follow one another"
    return ""
