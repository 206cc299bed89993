"""FADE's ``encode`` op, run by a Triton kernel: a prompt's tokens to packed tiles in one pass over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import Packed, PackedFormat, Tiles, planes_of
from fade_kernels_triton.device import interpreted, unusable
from fade_kernels_triton.operands import GROUPS_TAKEN, HEAD_DIMS, PACKED_BITS, TILES, TOKEN_DTYPES, odd_groups, planes
from fade_kernels_triton.planes import encoding_of, encoding_warps, gains_of, padded_kept, unencodable


class TritonEncode(Kernel):
    """``encode`` for uniform codes of 2, 3 and 4 bits (a scale a token, a group of its channels, or a channel) and for planes.

    Codes and metadata are those of the quantizer itself, bit by bit, with the exceptions that ``TritonAppend`` names.
    """

    name: ClassVar[str] = "triton"
    op: ClassVar[Op] = "encode"
    priority: ClassVar[int] = -10 if interpreted() else 10

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        reason = unusable(device)
        if not reason and dtype not in TOKEN_DTYPES:
            reason = f"{dtype} (it takes {', '.join(map(str, TOKEN_DTYPES))})"
        if format is not None:  # without one there may be planes: `accepts` will see
            reason = reason or unsupported(format)
        return Support(not reason, reason)

    def accepts(self, quantizer: Quantizer, tokens: Tensor, into: Tiles | None = None) -> Support:
        reason = _refusal(quantizer, tokens, into)
        return Support(not reason, reason)

    def __call__(self, quantizer: Quantizer, tokens: Tensor, into: Tiles | None = None) -> Packed | None:
        """What ``quantizer.encode(tokens)`` gives, or nothing if it went ``into`` tiles of a pool.

        Args:
            quantizer: of uniform codes or of planes.
            tokens: ``[B, H_kv, T, D]`` of any strides.
            into: where the tiles are written; ``None`` for new tensors.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if refused := _refusal(quantizer, tokens, into):
            raise InputError(f"the Triton encode kernel does not take this call: {refused}")
        tokens = tokens if tokens.stride(3) == 1 else tokens.contiguous()
        fmt, plain = quantizer.format, quantizer.plain_encoding(tokens.device)
        if fmt is None:
            return _encode_planes(quantizer, tokens, into)
        if plain is None:  # `accepts` refuses it
            raise InputError(f"quantizer {quantizer.kind!r} has a way of its own to encode")
        from fade_kernels_triton.jit.encode import encode_kernel

        rows, heads, length, dim = tokens.shape
        tiles = -(-length // fmt.tile)
        fields = _blank(quantizer, tokens, tiles) if into is None else into.fields
        encode_kernel[(tiles, rows * heads)](
            tokens,
            plain.rotation,
            *planes(fields, fmt),
            fields["meta"],
            table_of(None if into is None else into.ids, tiles),
            heads,
            length,
            *tokens.stride()[:3],
            BITS=fmt.bits,
            CHANNEL=fmt.axis == "channel",
            GROUPS=fmt.groups,
            TRANSPOSED=fmt.layout == "channel",
            OUTWARD=plain.outward,
            TILE=fmt.tile,
            D=dim,
            DP=max(16, 1 << (dim - 1).bit_length()),
            num_warps=4,
        )
        return Packed(dict(fields), length, tokens.dtype) if into is None else None


def _blank(quantizer: Quantizer, tokens: Tensor, tiles: int) -> dict[str, Tensor]:
    """Fields ``[B, H_kv, tiles, *tile_shape]`` that hold anything."""
    return {
        name: torch.empty((*tokens.shape[:2], tiles, *shape), dtype=dtype, device=tokens.device)
        for name, (shape, dtype) in quantizer.field_shapes().items()
    }


def table_of(ids: Tensor | None, tiles: int) -> Tensor | None:
    """The table of so many tiles a row and head, contiguous."""
    return None if ids is None else ids[:, :, :tiles].contiguous()


def _encode_planes(quantizer: Quantizer, tokens: Tensor, into: Tiles | None) -> Packed | None:
    """The launch for quantizers of planes."""
    from fade_kernels_triton.jit.encodeplanes import encode_planes_kernel

    layout = quantizer.planes()
    if layout is None:
        raise InputError(f"quantizer {quantizer.kind!r} has no planes")
    rows, heads, length, dim = tokens.shape
    tiles = -(-length // layout.tile)
    fields = _blank(quantizer, tokens, tiles) if into is None else into.fields
    if into is None:
        fields["codes"].zero_()  # the end may stay empty
    zero, steps, first, tries = gains_of(layout)
    kept = padded_kept(layout)
    encode_planes_kernel[(tiles, rows * heads)](
        tokens,
        fields["codes"],
        fields["gain"],
        table_of(None if into is None else into.ids, tiles),
        *encoding_of(layout),
        heads,
        length,
        layout.worth.shape[1],
        layout.row,
        *tokens.stride()[:3],
        PLANES=layout.planes.shape[1],
        TRANSPOSED=layout.layout == "channel",
        ZERO=zero,
        OCTAVE=steps,
        FROM=first,
        TRIES=tries,
        TILE=layout.tile,
        D=dim,
        KEPT=kept,
        num_warps=encoding_warps(layout.tile, kept),
    )
    return Packed(dict(fields), length, tokens.dtype) if into is None else None


def unsupported(fmt: PackedFormat | None) -> str:
    """Why the kernel cannot write this format; empty if it can."""
    if fmt is None:
        return "the quantizer has no packed format"
    if fmt.bits not in PACKED_BITS or fmt.levels is not None:
        table = " with a level table" if fmt.levels is not None else ""
        return f"{fmt.bits}-bit codes{table} (it writes uniform {', '.join(map(str, PACKED_BITS))})"
    if reason := odd_groups(fmt):
        return f"{reason} (it writes {GROUPS_TAKEN})"
    if fmt.tile not in TILES or fmt.head_dim not in HEAD_DIMS:
        return f"tiles of {fmt.tile} tokens of {fmt.head_dim} channels (it writes {TILES} of {HEAD_DIMS})"
    return ""


def unplain(quantizer: Quantizer, device: torch.device) -> str:
    """Why tokens are not encoded as ``encode_tile`` does it; empty if they are."""
    plain, fmt = quantizer.plain_encoding(device), quantizer.format
    if plain is None or fmt is None:
        return f"quantizer {quantizer.kind!r} has a way of its own to encode"
    if plain.rotation is not None and (fmt.axis != "token" or fmt.tile * planes_of(fmt.bits)[0] < 256):
        return f"a rotation before {fmt.bits}-bit codes with a scale a {fmt.axis}, tile {fmt.tile}"
    return ""


def off_table(fields: Mapping[str, Tensor], ids: Tensor, length: int, tile: int) -> str:
    """Why kernels cannot go through a table to ``length`` tokens in these fields of a pool; empty if they can."""
    if any(not field.is_contiguous() for field in fields.values()):
        return "a pool that is not contiguous"
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 3:
        return f"a table of {ids.dtype} {tuple(ids.shape)} (it takes int32 or int64 [B, H_kv, tiles])"
    if ids.shape[2] * tile < length:
        return f"{length} tokens for {ids.shape[2]} tiles of {tile}"
    return ""


def _refusal(quantizer: Quantizer, tokens: Tensor, into: Tiles | None = None) -> str:
    """Why the kernel cannot take this call; empty if it can."""
    if tokens.dim() != 4 or not tokens.shape[2] or tokens.dtype not in TOKEN_DTYPES:
        return f"{tokens.dtype} {tuple(tokens.shape)} (it takes [B, H_kv, T >= 1, D])"
    if into is not None and (reason := off_table(into.fields, into.ids, tokens.shape[2], quantizer.tile)):
        return reason
    fmt = quantizer.format
    if fmt is None and (layout := quantizer.planes()) is not None:
        return unencodable(quantizer, "key" if layout.layout == "token" else "value", tokens)
    if reason := unsupported(fmt):
        return reason
    if reason := unplain(quantizer, tokens.device):
        return reason
    if fmt is not None and tokens.shape[3] != fmt.head_dim:
        return f"{tokens.dtype} {tuple(tokens.shape)} (it takes [B, H_kv, T >= 1, {fmt.head_dim}])"
    return ""
