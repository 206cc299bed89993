"""The dequantize kernel: packed tiles back to tokens. Grid ``[tiles, B * H_kv]``, a tile a program."""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.codes import codes_by_token, high_half, low_half


@triton.jit
def dequantize_kernel(
    CODES,
    LOW,
    META,
    IDS,
    OUT,
    heads,
    length,
    code_stride_b,
    code_stride_h,
    low_stride_b,
    low_stride_h,
    meta_stride_b,
    meta_stride_h,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """``dequantize.py`` has the arguments; the order of words and the constants are those of ``encode_tile``."""
    WORDS: tl.constexpr = TILE * (2 if BITS == 3 else BITS) // 16 * D
    LOW_WORDS: tl.constexpr = TILE // 16 * D
    number = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    head = (program % heads).to(tl.int64)
    bh = program.to(tl.int64)
    token = tl.arange(0, TILE)
    channel = tl.arange(0, DP)
    inside = (channel < D)[None, :]
    META_SIZE: tl.constexpr = D if CHANNEL else GROUPS * TILE
    if IDS is None:
        tile = number.to(tl.int64)
        codes = CODES + row * code_stride_b + head * code_stride_h + tile * WORDS
        low = LOW if LOW is None else LOW + row * low_stride_b + head * low_stride_h + tile * LOW_WORDS
        metas = META + row * meta_stride_b + head * meta_stride_h + tile * META_SIZE
    else:
        tile = tl.load(IDS + bh * tl.num_programs(0) + number).to(tl.int64)
        codes = CODES + tl.maximum(tile, 0) * WORDS
        low = LOW if LOW is None else LOW + tl.maximum(tile, 0) * LOW_WORDS
        metas = META + tl.maximum(tile, 0) * META_SIZE
    x = codes_by_token(codes, low, token, channel, BITS, TRANSPOSED, TILE, D).to(tl.float32)
    if CHANNEL:
        meta = tl.load(metas + channel, mask=channel < D, other=0)[None, :]
    elif GROUPS == 1:
        meta = tl.load(metas + token)[:, None]
    else:
        meta = tl.load(metas + (channel // (D // GROUPS) * TILE)[None, :] + token[:, None], mask=inside, other=0)
    x = x * low_half(meta).to(tl.float32) + high_half(meta).to(tl.float32)
    if IDS is not None:
        x = tl.where(tile < 0, 0.0, x)
    place = number.to(tl.int64) * TILE + token
    tl.store(
        OUT + (bh * length + place)[:, None] * D + channel[None, :],
        x.to(OUT.dtype.element_ty),
        mask=(place < length)[:, None] & inside,
    )
