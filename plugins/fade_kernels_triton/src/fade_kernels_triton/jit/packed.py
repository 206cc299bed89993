"""Attention over the packed tiles of one row and KV head.

Keys and values are the M side of every matrix product and the query columns (query heads of the KV head times query
tokens) the N side, so that a group of four heads wastes half of an 8-wide fragment instead of three quarters of a
16-wide one. Softmax is online and base 2. ``total`` and ``offset`` stay spread over the rows and are summed once at
the end. The products of one step are summed from zero and added to the accumulator by an ordinary rounded FMA: tensor
cores truncate, and codes are all positive, so that a single long accumulation would drift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.codes import high_half, low_half, scale_query, unit, unpack, unpack3

PROBABILITY_SHIFT = tl.constexpr(64.0)
"""Probabilities times scales are multiplied by this before they become fp16, to keep small ones normal."""

LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, exact to about 1e-7."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)


@triton.jit
def attend_packed(
    query,
    scale,
    cap_scale,
    softcap,
    KEY_CODES,
    KEY_LOW,
    KEY_META,
    VALUE_CODES,
    VALUE_META,
    TABLE,
    VALID,
    POSITIONS,
    first_tile,
    start,
    stop,
    stride,
    query_position,
    window,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_CHANNEL: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLIDING: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Attend to tiles of a tier: TILES from ``start`` on, then again ``stride`` further, until ``stop``.

    Args:
        query: fp16 ``[DP, N]``, each column divided by a power of two so that its largest element is at most 1.
        scale: float32 ``[N]``, softmax scale times log2(e) times that power of two.
        cap_scale: float32 ``[N]``, what a raw score is multiplied by inside the soft cap's tanh.
        softcap: soft cap times log2(e).
        TABLE: int32 tile ids of this row and head, or None where tiles follow one another from ``first_tile``.
        VALID: int32 tokens of each tile that are meant, indexed like TABLE; None if tiles are full.
        POSITIONS: int32 positions of a pool's tokens ``[tiles, TILE]``, negative for none; None if not needed.
        query_position: int32 ``[N]``, positions of the query columns; read only with POSITIONS.
        KEY_LOW: words of the low bit of keys of 3 bits, else None.
        GROUPS: groups of a token's channels that share a scale of the values.
        TILES: tiles a step; rows of a matrix operand are ``TILES * TILE * VALUE_BITS / 16``. A field of keys of twice the width
            holds the tokens of two fields of the values: its word rows are read in two parts.

    Returns:
        ``(maximum [N] in base-2 units, total [N], out [DP, N] unnormalised)``.
    """
    FIRST: tl.constexpr = 2 if KEY_BITS == 3 else KEY_BITS
    PARTS: tl.constexpr = FIRST // VALUE_BITS
    R: tl.constexpr = TILE * VALUE_BITS // 16
    ROWS: tl.constexpr = TILES * R
    BLOCKS: tl.constexpr = 16 // VALUE_BITS
    GROUP: tl.constexpr = DP if GROUPS == 1 else D // GROUPS
    tl.static_assert(FIRST == PARTS * VALUE_BITS and PARTS <= 2, "operands of keys and of values hold the same tokens")
    MASKED: tl.constexpr = (VALID is not None) or (POSITIONS is not None)
    AFFINE: tl.constexpr = KEY_CHANNEL and not (MASKED or SOFTCAP)

    channel = tl.arange(0, DP)
    row = tl.arange(0, ROWS)
    slot = row // R
    word_row = row % R
    query_sum = tl.sum(query.to(tl.float32), 0)
    if KEY_BITS == 3:
        # no address is read: the compiler brings words straight to where a matrix operand wants them only if all that they
        # are put together from was loaded
        half = (word_row // (R // 2)).to(tl.int16)
        half = tl.load(KEY_LOW + row, mask=row < start - (1 << 30), other=half)

    peak = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([ROWS, N], tl.float32)
    offset = ()
    out = ()
    for _g in tl.static_range(GROUPS):
        offset = offset + (tl.zeros([ROWS, N], tl.float32),)
        out = out + (tl.zeros([GROUP, N], tl.float32),)

    for step in tl.range(start, stop, stride, num_stages=STAGES):
        # the tile of each row; past the end the first tile of the step is read again and its rows are struck out
        if TILES == 1:
            if TABLE is None:
                tile = (first_tile + step).to(tl.int64)
            else:
                tile = tl.load(TABLE + step).to(tl.int64)
            tile_of_row = tile
        else:
            index = step + slot
            index = tl.where(index < stop, index, step)
            if TABLE is None:
                tile_of_row = (first_tile + index).to(tl.int64)
            else:
                tile_of_row = tl.load(TABLE + index).to(tl.int64)
        key_words = ()
        for h in tl.static_range(PARTS):
            key_words = key_words + (load_rows(KEY_CODES, tile_of_row, word_row + h * R, PARTS * R, D, DP, TILES),)
        if KEY_BITS == 3:
            low_words = load_rows(KEY_LOW, tile_of_row, word_row % (R // 2), R // 2, D, DP, TILES)
        value_words = ()
        for g in tl.static_range(GROUPS):
            value_words = value_words + (
                load_columns(VALUE_CODES, tile_of_row, word_row, g * GROUP, GROUP, R, D, TILES),
            )
        token = tile_of_row * TILE + word_row
        if TILES == 1:
            present = None
        else:
            present = (step + slot) < stop

        # scores: `raw[j]` are the products of field j
        if KEY_BITS == 3:
            keys = unpack3(key_words[0], low_words, tl.broadcast_to(half[:, None], ROWS, DP), SUBNORMAL, INTERPRET)
        else:
            keys = unpack(key_words[0], KEY_BITS, SUBNORMAL, INTERPRET)
            if PARTS == 2:
                other = unpack(key_words[1], KEY_BITS, SUBNORMAL, INTERPRET)
                both = ()
                for k in tl.static_range(16 // KEY_BITS):
                    both = both + (keys[k], other[k])
                keys = both
        raw = ()
        if KEY_CHANNEL:
            if TILES == 1:
                meta = tl.load(KEY_META + tile * D + channel, mask=channel < D, other=0)
                scaled = scale_query(query, meta, INTERPRET)
                minimum = tl.broadcast_to(high_half(meta)[None, :], ROWS, DP)
                bias = tl.dot(minimum, query)
                for j in tl.static_range(BLOCKS):
                    raw = raw + (tl.dot(keys[j], scaled),)
            else:
                tl.static_assert(TILES == 2, "per-channel keys take one or two tiles a step")
                second = tl.where(step + 1 < stop, step + 1, step)
                if TABLE is None:
                    tile0 = (first_tile + step).to(tl.int64)
                    tile1 = (first_tile + second).to(tl.int64)
                else:
                    tile0 = tl.load(TABLE + step).to(tl.int64)
                    tile1 = tl.load(TABLE + second).to(tl.int64)
                meta0 = tl.load(KEY_META + tile0 * D + channel, mask=channel < D, other=0)
                meta1 = tl.load(KEY_META + tile1 * D + channel, mask=channel < D, other=0)
                scaled0 = scale_query(query, meta0, INTERPRET)
                scaled1 = scale_query(query, meta1, INTERPRET)
                first = (slot == 0)[:, None]
                minimum = tl.where(first, high_half(meta0)[None, :], high_half(meta1)[None, :])
                bias = tl.dot(minimum, query)
                for j in tl.static_range(BLOCKS):
                    raw = raw + (tl.where(first, tl.dot(keys[j], scaled0), tl.dot(keys[j], scaled1)),)
        else:
            for j in tl.static_range(BLOCKS):
                raw = raw + (tl.dot(keys[j], query),)

        # `score[j]` in the scale-free units of `peak`
        score = ()
        if AFFINE:
            score = raw
            best = _largest(raw, FIRST, PARTS, SUBNORMAL) + bias
        else:
            for j in tl.static_range(BLOCKS):
                if KEY_CHANNEL:
                    s = raw[j] * unit(FIRST, j // PARTS, SUBNORMAL) + bias
                else:
                    meta = tl.load(KEY_META + token + j * R)
                    zoom = low_half(meta).to(tl.float32) * unit(FIRST, j // PARTS, SUBNORMAL)
                    s = raw[j] * zoom[:, None] + high_half(meta).to(tl.float32)[:, None] * query_sum[None, :]
                if SOFTCAP:
                    s = softcap * tanh(s * cap_scale[None, :])
                if VALID is not None:
                    if TILES == 1:
                        count = tl.load(VALID + step)
                    else:
                        count = tl.load(VALID + index)
                        count = count[:, None]
                    s = tl.where((word_row + j * R)[:, None] < count, s, float("-inf"))
                if POSITIONS is not None:
                    position = tl.load(POSITIONS + token + j * R)[:, None]
                    seen = (position >= 0) & (position <= query_position[None, :])
                    if SLIDING:
                        seen = seen & (query_position[None, :] - position < window)
                    s = tl.where(seen, s, float("-inf"))
                score = score + (s,)
            best = score[0]
            for j in tl.static_range(1, BLOCKS):
                best = tl.maximum(best, score[j])

        new_peak = tl.maximum(peak, tl.max(best, 0))
        if SOFTCAP:
            shrink = tl.exp2(peak - new_peak)
        else:
            shrink = tl.exp2((peak - new_peak) * scale)
        peak = new_peak

        # probabilities
        weight = ()
        for j in tl.static_range(BLOCKS):
            if SOFTCAP:
                weight = weight + (tl.exp2(score[j] - peak[None, :]),)
            elif AFFINE:
                slope = scale * unit(FIRST, j // PARTS, SUBNORMAL)
                weight = weight + (tl.exp2(score[j] * slope[None, :] + (bias - peak[None, :]) * scale[None, :]),)
            else:
                weight = weight + (tl.exp2(score[j] * scale[None, :] - (peak * scale)[None, :]),)
        mass = weight[0]
        for j in tl.static_range(1, BLOCKS):
            mass += weight[j]
        if present is not None:
            mass = tl.where(present[:, None], mass, 0.0)
        total = total * shrink[None, :] + mass

        # values
        moved = ()
        offsets = ()
        for g in tl.static_range(GROUPS):
            values = unpack(value_words[g], VALUE_BITS, SUBNORMAL, INTERPRET)
            low = offset[g] * shrink[None, :]
            part = tl.zeros([GROUP, N], tl.float32)
            for j in tl.static_range(BLOCKS):
                meta = tl.load(VALUE_META + (tile_of_row * GROUPS + g) * TILE + word_row + j * R)
                if present is not None:
                    meta = tl.where(present, meta, 0)
                if VALID is not None:
                    if TILES == 1:
                        meta = tl.where(word_row + j * R < tl.load(VALID + step), meta, 0)
                    else:
                        meta = tl.where(word_row + j * R < tl.load(VALID + index), meta, 0)
                if POSITIONS is not None:
                    meta = tl.where(tl.load(POSITIONS + token + j * R) >= 0, meta, 0)
                zoom = low_half(meta).to(tl.float32) * (unit(VALUE_BITS, j, False) * PROBABILITY_SHIFT)
                low += weight[j] * high_half(meta).to(tl.float32)[:, None]
                part = tl.dot(values[j], (weight[j] * zoom[:, None]).to(tl.float16), part)
            offsets = offsets + (low,)
            moved = moved + (out[g] * shrink[None, :] + part,)
        offset = offsets
        out = moved

    UNSHIFT: tl.constexpr = unit(VALUE_BITS, 0, SUBNORMAL) / PROBABILITY_SHIFT
    whole = ()
    for g in tl.static_range(GROUPS):
        whole = whole + (out[g] * UNSHIFT + tl.sum(offset[g], 0)[None, :],)
    if SOFTCAP:
        top = peak
    else:
        top = peak * scale
    return top, tl.sum(total, 0), stacked(whole, GROUPS, GROUP, N)


@triton.jit
def load_rows(
    CODES, tile, row, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Word rows ``row`` of token-major tiles of ``R``: ``[ROWS, DP]``; ``tile`` is one for all, or each row's own."""
    channel = tl.arange(0, DP)
    if TILES == 1:
        words = tl.load(
            CODES + tile * (R * D) + row[:, None] * D + channel[None, :], mask=(channel < D)[None, :], other=0
        )
    else:
        words = tl.load(
            CODES + (tile * (R * D) + row * D)[:, None] + channel[None, :], mask=(channel < D)[None, :], other=0
        )
    return words


@triton.jit
def load_columns(
    CODES, tile, row, first, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Words of GROUP channels from ``first`` on of channel-major tiles: ``[GROUP, ROWS]``."""
    channel = first + tl.arange(0, GROUP)
    if TILES == 1:
        words = tl.load(
            CODES + tile * (R * D) + channel[:, None] * R + row[None, :], mask=(channel < D)[:, None], other=0
        )
    else:
        words = tl.load(
            CODES + (tile * (R * D) + row)[None, :] + channel[:, None] * R, mask=(channel < D)[:, None], other=0
        )
    return words


@triton.jit
def stacked(parts, COUNT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """COUNT (1, 2 or 4) parts ``[ROWS, N]``, one below the other."""
    if COUNT == 1:
        whole = parts[0]
    elif COUNT == 2:
        whole = tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (2, 0, 1)), [2 * ROWS, N])
    else:
        pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))  # [ROWS, N, 2, 2]
        whole = tl.reshape(tl.permute(pairs, (2, 3, 0, 1)), [4 * ROWS, N])
    return whole


@triton.jit
def _largest(raw, BITS: tl.constexpr, PARTS: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Element-wise largest of all fields' products, in codes; fields of one place are compared unscaled."""
    PLACES: tl.constexpr = 8 // BITS
    for j in tl.static_range(PLACES):
        both = tl.maximum(raw[j * PARTS], raw[(j + PLACES) * PARTS])
        if PARTS == 2:
            both = tl.maximum(both, tl.maximum(raw[j * PARTS + 1], raw[(j + PLACES) * PARTS + 1]))
        both = both * unit(BITS, j, SUBNORMAL)
        if j == 0:
            best = both
        else:
            best = tl.maximum(best, both)
    return best
