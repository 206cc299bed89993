"""The append kernel: new tokens into the window, and the oldest tiles out of it where the window is full.

Grid ``[B * H_kv]``: a program owns one row and head, its length and its number of tiles, so that nothing is read back. Most
steps write their tokens and end; where the length has reached the threshold, the program encodes the oldest tiles into the
pool, closes the gap behind the sinks, and then writes the tokens.

What the heads of a row share is nobody's but head 0's: its program alone reads and writes the positions of the row's window
and what is noted of them beside the tiles of every head, so that no other program reads positions that are being moved. How
many tiles another head has it does not read (that head's program may have counted on already): it knows it from ``RESERVED``,
which nobody writes, since heads of a row have the same number of reserved tiles ahead. The logical length is shared by all
rows: ``take_ticket`` says how it is read by all before it is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.encode import encode_tile, pool_tile

TICKET = tl.constexpr(1 << 32)
"""What a program adds to the logical length to say that it has read it."""


@triton.jit
def due_tiles(length, used, reserved, threshold, n_sink, capacity, TILE: tl.constexpr):
    """Tiles that leave a window of ``length`` tokens before the next ones come."""
    over = (length - threshold + TILE) // TILE  # of what is below 0 rounds to 0
    inside = (capacity - n_sink) // TILE
    due = tl.minimum(tl.minimum(over, inside), reserved - used)
    return tl.where(length >= threshold, tl.maximum(due, 0), 0)


@triton.jit
def close_gap(
    WINDOW, first, length, shift, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Move tokens ``first + shift .. length`` down by ``shift``. A block is read by all before it is written over."""
    token = tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    for start in tl.range(first + shift, length, BLOCK):
        here = start + token
        mask = (here < length)[:, None] & (channel < D)[None, :]
        at = WINDOW + here[:, None] * D + channel[None, :]
        x = tl.load(at, mask=mask, other=0.0)
        tl.debug_barrier()
        tl.store(at - shift * D, x, mask=mask)
        tl.debug_barrier()


@triton.jit
def close_numbers(NUMBERS, first, length, shift, BLOCK: tl.constexpr):
    """``close_gap`` for one number of 4 bytes a token."""
    token = tl.arange(0, BLOCK)
    for start in tl.range(first + shift, length, BLOCK):
        here = start + token
        x = tl.load(NUMBERS + here, mask=here < length, other=0)
        tl.debug_barrier()
        tl.store(NUMBERS + here - shift, x, mask=here < length)
        tl.debug_barrier()


