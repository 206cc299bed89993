"""Attention over one tier whose codes are planes of 2 bits (``PlaneLayout``), in the space of those planes.

Grid ``[splits, B * H_kv]``. The splits of a row and head take its steps in turn; each leaves a normalised output and its base-2
log-sum-exp, as ``decode_kernel`` does, and
``finish_kernel`` merges them. Queries come from ``turn_kernel`` (``jit/turn.py``).

A step takes 128 tokens, one or two tiles. Row ``t * R + r`` of a plane's block of 16 word rows is word row ``r`` of the
step's tile ``t``, ``R = tile / 8``; field ``j`` of it is token ``j * R + r``. All slots of all planes are alike: a channel of 4
bits has two, and its query four times as large meets the high one; a slot of another head meets a query of 0.

The planes of a row lie in one stream of words a tile, which is cut into a row for each head: a word row may lie in any
head's row. Where each lies does not change from step to step.

Keys, values and queries are multiplied as in ``jit/packed.py``: keys and values are the M side, products of a step are summed
from zero. Codes are multiplied as they lie in the words, and what they lack to levels about 0 is made up for in the scores and
in the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.codes import SUBNORMAL_UNIT, unit, unpack
from fade_kernels_triton.jit.decode import LOG2E, prefetch
from fade_kernels_triton.jit.packed import LOWEST, PROBABILITY_SHIFT

MIDDLE = tl.constexpr(1.5)
"""The field that stands for 0."""

SHIFT_EXPONENT = tl.constexpr(6)
"""``log2(PROBABILITY_SHIFT)``."""


@triton.jit
def load_words(
    CODES, TABLE, place, base, heads, first, second, in_second, row, TILES: tl.constexpr, KEYS: tl.constexpr
):
    """A plane's block of words ``[16, 16]``.

    Args:
        place: without TABLE int32 ``[16, 16]``, where words are from ``base`` on; with it, which head's row each word row
            (KEYS) or channel is in, int32 ``[16]``, and where in it.
        base: without TABLE, where head 0's rows of the step's tiles begin, pointers ``[16]``, one a word row.
        heads: with TABLE, int64, where head 0's tiles begin in it, and how many a head has room for.
        first, second: the step's tiles.
        in_second: bool ``[16]``, word rows of the second one.
    """
    if TABLE is None:
        if KEYS:
            words = tl.load(base[:, None] + place)
        else:
            words = tl.load(base[None, :] + place)
    else:
        head, offset = place
        start = heads[0] + head * heads[1]
        if KEYS:
            number = first
            if TILES == 2:
                number = tl.where(in_second, second, first)
            tile = tl.load(TABLE + start + number).to(tl.int64)[:, None]
        else:
            tile = tl.load(TABLE + start + first).to(tl.int64)[:, None]
            if TILES == 2:
                other = tl.load(TABLE + start + second).to(tl.int64)[:, None]
                tile = tl.where(in_second[None, :], other, tile)
        words = tl.load(CODES + tile * row + offset)
    return words


@triton.jit
def gain_offset(LEAD: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr, j: tl.constexpr, WEIGHTS: tl.constexpr):
    """What the exponent of a gain lacks to ``(LEAD + code) / STEPS``; see ``load_gains``."""
    if WEIGHTS:
        return SHIFT_EXPONENT - 2 * j - (LEAD + ZERO) / STEPS
    else:
        return -(LEAD + ZERO) / STEPS


@triton.jit
def load_gains(GAIN, tile, word_row, TILE: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr,
               WEIGHTS: tl.constexpr):  # fmt: skip
    """Gains of tokens, but for their head's usual one: a tuple of eight ``[16]``, field by field.

    For WEIGHTS they are multiplied by PROBABILITY_SHIFT and divided by the place of their field in its byte. A
    code becomes a float without a conversion: its bits are put below an exponent that makes one step of it worth 1.
    """
    R: tl.constexpr = TILE // 8
    low = ()
    high = ()
    for j in tl.static_range(4):  # as words: what is copied ahead of its use is not smaller
        word = tl.load(GAIN + tile * (TILE // 8) + (word_row + j * R) // 4)
        byte = (word >> (8 * (word_row % 4))) << 15
        code = ((byte & 0x78000) | 0x43800000).to(tl.float32, bitcast=True)  # 256 + code
        low = low + (tl.exp2(code * (1.0 / STEPS) + gain_offset(256, ZERO, STEPS, j, WEIGHTS)),)
        code = ((byte & 0x780000) | 0x41800000).to(tl.float32, bitcast=True)  # 16 + code
        high = high + (tl.exp2(code * (1.0 / STEPS) + gain_offset(16, ZERO, STEPS, j, WEIGHTS)),)
    return low + high


@triton.jit(do_not_specialize=["max_tiles", "splits"])
def planes_kernel(
    TURNED,
    NORM,
    KEY_CODES,
    KEY_GAIN,
    KEY_TABLE,
    KEY_USUAL,
    VALUE_CODES,
    VALUE_GAIN,
    VALUE_TABLE,
    VALUE_USUAL,
    TABLE,
    COUNT,
    VALID,
    PART,
    PART_LSE,
    kv_heads,
    max_tiles,
    splits,
    key_row,
    value_row,
    COLUMNS: tl.constexpr,
    N: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    TILE: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    KEY_STEPS: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    KEY_AHEAD: tl.constexpr,
    VALUE_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One split of one row and KV head; see the module for the grid and ``planes.py`` for the arguments."""
    split = tl.program_id(0)
    program = tl.program_id(1)
    batch_row = (program // kv_heads).to(tl.int64)
    kv_head = (program % kv_heads).to(tl.int64)
    bh = program.to(tl.int64)
    TILES: tl.constexpr = 128 // TILE
    R: tl.constexpr = TILE // 8
    own = bh * max_tiles
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if KEY_AHEAD > 0 and VALUE_AHEAD > 0:
        if (split + 1) * TILES <= max_tiles:
            prefetch(KEY_CODES + (own + split * TILES) * key_row, KEY_AHEAD)
            prefetch(VALUE_CODES + (own + split * TILES) * value_row, VALUE_AHEAD)
    column = tl.arange(0, N)
    channel = tl.arange(0, 16)
    block_row = tl.arange(0, 16)
    word_row = block_row % R
    in_second = block_row >= R
    room = kv_heads * max_tiles
    heads = (batch_row * room, max_tiles)

    # where the words of each plane are
    key_place = ()
    for p in tl.static_range(KEY_PLANES):
        lead = tl.multiple_of(tl.load(KEY_TABLE + kv_head * KEY_PLANES + p) + word_row * 16, 16)
        head = lead // key_row
        offset = tl.multiple_of(lead % key_row, 16)
        if TABLE is None:
            key_place = key_place + (tl.multiple_of(head * (max_tiles * key_row) + offset, 16)[:, None]
                                     + channel[None, :],)  # fmt: skip
        else:
            key_place = key_place + ((head, offset[:, None] + channel[None, :]),)
    value_place = ()
    for p in tl.static_range(VALUE_PLANES):
        lead = tl.multiple_of(tl.load(VALUE_TABLE + kv_head * VALUE_PLANES + p) + channel * R, R)
        head = lead // value_row
        offset = tl.multiple_of(lead % value_row, R)
        if TABLE is None:
            value_place = value_place + (tl.multiple_of(head * (max_tiles * value_row) + offset, R)[:, None]
                                         + word_row[None, :],)  # fmt: skip
        else:
            value_place = value_place + ((head, offset[:, None] + word_row[None, :]),)
    usual = tl.load(KEY_USUAL + kv_head)

    if PDL:
        tl.extra.cuda.gdc_wait()  # until here only what no launch writes was read, and nothing written
    count = tl.load(COUNT + bh)
    queries = ()
    lacking = tl.zeros([16, N], tl.float32)
    for p in tl.static_range(KEY_PLANES):
        place = ((bh * COLUMNS + column) * KEY_PLANES + p)[None, :] * 16 + channel[:, None]
        query = tl.load(TURNED + place, mask=(column < COLUMNS)[None, :], other=0.0)
        lacking += query.to(tl.float32)
        queries = queries + (query,)
    bias = tl.sum(lacking, 0) * (-MIDDLE)
    scale = tl.load(NORM + bh * COLUMNS + column, mask=column < COLUMNS, other=1.0) * (tl.exp2(usual) * LOG2E)

    out = ()
    for _p in tl.static_range(VALUE_PLANES):
        out = out + (tl.zeros([16, N], tl.float32),)
    peak = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([16, N], tl.float32)
    shared = tl.zeros([16, N], tl.float32)  # weights as they were rounded, summed: all rows alike
    for step in tl.range(split * TILES, count, splits * TILES, num_stages=STAGES):
        # past the end the first tile of the step is read again, and its rows are struck out
        second = tl.where(step + 1 < count, step + 1, step)
        if TILES == 2:
            number = tl.where(in_second, second, step)
            present = (step + 1 < count) | (block_row < R)
        else:
            number = step + tl.zeros([16], tl.int32)
            present = None
        if TABLE is None:
            tile = own + number
            key_base = KEY_CODES + (heads[0] + number) * key_row
            value_base = VALUE_CODES + (heads[0] + number) * value_row
        else:
            tile = tl.load(TABLE + own + number).to(tl.int64)
            key_base = KEY_CODES
            value_base = VALUE_CODES

        # scores, field by field
        score = ()
        for _j in tl.static_range(8):
            score = score + (tl.zeros([16, N], tl.float32),)
        for p in tl.static_range(KEY_PLANES):
            fields = unpack(
                load_words(KEY_CODES, TABLE, key_place[p], key_base, heads, step, second, in_second, key_row, TILES, True),
                2, True, INTERPRET,
            )  # fmt: skip
            added = ()
            for j in tl.static_range(8):
                added = added + (tl.dot(fields[j], queries[p], score[j]),)
            score = added

        # `logit[j]` in the scale-free units of `peak`
        gains = load_gains(KEY_GAIN, tile, word_row, TILE, KEY_ZERO, KEY_STEPS, False)
        if VALID is not None:
            live = tl.load(VALID + own + number)
        logit = ()
        best = tl.full([16, N], float("-inf"), tl.float32)
        for j in tl.static_range(8):
            s = (score[j] * unit(2, j, True) + bias[None, :]) * gains[j][:, None]
            if VALID is not None:
                s = tl.where((word_row + j * R < live)[:, None], s, float("-inf"))
            best = tl.maximum(best, s)
            logit = logit + (s,)
        new_peak = tl.maximum(peak, tl.max(best, 0))
        shrink = tl.exp2((peak - new_peak) * scale)
        peak = new_peak

        # probabilities, and those times the values' gains
        gains = load_gains(VALUE_GAIN, tile, word_row, TILE, VALUE_ZERO, VALUE_STEPS, True)
        mass = tl.zeros([16, N], tl.float32)
        rounded = tl.zeros([16, N], tl.float32)
        weight = ()
        for j in tl.static_range(8):
            w = tl.exp2(logit[j] * scale[None, :] - (peak * scale)[None, :])
            mass += w
            gain = gains[j]
            if present is not None:
                gain = tl.where(present, gain, 0.0)
            share = (w * gain[:, None]).to(tl.float16)
            rounded = tl.dot(tl.full([16, 16], 1.0 / unit(2, j, False), tl.float16), share, rounded)
            weight = weight + (share,)
        if present is not None:
            mass = tl.where(present[:, None], mass, 0.0)
        total = total * shrink[None, :] + mass
        shared = shared * shrink[None, :] + rounded

        # values, two planes at a time: products of one need not wait for those of the other
        moved = ()
        for p in tl.static_range(0, VALUE_PLANES, 2):
            fields = unpack(
                load_words(VALUE_CODES, TABLE, value_place[p], value_base, heads, step, second, in_second, value_row,
                           TILES, False),
                2, True, INTERPRET,
            )  # fmt: skip
            part = tl.zeros([16, N], tl.float32)
            if p + 1 < VALUE_PLANES:
                next_fields = unpack(
                    load_words(VALUE_CODES, TABLE, value_place[p + 1], value_base, heads, step, second, in_second,
                               value_row, TILES, False),
                    2, True, INTERPRET,
                )  # fmt: skip
                next_part = tl.zeros([16, N], tl.float32)
                for j in tl.static_range(8):
                    part = tl.dot(fields[j], weight[j], part)
                    next_part = tl.dot(next_fields[j], weight[j], next_part)
                moved = moved + (out[p] * shrink[None, :] + part, out[p + 1] * shrink[None, :] + next_part)
            else:
                for j in tl.static_range(8):
                    part = tl.dot(fields[j], weight[j], part)
                moved = moved + (out[p] * shrink[None, :] + part,)
        out = moved

    mass = tl.sum(total, 0)
    live = mass > 0
    inverse = tl.where(live, 1.0 / tl.where(live, mass, 1.0), 0.0)
    inverse = inverse * (tl.exp2(tl.load(VALUE_USUAL + kv_head)) / PROBABILITY_SHIFT)
    lse = tl.where(live, peak * scale + tl.log2(tl.where(live, mass, 1.0)), float("-inf"))
    part_column = (bh * splits + split) * COLUMNS + column
    places = PART + part_column[None, :] * (VALUE_PLANES * 16) + channel[:, None]
    held = (column < COLUMNS)[None, :] & (channel < 16)[:, None]
    for p in tl.static_range(VALUE_PLANES):
        tl.store(places + p * 16, (out[p] * SUBNORMAL_UNIT - MIDDLE * shared) * inverse[None, :], mask=held)
    tl.store(PART_LSE + part_column, lse, mask=column < COLUMNS)
