"""Attention over one tier whose channels have widths of their own: groups of 16 channels, one after another.

Grid ``[splits, B * H_kv]``; each program leaves a normalised output and its base-2 log-sum-exp, as ``decode_kernel`` does,
and ``merge_kernel`` merges them. Queries and outputs are in the space of the codes.

Codes of all heads of a layer lie in one stream of words a tile, which is cut into a row for each head: a block of words may
lie in any head's row, so the rows' tile ids are looked up for every word row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.decode import LOG2E, load_query, normalise
from fade_kernels_triton.jit.levels import look_up
from fade_kernels_triton.jit.packed import LOWEST, PROBABILITY_SHIFT

GROUP = tl.constexpr(16)
"""Channels that share a width and are read together."""

FACTS = tl.constexpr(8)
"""Numbers a group in the table that ``fade_kernels_triton.planes`` makes."""


@triton.jit
def locate(FACTS_OF, row, column, TRANSPOSED: tl.constexpr, ROW: tl.constexpr, ALIGNED: tl.constexpr,
           TILE: tl.constexpr, RUN: tl.constexpr):  # fmt: skip
    """Where a group's words are (head and offset in its row), each one's shift, whether they are stored, and their table.

    What is given can be broadcast to a block: ``[rows, channels]``, or TRANSPOSED ``[channels, rows]``. In ALIGNED blocks a
    word row (a channel, TRANSPOSED) lies in one head's row. RUN is how many words of a channel certainly follow one another.
    """
    word = tl.load(FACTS_OF)
    step = tl.load(FACTS_OF + 1)
    bits = tl.load(FACTS_OF + 2)
    rows = tl.maximum(TILE * bits // 16, 1)
    word_row = row & (rows - 1)
    shift = 4 - bits - bits * (row // rows)
    if TRANSPOSED:
        first = word + column * rows
        if ALIGNED:
            first = tl.multiple_of(first, RUN)
            head = (first // ROW)[:, None]
            offset = (first % ROW)[:, None] + tl.max_contiguous(tl.multiple_of(word_row, RUN), RUN)[None, :]
        else:
            words = first[:, None] + word_row[None, :]
            head = words // ROW
            offset = words % ROW
        shift = shift[None, :]
    else:
        first = word + word_row * step
        if ALIGNED:
            first = tl.multiple_of(first, GROUP)
            head = (first // ROW)[:, None]
            offset = tl.multiple_of(first % ROW, GROUP)[:, None] + column[None, :]
        else:
            words = first[:, None] + column[None, :]
            head = words // ROW
            offset = words % ROW
        shift = shift[:, None]
    table = (tl.load(FACTS_OF + 3), tl.load(FACTS_OF + 4), tl.load(FACTS_OF + 5), tl.load(FACTS_OF + 6),
             tl.load(FACTS_OF + 7))  # fmt: skip
    return head, offset, shift, bits > 0, table


@triton.jit
def load_words(CODES, TABLE, first, number, max_tiles, head, offset, stored, ROW: tl.constexpr):
    """A group's words of tile ``number``; 0 where the group is not stored."""
    if TABLE is None:
        tile = (first + head * max_tiles + number).to(tl.int64)
    else:
        tile = tl.load(TABLE + first + head * max_tiles + number, mask=stored, other=0).to(tl.int64)
    return tl.load(CODES + tile * ROW + offset, mask=stored, other=0)


