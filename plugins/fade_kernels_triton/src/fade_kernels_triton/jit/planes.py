"""Attention over one tier whose channels have widths of their own: groups of 16 channels of 4 bits, then of 2 bits.

Grid ``[splits, B * H_kv]``; each program leaves a normalised output and its base-2 log-sum-exp, as ``decode_kernel`` does,
and ``merge_kernel`` merges them. Queries and outputs are in the space of the codes.

A step takes 128 tokens, one or two tiles. Row ``t * R + r`` of a block of 16 word rows is word row ``r`` of the 2-bit plane of
the step's tile ``t``, ``R = tile / 8``; field ``j`` of it is token ``j * R + r``. A 4-bit plane has two such blocks: fields of
the first are the even ``j``, those of the second the odd ones. So scores of both widths add up in registers.

Codes of all heads of a layer lie in one stream of words a tile, which is cut into a row for each head: a word row may lie in
any head's row, and each looks up the tile that it needs.

Keys, values and queries are multiplied as in ``jit/packed.py``: keys and values are the M side, products of a step are summed
from zero. Levels at even distances (SPACING) are not looked up: codes are multiplied as they lie in the words, and what they
lack is made up for in the query and in the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.codes import SUBNORMAL_UNIT, unit, unpack
from fade_kernels_triton.jit.decode import LOG2E
from fade_kernels_triton.jit.levels import look_up2, look_up4
from fade_kernels_triton.jit.packed import LOWEST, PROBABILITY_SHIFT

GROUP = tl.constexpr(16)
"""Channels of one width that are read together."""


@triton.jit
def locate(lead, tail, row, RUN: tl.constexpr, ALIGNED: tl.constexpr):
    """Whose row holds the words ``lead[:, None] + tail`` of the stream, and where in it; ALIGNED: alike for all of ``tail``.

    Args:
        lead: int32 ``[16]``, multiples of RUN if ALIGNED.
        tail: int32 ``[16]``.
        row: words of a head's row.
    """
    if ALIGNED:
        lead = tl.multiple_of(lead, RUN)
        head = (lead // row)[:, None]
        offset = tl.multiple_of(lead % row, RUN)[:, None] + tail[None, :]
    else:
        words = lead[:, None] + tail[None, :]
        head = words // row
        offset = words % row
    return head, offset


@triton.jit
def load_words(CODES, TABLE, place, tiles, first, second, in_second, row, stored, TILES: tl.constexpr,
               KEYS: tl.constexpr):  # fmt: skip
    """A block of words; 0 where the group is not ``stored``.

    Args:
        place: what ``locate`` gave.
        tiles: int64, where head 0's tiles begin, in TABLE or in the tensor itself; and how many a head has room for.
        first, second: the step's tiles.
        in_second: bool ``[16]``, rows of the second one.
    """
    head, offset = place
    start = tiles[0] + head * tiles[1]
    if KEYS or TABLE is None:
        number = first
        if TILES == 2:
            number = tl.where(in_second, second, first)
            if KEYS:
                number = number[:, None]
            else:
                number = number[None, :]
        tile = start + number
        if TABLE is not None:
            tile = tl.load(TABLE + tile, mask=stored, other=0).to(tl.int64)
    else:
        tile = tl.load(TABLE + start + first, mask=stored, other=0).to(tl.int64)
        if TILES == 2:
            other = tl.load(TABLE + start + second, mask=stored, other=0).to(tl.int64)
            tile = tl.where(in_second[None, :], other, tile)
    return tl.load(CODES + tile * row + offset, mask=stored, other=0)


@triton.jit
def fields4(words, LEVELS: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Words of 4-bit codes to four fp16 tensors, one a field: levels or, at EVEN distances, codes as ``unpack`` gives them."""
    if EVEN:
        fields = unpack(words, 4, True, INTERPRET)
    else:
        fields = look_up4(words, LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3], INTERPRET)
    return fields


