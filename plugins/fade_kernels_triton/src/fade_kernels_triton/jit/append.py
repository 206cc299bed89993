"""The append kernel: one new token into the window, and the oldest tile out of it where the window is full.

Grid ``[B * H_kv]``: a program owns one row and head, its length and its number of tiles, so that nothing is shared and
nothing is read back. Most steps write one token and end; where the length has reached the threshold, the program encodes
the oldest tile, closes the gap behind the sinks, and then writes the token.

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
def load_tokens(WINDOW, ROTATION, first, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Window tokens ``first .. first + R`` in float32 ``[R, DP]``, zero past ``D``; times ROTATION ``[D, D]``, if any."""
    row = tl.arange(0, R)
    channel = tl.arange(0, DP)
    if ROTATION is None:
        inside = (channel < D)[None, :]
        x = tl.load(WINDOW + (first + row)[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.zeros([R, DP], tl.float32)
        some = tl.arange(0, 16)
        for start in tl.range(0, D, 16):
            part = start + some
            left = tl.load(WINDOW + (first + row)[:, None] * D + part[None, :], mask=(part < D)[None, :], other=0.0)
            right = tl.load(
                ROTATION + part[:, None] * D + channel[None, :],
                mask=(part < D)[:, None] & (channel < D)[None, :],
                other=0.0,
            )
            x = tl.dot(left.to(tl.float32), right, x, input_precision="ieee")
    return x


@triton.jit
def encode_tile(
    WINDOW,
    ROTATION,
    CODES,
    META,
    first,
    BITS: tl.constexpr,
    CHANNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OUTWARD: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Encode window tokens ``first .. first + TILE`` into one tile; the pointers are those of the row, head and tile.

    CHANNEL shares a scale along the tokens of a channel, else along the channels of a token. TRANSPOSED stores words
    ``[D, R]``, else ``[R, D]``.
    """
    R: tl.constexpr = TILE * BITS // 16
    FIELDS: tl.constexpr = 16 // BITS
    row = tl.arange(0, R)
    channel = tl.arange(0, DP)
    inside = (channel < D)[None, :]
    if CHANNEL:
        low = tl.full([DP], float("inf"), tl.float32)
        high = tl.full([DP], float("-inf"), tl.float32)
        for j in tl.static_range(FIELDS):
            x = load_tokens(WINDOW, ROTATION, first + j * R, R, D, DP)
            low = tl.minimum(low, tl.min(x, 0))
            high = tl.maximum(high, tl.max(x, 0))
        scale, minimum = grid_of(low, high, BITS, OUTWARD)
        tl.store(META + channel, half_bits(scale) | (half_bits(minimum) << 16), mask=channel < D)
        wide_scale = tl.broadcast_to(scale.to(tl.float32)[None, :], R, DP)
        wide_minimum = tl.broadcast_to(minimum.to(tl.float32)[None, :], R, DP)
    words = tl.zeros([R, DP], tl.int32)
    for j in tl.static_range(FIELDS):
        x = load_tokens(WINDOW, ROTATION, first + j * R, R, D, DP)
        if not CHANNEL:
            low = tl.min(tl.where(inside, x, float("inf")), 1)
            high = tl.max(tl.where(inside, x, float("-inf")), 1)
            scale, minimum = grid_of(low, high, BITS, OUTWARD)
            tl.store(META + j * R + row, half_bits(scale) | (half_bits(minimum) << 16))
            wide_scale = tl.broadcast_to(scale.to(tl.float32)[:, None], R, DP)
            wide_minimum = tl.broadcast_to(minimum.to(tl.float32)[:, None], R, DP)
        words = words | (codes_of(x, wide_scale, wide_minimum, BITS) << (BITS * j))
    if TRANSPOSED:
        where = channel[None, :] * R + row[:, None]
    else:
        where = row[:, None] * D + channel[None, :]
    tl.store(CODES + where, words.to(tl.int16), mask=tl.broadcast_to(inside, R, DP))


@triton.jit
def close_gap(
    WINDOW, first, length, TILE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Move tokens ``first + TILE .. length`` down by a tile. A block is read by all before it is written over."""
    token = tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    for start in tl.range(first + TILE, length, BLOCK):
        here = start + token
        mask = (here < length)[:, None] & (channel < D)[None, :]
        at = WINDOW + here[:, None] * D + channel[None, :]
        x = tl.load(at, mask=mask, other=0.0)
        tl.debug_barrier()
        tl.store(at - TILE * D, x, mask=mask)
        tl.debug_barrier()


@triton.jit
def write_token(NEW, WINDOW, slot, COUNTERS, ZERO: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Write one token; NaN and infinity become zeros, or the token is counted once in ``COUNTERS[1]``."""
    channel = tl.arange(0, DP)
    x = tl.load(NEW + channel, mask=channel < D, other=0.0)
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    if ZERO:
        x = tl.where(finite, x, 0.0).to(x.dtype)
    else:
        bad = tl.sum(tl.where(finite, 0, 1), 0)
        tl.atomic_add(COUNTERS + 1, (bad > 0).to(tl.int64), mask=bad > 0)
    tl.store(WINDOW + slot * D + channel, x, mask=channel < D)


@triton.jit(do_not_specialize=["capacity", "max_tiles", "threshold", "n_sink"])
def append_kernel(
    KEYS,
    VALUES,
    W_KEYS,
    W_VALUES,
    KEY_CODES,
    KEY_META,
    VALUE_CODES,
    VALUE_META,
    LENGTHS,
    USED,
    COUNTERS,
    KEY_ROTATION,
    VALUE_ROTATION,
    heads,
    capacity,
    max_tiles,
    threshold,
    n_sink,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_CHANNEL: tl.constexpr,
    KEY_OUTWARD: tl.constexpr,
    VALUE_OUTWARD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """One row and head; ``append.py`` has the arguments."""
    bh = tl.program_id(0).to(tl.int64)
    row = bh // heads
    head = bh % heads
    length = tl.load(LENGTHS + bh)
    used = tl.load(USED + bh)
    keys = W_KEYS + bh * capacity * D
    values = W_VALUES + bh * capacity * D
    tl.debug_barrier()  # all have read what the program writes at its end
    if (length >= threshold) & (used < max_tiles):
        tile = bh * max_tiles + used
        KEY_META_SIZE: tl.constexpr = D if KEY_CHANNEL else TILE
        encode_tile(
            keys, KEY_ROTATION, KEY_CODES + tile * (TILE * KEY_BITS // 16 * D), KEY_META + tile * KEY_META_SIZE, n_sink,
            KEY_BITS, KEY_CHANNEL, False, KEY_OUTWARD, TILE, D, DP,
        )  # fmt: skip
        encode_tile(
            values, VALUE_ROTATION, VALUE_CODES + tile * (TILE * VALUE_BITS // 16 * D), VALUE_META + tile * TILE, n_sink,
            VALUE_BITS, False, True, VALUE_OUTWARD, TILE, D, DP,
        )  # fmt: skip
        tl.debug_barrier()
        close_gap(keys, n_sink, length, TILE, BLOCK, D, DP)
        close_gap(values, n_sink, length, TILE, BLOCK, D, DP)
        length = length - TILE
        tl.store(USED + bh, used + 1)
    slot = tl.minimum(length, capacity - 1)
    write_token(KEYS + row * key_stride_b + head * key_stride_h, keys, slot, COUNTERS, ZERO, D, DP)
    write_token(VALUES + row * value_stride_b + head * value_stride_h, values, slot, COUNTERS, ZERO, D, DP)
    tl.store(LENGTHS + bh, length + 1)
    tl.atomic_add(COUNTERS, 1, mask=bh == 0)
