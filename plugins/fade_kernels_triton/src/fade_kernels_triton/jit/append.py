"""The append kernel: one new token into the window, and the oldest tile out of it where the window is full.

Grid ``[B * H_kv]``: a program owns one row and head, its length and its number of tiles, so that nothing is shared and
nothing is read back. Most steps write one token and end; where the length has reached the threshold, the program encodes
the oldest tile, closes the gap behind the sinks, and then writes the token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.encode import encode_tile


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


@triton.jit
def close_gaps(
    keys, values, first, length, TILE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Close the gap that an encoded tile leaves in both windows; the length after it."""
    tl.debug_barrier()
    close_gap(keys, first, length, TILE, BLOCK, D, DP)
    close_gap(values, first, length, TILE, BLOCK, D, DP)
    return length - TILE


@triton.jit
def write_tokens(
    KEY, VALUE, keys, values, LENGTHS, COUNTERS, bh, length, capacity, ZERO: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Write the new key and value of row and head ``bh`` behind its window, and what has become of length and counters."""
    slot = tl.minimum(length, capacity - 1)
    write_token(KEY, keys, slot, COUNTERS, ZERO, D, DP)
    write_token(VALUE, values, slot, COUNTERS, ZERO, D, DP)
    tl.store(LENGTHS + bh, length + 1)
    tl.atomic_add(COUNTERS, 1, mask=bh == 0)


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
    program = tl.program_id(0)
    row = (program // heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    head = (program % heads).to(tl.int64)
    bh = program.to(tl.int64)
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
            length - 1, D, KEY_BITS, KEY_CHANNEL, False, KEY_OUTWARD, TILE, D, DP,
        )  # fmt: skip
        encode_tile(
            values, VALUE_ROTATION, VALUE_CODES + tile * (TILE * VALUE_BITS // 16 * D), VALUE_META + tile * TILE, n_sink,
            length - 1, D, VALUE_BITS, False, True, VALUE_OUTWARD, TILE, D, DP,
        )  # fmt: skip
        length = close_gaps(keys, values, n_sink, length, TILE, BLOCK, D, DP)
        tl.store(USED + bh, used + 1)
    write_tokens(
        KEYS + row * key_stride_b + head * key_stride_h, VALUES + row * value_stride_b + head * value_stride_h, keys, values,
        LENGTHS, COUNTERS, bh, length, capacity, ZERO, D, DP,
    )  # fmt: skip