@triton.jit
def fields2(words, LEVELS: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Words of 2-bit codes to eight fp16 tensors, as ``fields4``."""
    if EVEN:
        fields = unpack(words, 2, True, INTERPRET)
    else:
        fields = look_up2(words, LEVELS[4], LEVELS[5], INTERPRET)
    return fields


@triton.jit
def load_gains(GAIN, tile, word_row, TILE: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr):
    """Gains of tokens, but for their head's usual one: a tuple of eight ``[16]``, field by field."""
    R: tl.constexpr = TILE // 8
    low = ()
    high = ()
    for j in tl.static_range(4):  # as words: what is copied ahead of its use is not smaller
        word = tl.load(GAIN + tile * (TILE // 8) + (word_row + j * R) // 4)
        code = word >> (8 * (word_row % 4))
        low = low + (tl.exp2(((code & 15).to(tl.float32) - ZERO) * (1.0 / STEPS)),)
        high = high + (tl.exp2((((code >> 4) & 15).to(tl.float32) - ZERO) * (1.0 / STEPS)),)
    return low + high


@triton.jit
def load_query(start, channel, stored, column, COLUMNS: tl.constexpr):
    """A group's channels of the query columns, float32 ``[16, N]``; 0 where the group is not ``stored``."""
    mask = (column < COLUMNS)[None, :] & stored
    return tl.load(start[None, :] + channel[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["max_tiles", "splits"])
def planes_kernel(
    QUERY,
    KEY_CODES,
    KEY_GAIN,
    KEY_PLACES,
    KEY_USUAL,
    VALUE_CODES,
    VALUE_GAIN,
    VALUE_PLACES,
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
    key_step4,
    key_step2,
    value_kept,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    KEY4: tl.constexpr,
    KEY2: tl.constexpr,
    VALUE4: tl.constexpr,
    VALUE2: tl.constexpr,
    KEY_ALIGNED: tl.constexpr,
    VALUE_ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    KEY_STEPS: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    KEY_TABLE: tl.constexpr,
    VALUE_TABLE: tl.constexpr,
    KEY_SPACING: tl.constexpr,
    VALUE_SPACING: tl.constexpr,
    STAGES: tl.constexpr,
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
    COLUMNS: tl.constexpr = Q_LEN * HEADS
    EVEN_KEYS: tl.constexpr = KEY_SPACING[0] > 0
    EVEN_VALUES: tl.constexpr = VALUE_SPACING[0] > 0

    column = tl.arange(0, N)
    channel = tl.arange(0, 16)
    block_row = tl.arange(0, 16)
    word_row = block_row % R
    in_second = block_row >= R

    # where this head's groups are: first word and groups of each width
    key_word4 = tl.load(KEY_PLACES + kv_head * 4)
    key_groups4 = tl.load(KEY_PLACES + kv_head * 4 + 1)
    key_word2 = tl.load(KEY_PLACES + kv_head * 4 + 2)
    key_groups2 = tl.load(KEY_PLACES + kv_head * 4 + 3)
    value_word4 = tl.load(VALUE_PLACES + kv_head * 4)
    value_groups4 = tl.load(VALUE_PLACES + kv_head * 4 + 1)
    value_word2 = tl.load(VALUE_PLACES + kv_head * 4 + 2)
    value_groups2 = tl.load(VALUE_PLACES + kv_head * 4 + 3)

    # blocks of words, and the parts of the query that meet them
    start_of_query = (
        QUERY + batch_row * query_stride_b + (kv_head * HEADS + column % HEADS) * query_stride_h
        + (column // HEADS) * query_stride_q
    )  # fmt: skip
    largest = tl.zeros([N], tl.float32)
    wide4 = ()
    key_place4 = ()
    for k in tl.static_range(KEY4):
        part = load_query(start_of_query, channel + k * 16, k < key_groups4, column, COLUMNS)
        if EVEN_KEYS:
            part = part * KEY_SPACING[0]
        largest = tl.maximum(largest, tl.max(tl.abs(part), 0))
        wide4 = wide4 + (part,)
        for half in tl.static_range(2):
            lead = (word_row + half * R) * key_step4 + (key_word4 + k * 16)
            key_place4 = key_place4 + (locate(lead, channel, key_row, GROUP, KEY_ALIGNED),)
    wide2 = ()
    key_place2 = ()
    for k in tl.static_range(KEY2):
        part = load_query(start_of_query, channel + (key_groups4 + k) * 16, k < key_groups2, column, COLUMNS)
        if EVEN_KEYS:
            part = part * KEY_SPACING[1]
        largest = tl.maximum(largest, tl.max(tl.abs(part), 0))
        wide2 = wide2 + (part,)
        key_place2 = key_place2 + (locate(word_row * key_step2 + (key_word2 + k * 16), channel, key_row, GROUP,
                                          KEY_ALIGNED),)  # fmt: skip
    norm = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1.0e-30))))
    bias = tl.zeros([N], tl.float32)  # what a score lacks: levels lie about 0, codes begin there
    query4 = ()
    odd_query4 = ()
    for k in tl.static_range(KEY4):
        unit_query = (wide4[k] / norm[None, :]).to(tl.float16)
        query4 = query4 + (unit_query,)
        if EVEN_KEYS:  # in odd fields 4-bit codes lie at a quarter of the 2-bit codes' place
            odd_query4 = odd_query4 + ((unit_query * 4.0).to(tl.float16),)
        else:
            odd_query4 = odd_query4 + (unit_query,)
        bias -= 7.5 * tl.sum(unit_query.to(tl.float32), 0)
    query2 = ()
    for k in tl.static_range(KEY2):
        unit_query = (wide2[k] / norm[None, :]).to(tl.float16)
        query2 = query2 + (unit_query,)
        bias -= 1.5 * tl.sum(unit_query.to(tl.float32), 0)
    scale = norm * (tl.exp2(tl.load(KEY_USUAL + kv_head)) * LOG2E)
    value_place4 = ()
    out4 = ()
    for k in tl.static_range(VALUE4):
        out4 = out4 + (tl.zeros([16, N], tl.float32),)
        for half in tl.static_range(2):
            lead = (channel + k * 16) * (2 * R) + (value_word4 + half * R)
            value_place4 = value_place4 + (locate(lead, word_row, value_row, R, VALUE_ALIGNED),)
    value_place2 = ()
    out2 = ()
    for k in tl.static_range(VALUE2):
        out2 = out2 + (tl.zeros([16, N], tl.float32),)
        value_place2 = value_place2 + (locate((channel + k * 16) * R + value_word2, word_row, value_row, R,
                                              VALUE_ALIGNED),)  # fmt: skip

    count = tl.load(COUNT + bh)
    start = (count * split // splits) // TILES * TILES
    stop = (count * (split + 1) // splits) // TILES * TILES
    stop = tl.where(split + 1 == splits, count, stop)
    tiles = (batch_row * kv_heads * max_tiles, max_tiles)
    own = bh * max_tiles

    peak = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([16, N], tl.float32)
    shared = tl.zeros([16, N], tl.float32)  # weights as they were rounded, summed: all rows alike
    for step in tl.range(start, stop, TILES, num_stages=STAGES):
        # past the end the first tile of the step is read again, and its rows are struck out
        second = tl.where(step + 1 < stop, step + 1, step)
        if TILES == 2:
            index = own + tl.where(in_second, second, step)
            present = (step + 1 < stop) | (block_row < R)
        else:
            index = own + step + tl.zeros([16], tl.int32)
            present = None
        if TABLE is None:
            tile = index
        else:
            tile = tl.load(TABLE + index).to(tl.int64)

        # scores, field by field
        score = ()
        for _j in tl.static_range(8):
            score = score + (tl.zeros([16, N], tl.float32),)
        for k in tl.static_range(KEY4):
            stored = k < key_groups4
            even = fields4(
                load_words(KEY_CODES, TABLE, key_place4[2 * k], tiles, step, second, in_second, key_row, stored, TILES,
                           True),
                KEY_TABLE, EVEN_KEYS, INTERPRET,
            )  # fmt: skip
            odd = fields4(
                load_words(KEY_CODES, TABLE, key_place4[2 * k + 1], tiles, step, second, in_second, key_row, stored,
                           TILES, True),
                KEY_TABLE, EVEN_KEYS, INTERPRET,
            )  # fmt: skip
            added = ()
            for j in tl.static_range(4):
                added = added + (tl.dot(even[j], query4[k], score[2 * j]),
                                 tl.dot(odd[j], odd_query4[k], score[2 * j + 1]))  # fmt: skip
            score = added
        for k in tl.static_range(KEY2):
            levels = fields2(
                load_words(KEY_CODES, TABLE, key_place2[k], tiles, step, second, in_second, key_row, k < key_groups2,
                           TILES, True),
                KEY_TABLE, EVEN_KEYS, INTERPRET,
            )  # fmt: skip
            added = ()
            for j in tl.static_range(8):
                added = added + (tl.dot(levels[j], query2[k], score[j]),)
            score = added

        # `logit[j]` in the scale-free units of `peak`
        gains = load_gains(KEY_GAIN, tile, word_row, TILE, KEY_ZERO, KEY_STEPS)
        if VALID is not None:
            live = tl.load(VALID + index)
        logit = ()
        best = tl.full([16, N], float("-inf"), tl.float32)
        for j in tl.static_range(8):
            s = score[j]
            if EVEN_KEYS:
                s = s * unit(2, j, True) + bias[None, :]
            s = s * gains[j][:, None]
            if VALID is not None:
                s = tl.where((word_row + j * R < live)[:, None], s, float("-inf"))
            best = tl.maximum(best, s)
            logit = logit + (s,)
        new_peak = tl.maximum(peak, tl.max(best, 0))
        shrink = tl.exp2((peak - new_peak) * scale)
        peak = new_peak

        # probabilities, and those times the values' gains
        gains = load_gains(VALUE_GAIN, tile, word_row, TILE, VALUE_ZERO, VALUE_STEPS)
        mass = tl.zeros([16, N], tl.float32)
        rounded = tl.zeros([16, N], tl.float32)
        weight = ()
        odd_weight4 = ()
        for j in tl.static_range(8):
            w = tl.exp2(logit[j] * scale[None, :] - (peak * scale)[None, :])
            mass += w
            gain = gains[j] * PROBABILITY_SHIFT
            if present is not None:
                gain = tl.where(present, gain, 0.0)
            if EVEN_VALUES:
                share = (w * (gain * unit(2, j, False))[:, None]).to(tl.float16)
                rounded = tl.dot(tl.full([16, 16], 1.0 / unit(2, j, False), tl.float16), share, rounded)
                if j % 2 == 1:
                    odd_weight4 = odd_weight4 + ((share * 4.0).to(tl.float16),)
            else:
                share = (w * gain[:, None]).to(tl.float16)
                if j % 2 == 1:
                    odd_weight4 = odd_weight4 + (share,)
            weight = weight + (share,)
        if present is not None:
            mass = tl.where(present[:, None], mass, 0.0)
        total = total * shrink[None, :] + mass
        if EVEN_VALUES:
            shared = shared * shrink[None, :] + rounded

        # values
        moved = ()
        for k in tl.static_range(VALUE4):
            stored = k < value_groups4
            even = fields4(
                load_words(VALUE_CODES, TABLE, value_place4[2 * k], tiles, step, second, in_second, value_row, stored,
                           TILES, False),
                VALUE_TABLE, EVEN_VALUES, INTERPRET,
            )  # fmt: skip
            odd = fields4(
                load_words(VALUE_CODES, TABLE, value_place4[2 * k + 1], tiles, step, second, in_second, value_row,
                           stored, TILES, False),
                VALUE_TABLE, EVEN_VALUES, INTERPRET,
            )  # fmt: skip
            part = tl.zeros([16, N], tl.float32)
            for j in tl.static_range(4):
                part = tl.dot(even[j], weight[2 * j], part)
                part = tl.dot(odd[j], odd_weight4[j], part)
            moved = moved + (out4[k] * shrink[None, :] + part,)
        out4 = moved
        moved = ()
        for k in tl.static_range(VALUE2):
            levels = fields2(
                load_words(VALUE_CODES, TABLE, value_place2[k], tiles, step, second, in_second, value_row,
                           k < value_groups2, TILES, False),
                VALUE_TABLE, EVEN_VALUES, INTERPRET,
            )  # fmt: skip
            part = tl.zeros([16, N], tl.float32)
            for j in tl.static_range(8):
                part = tl.dot(levels[j], weight[j], part)
            moved = moved + (out2[k] * shrink[None, :] + part,)
        out2 = moved

    mass = tl.sum(total, 0)
    live = mass > 0
    inverse = tl.where(live, 1.0 / tl.where(live, mass, 1.0), 0.0)
    inverse = inverse * (tl.exp2(tl.load(VALUE_USUAL + kv_head)) / PROBABILITY_SHIFT)
    lse = tl.where(live, peak * scale + tl.log2(tl.where(live, mass, 1.0)), float("-inf"))
    part_column = (bh * splits + split) * COLUMNS + column
    places = PART + part_column[None, :] * value_kept + channel[:, None]
    held = (column < COLUMNS)[None, :] & (channel < 16)[:, None]
    for k in tl.static_range(VALUE4):
        moved = out4[k]
        if EVEN_VALUES:
            moved = (moved * SUBNORMAL_UNIT - 7.5 * shared) * VALUE_SPACING[0]
        tl.store(places + k * 16, moved * inverse[None, :], mask=held & (k < value_groups4))
    for k in tl.static_range(VALUE2):
        moved = out2[k]
        if EVEN_VALUES:
            moved = (moved * SUBNORMAL_UNIT - 1.5 * shared) * VALUE_SPACING[1]
        at = (value_groups4 + k) * 16
        tl.store(places + at, moved * inverse[None, :], mask=held & (k < value_groups2))
    for k in tl.range(value_groups4 + value_groups2, value_kept // 16):  # what other heads store
        tl.store(places + k * 16, tl.zeros([16, N], tl.float32), mask=held)
    tl.store(PART_LSE + part_column, lse, mask=column < COLUMNS)
