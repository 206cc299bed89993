"""Encoding: tokens to packed tiles. One tile for ``append``, and the kernel that encodes all tiles of a prompt.

Codes are those of the torch quantizer bit by bit: division and rounding are IEEE, halves are stepped by their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
ROUND = tl.constexpr(12582912.0)
"""Adding and subtracting 1.5 * 2**23 rounds a small float32 to the nearest integer, halves to even."""


@triton.jit
def half_bits(half):
    """The 16 bits of fp16 numbers, in the low half of int32 words."""
    return half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def from_bits(bits):
    """fp16 numbers from the low halves of int32 words."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def half_below(x):
    """The largest fp16 that is not above float32 ``x``."""
    half = x.to(tl.float16)
    bits = half_bits(half)
    positive = (bits > 0) & (bits < 0x8000)
    lower = tl.where(positive, bits - 1, ((bits & 0x7FFF) | 0x8000) + 1)
    return tl.where(half.to(tl.float32) > x, from_bits(lower), half)


@triton.jit
def half_above(x):
    """The smallest fp16 that is not below ``x >= 0`` by more than float32's own rounding."""
    half = x.to(tl.float16)
    higher = from_bits(half_bits(half) + 1)
    return tl.where(half.to(tl.float32) < x * (1.0 - 0.00000095367431640625), higher, half)


@triton.jit
def grid_of(low, high, BITS: tl.constexpr, OUTWARD: tl.constexpr):
    """fp16 scale and minimum of the grid over ``[low, high]``; OUTWARD rounds them so that the grid spans it."""
    TOP: tl.constexpr = 2.0**BITS - 1.0
    low = tl.minimum(tl.maximum(low, -FP16_MAX), FP16_MAX)
    if OUTWARD:
        minimum = half_below(low)
    else:
        minimum = low.to(tl.float16)
    span = tl.div_rn(high - minimum.to(tl.float32), tl.full(low.shape, TOP, tl.float32))
    span = tl.minimum(tl.maximum(span, 0.0), FP16_MAX)
    if OUTWARD:
        scale = half_above(span)
    else:
        scale = span.to(tl.float16)
    return scale, minimum


@triton.jit
def codes_of(x, scale, minimum, BITS: tl.constexpr):
    """Nearest codes of float32 ``x`` as int32; ``scale`` and ``minimum`` are float32 of its shape."""
    TOP: tl.constexpr = 2.0**BITS - 1.0
    step = tl.where(scale > 0, scale, 1.0)
    ratio = tl.minimum(tl.maximum(tl.div_rn(x - minimum, step), -1.0), TOP + 1.0)
    nearest = (ratio + ROUND) - ROUND
    return tl.minimum(tl.maximum(nearest, 0.0), TOP).to(tl.int32)