@triton.jit
def close_gaps(
    keys, values, first, length, shift, capacity, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Close the gap that encoded tiles of ``shift`` tokens leave in both windows; the length after it."""
    held = tl.minimum(length, capacity)
    tl.debug_barrier()
    close_gap(keys, first, held, shift, BLOCK, D, DP)
    close_gap(values, first, held, shift, BLOCK, D, DP)
    return length - shift


@triton.jit
def send_notes(
    WINDOW_NOTES, TILE_NOTES, bh, tiles, used, due, first, length, capacity, TILE: tl.constexpr
):  # fmt: skip
    """What is noted of the tokens of the ``due`` oldest tiles of row and head ``bh`` goes with them."""
    token = tl.arange(0, TILE)
    for j in tl.static_range(len(WINDOW_NOTES)):
        recent = WINDOW_NOTES[j] + bh * capacity
        for number in tl.range(0, due):
            x = tl.load(recent + first + number * TILE + token)
            tl.store(TILE_NOTES[j] + (tiles + used + number) * TILE + token, x)
        tl.debug_barrier()
        close_numbers(recent, first, tl.minimum(length, capacity), due * TILE, TILE)


@triton.jit
def send_positions(
    POSITIONS, STARTS, TILE_POSITIONS, RESERVED, bh, heads, max_tiles, ahead, due, first, length, capacity,
    TILE: tl.constexpr,
):  # fmt: skip
    """Positions of the ``due`` oldest tiles of a row go with them, for all its heads; by the program of head 0, ``bh``.

    Heads have the same number of tiles ``ahead``: what is reserved tells how many each uses.
    """
    token = tl.arange(0, TILE)
    for number in tl.range(0, due):
        here = POSITIONS + first + number * TILE
        for head in tl.range(0, heads):
            place = (bh + head) * max_tiles + tl.load(RESERVED + bh + head) - ahead + number
            if STARTS is not None:
                tl.store(STARTS + place, tl.load(here))
            if TILE_POSITIONS is not None:
                tl.store(TILE_POSITIONS + place * TILE + token, tl.load(here + token))
    tl.debug_barrier()
    close_numbers(POSITIONS, first, tl.minimum(length, capacity), due * TILE, TILE)


@triton.jit
def take_ticket(COUNTERS, taken):
    """The counter of the logical length as the program finds it, if it is one that has ``taken`` a ticket with it.

    The programs of head 0 of each row read that length, and the last of them to do so sets it on (``write_positions``). Each
    adds one to the upper half of the counter as it reads the lower one: who finds all others there knows that nobody is left
    to read. One number's changes are in one order for all, so that no other order is asked for. The upper half is 0 again
    when the kernel ends.
    """
    return tl.atomic_add(COUNTERS, TICKET, mask=taken, sem="relaxed")


@triton.jit
def write_positions(POSITIONS, COUNTERS, ticket, length, count, rows, capacity, MOST: tl.constexpr):
    """Positions of a row's new tokens; the last of ``rows`` to take a ``ticket`` sets the logical length on by ``count``."""
    number = tl.arange(0, MOST)
    slot = tl.minimum(length + number, capacity - 1)
    tl.store(POSITIONS + slot, (ticket % TICKET).to(tl.int32) + number, mask=number < count)
    last = ticket // TICKET == rows - 1
    tl.atomic_add(COUNTERS, count - rows.to(tl.int64) * TICKET, mask=last, sem="relaxed")


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
def write_tokens(
    KEY, VALUE, keys, values, WINDOW_NOTES, LENGTHS, COUNTERS, bh, length, count, capacity, key_stride_t, value_stride_t,
    ZERO: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Write the new keys and values of row and head ``bh`` behind its window, noted as 0, and what has become of its length."""
    for token in tl.range(0, count):
        slot = tl.minimum(length + token, capacity - 1)
        write_token(KEY + token * key_stride_t, keys, slot, COUNTERS, ZERO, D, DP)
        write_token(VALUE + token * value_stride_t, values, slot, COUNTERS, ZERO, D, DP)
        for j in tl.static_range(len(WINDOW_NOTES)):
            tl.store(WINDOW_NOTES[j] + bh * capacity + slot, 0)
    tl.store(LENGTHS + bh, length + count)


@triton.jit(do_not_specialize=["capacity", "max_tiles", "threshold", "n_sink", "count"])
def append_kernel(
    KEYS,
    VALUES,
    W_KEYS,
    W_VALUES,
    KEY_CODES,
    KEY_LOW,
    KEY_META,
    VALUE_CODES,
    VALUE_LOW,
    VALUE_META,
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
    KEY_ROTATION,
    VALUE_ROTATION,
    heads,
    count,
    capacity,
    max_tiles,
    threshold,
    n_sink,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_CHANNEL: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_OUTWARD: tl.constexpr,
    VALUE_OUTWARD: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
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
    ahead = tl.load(RESERVED + bh) - used
    ticket = take_ticket(COUNTERS, head == 0)
    keys = W_KEYS + bh * capacity * D
    values = W_VALUES + bh * capacity * D
    positions = POSITIONS + row * capacity
    due = due_tiles(length, used, used + ahead, threshold, n_sink, capacity, TILE)
    tl.debug_barrier()  # all have read what the program writes at its end
    if due > 0:
        tiles = bh * max_tiles
        KEY_META_SIZE: tl.constexpr = D if KEY_CHANNEL else TILE
        for number in tl.range(0, due):
            tile = pool_tile(IDS, tiles + used + number, RUNS)
            first = n_sink + number * TILE
            encode_tile(
                keys, KEY_ROTATION, KEY_CODES + tile * (TILE * (2 if KEY_BITS == 3 else KEY_BITS) // 16 * D),
                KEY_LOW if KEY_LOW is None else KEY_LOW + tile * (TILE // 16 * D), KEY_META + tile * KEY_META_SIZE, first,
                length - 1, D, KEY_BITS, KEY_CHANNEL, 1, False, KEY_OUTWARD, TILE, D, DP,
            )  # fmt: skip
            encode_tile(
                values, VALUE_ROTATION, VALUE_CODES + tile * (TILE * (2 if VALUE_BITS == 3 else VALUE_BITS) // 16 * D),
                VALUE_LOW if VALUE_LOW is None else VALUE_LOW + tile * (TILE // 16 * D),
                VALUE_META + tile * (VALUE_GROUPS * TILE), first, length - 1, D, VALUE_BITS, False, VALUE_GROUPS, True,
                VALUE_OUTWARD, TILE, D, DP,
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