@triton.jit
def load_gains(GAIN, tile, row, TILE: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr):
    """Gains of a tile's tokens but for the head's usual one: a tuple of four ``[TILE / 4]``, quarter by quarter."""
    R: tl.constexpr = TILE // 4
    start = GAIN + tile * (TILE // 2) + row
    first = tl.load(start).to(tl.int32)
    second = tl.load(start + R).to(tl.int32)
    codes = (first & 15, second & 15, first >> 4, second >> 4)
    gains = ()
    for i in tl.static_range(4):
        gains = gains + (tl.exp2((codes[i].to(tl.float32) - ZERO) / STEPS),)
    return gains


@triton.jit(do_not_specialize=["max_tiles", "splits"])
def planes_kernel(
    QUERY,
    KEY_CODES,
    KEY_GAIN,
    KEY_FACTS,
    KEY_USUAL,
    VALUE_CODES,
    VALUE_GAIN,
    VALUE_FACTS,
    VALUE_USUAL,
    TABLE,
    COUNT,
    VALID,
    PART,
    PART_LSE,
    kv_heads,
    max_tiles,
    splits,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_ROW: tl.constexpr,
    KEY_ALIGNED: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    VALUE_ALIGNED: tl.constexpr,
    VALUE_RUN: tl.constexpr,
    TILE: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    KEY_STEPS: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One split of one row and KV head; see the module for the grid and ``planes.py`` for the arguments."""
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch_row = bh // kv_heads
    kv_head = bh % kv_heads
    R: tl.constexpr = TILE // 4
    KEPT: tl.constexpr = KEY_GROUPS * GROUP
    COLUMNS: tl.constexpr = Q_LEN * HEADS

    column = tl.arange(0, N)
    channel = tl.arange(0, GROUP)
    row = tl.arange(0, R)
    whole = load_query(
        QUERY, batch_row, kv_head, query_stride_b, query_stride_h, query_stride_q, HEADS, Q_LEN, KEPT, KEY_PADDED, N
    )
    _, norm = normalise(whole)
    start_of_query = (
        QUERY + batch_row * query_stride_b + (kv_head * HEADS + column % HEADS) * query_stride_h
        + (column // HEADS) * query_stride_q
    )  # fmt: skip
    scale = norm * (tl.exp2(tl.load(KEY_USUAL + kv_head)) * LOG2E)

    # each group's place and table, and the query's part of it
    key_facts = KEY_FACTS + kv_head * (KEY_GROUPS * FACTS)
    value_facts = VALUE_FACTS + kv_head * (VALUE_GROUPS * FACTS)
    key_place = ()
    query = ()
    for k in tl.static_range(KEY_GROUPS):
        place = locate(key_facts + k * FACTS, row, channel, False, KEY_ROW, KEY_ALIGNED, TILE, 1)
        key_place = key_place + (place,)
        part = tl.load(
            start_of_query[None, :] + (channel + k * GROUP)[:, None],
            mask=(column < COLUMNS)[None, :] & place[3],
            other=0.0,
        )
        query = query + ((part.to(tl.float32) / norm[None, :]).to(tl.float16),)
    value_place = ()
    out = ()
    for k in tl.static_range(VALUE_GROUPS):
        place = locate(value_facts + k * FACTS, row, channel, True, VALUE_ROW, VALUE_ALIGNED, TILE, VALUE_RUN)
        value_place = value_place + (place,)
        out = out + (tl.zeros([GROUP, N], tl.float32),)

    count = tl.load(COUNT + bh)
    start = count * split // splits
    stop = count * (split + 1) // splits
    tiles_of_row = batch_row * kv_heads * max_tiles
    own_tiles = bh * max_tiles

    peak = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([R, N], tl.float32)
    for number in tl.range(start, stop, num_stages=STAGES):
        if TABLE is None:
            tile = own_tiles + number
        else:
            tile = tl.load(TABLE + own_tiles + number).to(tl.int64)

        # scores, quarter by quarter of the tile
        score = (
            tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32),
            tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32),
        )  # fmt: skip
        for k in tl.static_range(KEY_GROUPS):
            head, offset, shift, stored, table = key_place[k]
            words = load_words(KEY_CODES, TABLE, tiles_of_row, number, max_tiles, head, offset, stored, KEY_ROW)
            levels = look_up(words, tl.broadcast_to(shift, R, GROUP), table, INTERPRET)
            score = (
                tl.dot(levels[0], query[k], score[0]), tl.dot(levels[1], query[k], score[1]),
                tl.dot(levels[2], query[k], score[2]), tl.dot(levels[3], query[k], score[3]),
            )  # fmt: skip
        gains = load_gains(KEY_GAIN, tile, row, TILE, KEY_ZERO, KEY_STEPS)
        logit = ()
        for i in tl.static_range(4):
            s = score[i] * gains[i][:, None]
            if VALID is not None:
                live = tl.load(VALID + own_tiles + number)
                s = tl.where((row + i * R)[:, None] < live, s, float("-inf"))
            logit = logit + (s,)
        best = tl.maximum(tl.maximum(logit[0], logit[1]), tl.maximum(logit[2], logit[3]))
        new_peak = tl.maximum(peak, tl.max(best, 0))
        shrink = tl.exp2((peak - new_peak) * scale)
        peak = new_peak

        # probabilities, and those times the values' gains
        gains = load_gains(VALUE_GAIN, tile, row, TILE, VALUE_ZERO, VALUE_STEPS)
        total = total * shrink[None, :]
        weight = ()
        for i in tl.static_range(4):
            w = tl.exp2(logit[i] * scale[None, :] - (peak * scale)[None, :])
            total += w
            weight = weight + ((w * (gains[i] * PROBABILITY_SHIFT)[:, None]).to(tl.float16),)

        # values
        moved = ()
        for k in tl.static_range(VALUE_GROUPS):
            head, offset, shift, stored, table = value_place[k]
            words = load_words(VALUE_CODES, TABLE, tiles_of_row, number, max_tiles, head, offset, stored, VALUE_ROW)
            levels = look_up(words, tl.broadcast_to(shift, GROUP, R), table, INTERPRET)
            part = tl.dot(levels[0], weight[0])
            part = tl.dot(levels[1], weight[1], part)
            part = tl.dot(levels[2], weight[2], part)
            part = tl.dot(levels[3], weight[3], part)
            moved = moved + (out[k] * shrink[None, :] + part,)
        out = moved

    mass = tl.sum(total, 0)
    live = mass > 0
    inverse = tl.where(live, 1.0 / tl.where(live, mass, 1.0), 0.0)
    inverse = inverse * (tl.exp2(tl.load(VALUE_USUAL + kv_head)) / PROBABILITY_SHIFT)
    lse = tl.where(live, peak * scale + tl.log2(tl.where(live, mass, 1.0)), float("-inf"))
    part_column = (bh * splits + split) * COLUMNS + column
    for k in tl.static_range(VALUE_GROUPS):
        tl.store(
            PART + part_column[None, :] * (VALUE_GROUPS * GROUP) + (channel + k * GROUP)[:, None],
            tl.where(value_place[k][3], out[k] * inverse[None, :], 0.0),
            mask=tl.broadcast_to((column < COLUMNS)[None, :], GROUP, N),
        )
    tl.store(PART_LSE + part_column, lse, mask=column < COLUMNS)
