"""The append kernel of calibrated tiers: as ``jit/append.py``, for codes in planes of 2 bits (``PlaneLayout``).

Grid ``[B * H_kv]``. A head's planes may lie in other heads' rows of the tile, which no other program reads or writes: heads
that are coded together are of one length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.append import close_gaps, write_tokens
from fade_kernels_triton.jit.encodeplanes import encode_planes


@triton.jit(do_not_specialize=["capacity", "max_tiles", "threshold", "n_sink"])
def append_planes_kernel(
    KEYS,
    VALUES,
    W_KEYS,
    W_VALUES,
    KEY_CODES,
    KEY_GAIN,
    VALUE_CODES,
    VALUE_GAIN,
    LENGTHS,
    USED,
    COUNTERS,
    KEY_TABLE,
    KEY_SCALES,
    KEY_WORTH,
    KEY_MEAN,
    KEY_FORWARD,
    KEY_DEVIATION,
    KEY_USUAL,
    VALUE_TABLE,
    VALUE_SCALES,
    VALUE_WORTH,
    VALUE_MEAN,
    VALUE_FORWARD,
    VALUE_DEVIATION,
    VALUE_USUAL,
    heads,
    capacity,
    max_tiles,
    threshold,
    n_sink,
    key_kept,
    value_kept,
    key_row,
    value_row,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_GAINS: tl.constexpr,
    VALUE_GAINS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """One row and head; ``append.py`` has the arguments. GAINS: zero, steps, first one tried, how many."""
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
        first = row * heads * max_tiles + used  # head 0's tile
        gains = (bh * max_tiles + used) * (TILE // 2)
        encode_planes(
            keys, KEY_CODES + first * key_row, KEY_GAIN + gains, KEY_TABLE, KEY_SCALES, KEY_WORTH, KEY_MEAN, KEY_FORWARD,
            KEY_DEVIATION, KEY_USUAL, head, n_sink, length - 1, D, key_kept, key_row, (max_tiles * key_row).to(tl.int64),
            KEY_PLANES, False, KEY_GAINS[0], KEY_GAINS[1], KEY_GAINS[2], KEY_GAINS[3], TILE, D,
        )  # fmt: skip
        encode_planes(
            values, VALUE_CODES + first * value_row, VALUE_GAIN + gains, VALUE_TABLE, VALUE_SCALES, VALUE_WORTH, VALUE_MEAN,
            VALUE_FORWARD, VALUE_DEVIATION, VALUE_USUAL, head, n_sink, length - 1, D, value_kept, value_row,
            (max_tiles * value_row).to(tl.int64), VALUE_PLANES, True, VALUE_GAINS[0], VALUE_GAINS[1], VALUE_GAINS[2],
            VALUE_GAINS[3], TILE, D,
        )  # fmt: skip
        length = close_gaps(keys, values, n_sink, length, TILE, BLOCK, D, DP)
        tl.store(USED + bh, used + 1)
    write_tokens(
        KEYS + row * key_stride_b + head * key_stride_h, VALUES + row * value_stride_b + head * value_stride_h, keys, values,
        LENGTHS, COUNTERS, bh, length, capacity, ZERO, D, DP,
    )  # fmt: skip