@triton.jit
def load_tokens(TOKENS, ROTATION, first, last, stride, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Tokens ``first .. first + R`` in float32 ``[R, DP]``, zero past ``D``; times ROTATION ``[D, D]``, if any.

    Tokens are ``stride`` elements apart; those past ``last`` are ``last`` once more, which changes no grid.
    """
    token = TOKENS + tl.minimum(first + tl.arange(0, R), last).to(tl.int64) * stride
    channel = tl.arange(0, DP)
    if ROTATION is None:
        inside = (channel < D)[None, :]
        x = tl.load(token[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.zeros([R, DP], tl.float32)
        some = tl.arange(0, 16)
        for start in tl.range(0, D, 16):
            part = start + some
            left = tl.load(token[:, None] + part[None, :], mask=(part < D)[None, :], other=0.0)
            right = tl.load(
                ROTATION + part[:, None] * D + channel[None, :],
                mask=(part < D)[:, None] & (channel < D)[None, :],
                other=0.0,
            )
            x = tl.dot(left.to(tl.float32), right, x, input_precision="ieee")
    return x


@triton.jit
def encode_tile(
    TOKENS,
    ROTATION,
    CODES,
    LOW,
    META,
    first,
    last,
    stride,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OUTWARD: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Encode tokens ``first .. first + TILE`` into one tile; the pointers are those of the row, head and tile.

    CHANNEL shares a scale along the tokens of a channel, else along the channels of a token, or of each of its GROUPS.
    TRANSPOSED stores words ``[D, R]``, else ``[R, D]``. The low bit of 3 goes to a plane of its own, at LOW.
    """
    MAIN: tl.constexpr = 2 if BITS == 3 else BITS
    R: tl.constexpr = TILE * MAIN // 16
    FIELDS: tl.constexpr = 16 // MAIN
    row = tl.arange(0, R)
    channel = tl.arange(0, DP)
    inside = (channel < D)[None, :]
    if CHANNEL:
        low = tl.full([DP], float("inf"), tl.float32)
        high = tl.full([DP], float("-inf"), tl.float32)
        for j in tl.static_range(FIELDS):
            x = load_tokens(TOKENS, ROTATION, first + j * R, last, stride, R, D, DP)
            low = tl.minimum(low, tl.min(x, 0))
            high = tl.maximum(high, tl.max(x, 0))
        scale, minimum = grid_of(low, high, BITS, OUTWARD)
        tl.store(META + channel, half_bits(scale) | (half_bits(minimum) << 16), mask=channel < D)
        wide_scale = tl.broadcast_to(scale.to(tl.float32)[None, :], R, DP)
        wide_minimum = tl.broadcast_to(minimum.to(tl.float32)[None, :], R, DP)
    words = tl.zeros([R, DP], tl.int32)
    low_words = tl.zeros([R, DP], tl.int32)
    for j in tl.static_range(FIELDS):
        x = load_tokens(TOKENS, ROTATION, first + j * R, last, stride, R, D, DP)
        if not CHANNEL and GROUPS > 1:
            tl.static_assert(D == DP, "groups of channels fill a token")
            parts = tl.reshape(x, [R, GROUPS, D // GROUPS])
            scale, minimum = grid_of(tl.min(parts, 2), tl.max(parts, 2), BITS, OUTWARD)
            place = META + (tl.arange(0, GROUPS) * TILE)[None, :] + (j * R + row)[:, None]
            tl.store(place, half_bits(scale) | (half_bits(minimum) << 16))
            wide_scale = _over_groups(scale.to(tl.float32), R, GROUPS, DP)
            wide_minimum = _over_groups(minimum.to(tl.float32), R, GROUPS, DP)
        elif not CHANNEL:
            low = tl.min(tl.where(inside, x, float("inf")), 1)
            high = tl.max(tl.where(inside, x, float("-inf")), 1)
            scale, minimum = grid_of(low, high, BITS, OUTWARD)
            tl.store(META + j * R + row, half_bits(scale) | (half_bits(minimum) << 16))
            wide_scale = tl.broadcast_to(scale.to(tl.float32)[:, None], R, DP)
            wide_minimum = tl.broadcast_to(minimum.to(tl.float32)[:, None], R, DP)
        codes = codes_of(x, wide_scale, wide_minimum, BITS)
        if BITS == 3:
            words = words | ((codes >> 1) << (2 * j))
            low_words = low_words | ((codes & 1) << (2 * j))
        else:
            words = words | (codes << (BITS * j))
    _store_words(CODES, words, R, TRANSPOSED, D, DP)
    if BITS == 3:
        # fields of 1 bit are half as long: the second half of the rows is the next field
        HALF: tl.constexpr = R // 2
        halves = tl.reshape(low_words << (row // HALF)[:, None], [2, HALF, DP])
        _store_words(LOW, tl.sum(halves, 0), HALF, TRANSPOSED, D, DP)  # no two have a bit in common


@triton.jit
def _over_groups(x, R: tl.constexpr, GROUPS: tl.constexpr, DP: tl.constexpr):
    """``[R, GROUPS]`` to ``[R, DP]``, each number for all channels of its group."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], R, GROUPS, DP // GROUPS), [R, DP])


@triton.jit
def _store_words(CODES, words, R: tl.constexpr, TRANSPOSED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    row = tl.arange(0, R)
    channel = tl.arange(0, DP)
    if TRANSPOSED:
        where = channel[None, :] * R + row[:, None]
    else:
        where = row[:, None] * D + channel[None, :]
    tl.store(CODES + where, words.to(tl.int16), mask=tl.broadcast_to((channel < D)[None, :], R, DP))


@triton.jit
def pool_tile(IDS, place, RUNS: tl.constexpr):
    """int64 pool index of the tile at ``place`` of a table; with RUNS that place itself."""
    if RUNS:
        return place
    else:
        return tl.load(IDS + place).to(tl.int64)


@triton.jit(do_not_specialize=["length"])
def encode_kernel(
    TOKENS,
    ROTATION,
    CODES,
    LOW,
    META,
    IDS,
    heads,
    length,
    stride_b,
    stride_h,
    stride_t,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OUTWARD: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Grid ``[tiles, B * H_kv]``: a tile of ``[B, H_kv, length, D]`` each; ``encode.py`` has the arguments."""
    number = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    head = (program % heads).to(tl.int64)
    tile = pool_tile(IDS, program.to(tl.int64) * tl.num_programs(0) + number, IDS is None)
    META_SIZE: tl.constexpr = D if CHANNEL else GROUPS * TILE
    if tile >= 0:
        encode_tile(
            TOKENS + row * stride_b + head * stride_h, ROTATION,
            CODES + tile * (TILE * (2 if BITS == 3 else BITS) // 16 * D), LOW if LOW is None else LOW + tile * (TILE // 16 * D),
            META + tile * META_SIZE, number * TILE, length - 1, stride_t, BITS, CHANNEL, GROUPS, TRANSPOSED, OUTWARD,
            TILE, D, DP,
        )  # fmt: skip
