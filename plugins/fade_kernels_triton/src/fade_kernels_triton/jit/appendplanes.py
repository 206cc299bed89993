"""The append kernel of calibrated tiers: as ``jit/append.py``, for codes in planes of 2 bits (``PlaneLayout``).

Grid ``[B * H_kv]``. A head's planes may lie in the tiles of other heads of its row, in places that no other program reads or
writes. Heads that are coded together are written at the same number, so that a program knows that of all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.append import (
    close_gaps,
    due_tiles,
    send_notes,
    send_positions,
    take_ticket,
    write_positions,
    write_tokens,
)
from fade_kernels_triton.jit.encode import pool_tile
from fade_kernels_triton.jit.encodeplanes import encode_planes


@triton.jit(do_not_specialize=["capacity", "max_tiles", "threshold", "n_sink", "count"])
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
    COUNTERS,
    IDS,
    USED,
    RESERVED,
    POSITIONS,
    STARTS,
    TILE_POSITIONS,
    WINDOW_NOTES,
    TILE_NOTES,
    KEY_TABLE,
    KEY_SLOTS,
    KEY_WIDTHS,
    KEY_STEPS,
    KEY_WORTH,
    KEY_MEAN,
    KEY_FORWARD,
    KEY_DEVIATION,
    KEY_USUAL,
    VALUE_TABLE,
    VALUE_SLOTS,
    VALUE_WIDTHS,
    VALUE_STEPS,
    VALUE_WORTH,
    VALUE_MEAN,
    VALUE_FORWARD,
    VALUE_DEVIATION,
    VALUE_USUAL,
    heads,
    count,
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
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    KEY_GAINS: tl.constexpr,
    VALUE_GAINS: tl.constexpr,
    KEY_KEPT: tl.constexpr,
    VALUE_KEPT: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    ZERO: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """One row and head; ``append.py`` has the arguments. GAINS: zero, steps, first one tried, how many.

    KEPT: as ``encode_planes`` has it.
    """
    program = tl.program_id(0)
    row = (program // heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    head = (program % heads).to(tl.int64)
    bh = program.to(tl.int64)
    length = tl.load(LENGTHS + bh)
    used = tl.load(USED + bh)
    ahead = tl.load(RESERVED + bh) - used
    ticket = take_ticket(COUNTERS, head == 0)
    keys = W_KEYS + bh * capacity * D
    values = W_VALUES + bh * capacity * D
    positions = POSITIONS + row * capacity
    due = due_tiles(length, used, used + ahead, threshold, n_sink, capacity, TILE)
    tl.debug_barrier()  # all have read what the program writes at its end
    if due > 0:
        tiles = bh * max_tiles
        for number in tl.range(0, due):
            tile = pool_tile(IDS, tiles + used + number, RUNS)
            of_row = row * heads * max_tiles + used + number  # head 0's place in the table
            first = n_sink + number * TILE
            encode_planes(
                keys, KEY_CODES, KEY_GAIN + tile * (TILE // 2), IDS, of_row, max_tiles, KEY_TABLE, KEY_SLOTS, KEY_WIDTHS,
                KEY_STEPS, KEY_WORTH, KEY_MEAN, KEY_FORWARD, KEY_DEVIATION, KEY_USUAL, head, first, length - 1, D, key_kept,
                key_row, KEY_PLANES, False, KEY_GAINS[0], KEY_GAINS[1], KEY_GAINS[2], KEY_GAINS[3], RUNS, TILE, D,
                KEY_KEPT,
            )  # fmt: skip
            encode_planes(
                values, VALUE_CODES, VALUE_GAIN + tile * (TILE // 2), IDS, of_row, max_tiles, VALUE_TABLE, VALUE_SLOTS,
                VALUE_WIDTHS, VALUE_STEPS, VALUE_WORTH, VALUE_MEAN, VALUE_FORWARD, VALUE_DEVIATION, VALUE_USUAL, head, first,
                length - 1, D, value_kept, value_row, VALUE_PLANES, True, VALUE_GAINS[0], VALUE_GAINS[1], VALUE_GAINS[2],
                VALUE_GAINS[3], RUNS, TILE, D, VALUE_KEPT,
            )  # fmt: skip
        send_notes(WINDOW_NOTES, TILE_NOTES, bh, tiles, used, due, n_sink, length, capacity, TILE)
        if head == 0:
            send_positions(
                positions, STARTS, TILE_POSITIONS, RESERVED, bh, heads, max_tiles, ahead, due, n_sink, length, capacity, TILE,
            )  # fmt: skip
        length = close_gaps(keys, values, n_sink, length, due * TILE, capacity, BLOCK, D, DP)
        tl.store(USED + bh, used + due)
    write_tokens(
        KEYS + row * key_stride_b + head * key_stride_h, VALUES + row * value_stride_b + head * value_stride_h, keys, values,
        WINDOW_NOTES, LENGTHS, COUNTERS, bh, length, count, capacity, key_stride_t, value_stride_t, ZERO, D, DP,
    )  # fmt: skip
    if head == 0:
        write_positions(positions, COUNTERS, ticket, length, count, tl.num_programs(0) // heads, capacity, MOST)
