"""Encoding to planes of 2 bits (``PlaneLayout``): one tile for ``append``, and the kernel that encodes all tiles of a prompt.

The transformed channels of a tile are made three times, 16 at a time: for the tokens' size, for the error of each gain that
is tried, and, slot by slot, for the codes. They are never all there at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.encode import ROUND, pool_tile


@triton.jit
def transformed(TOKENS, MEAN, FORWARD, DEVIATION, channel, first, last, stride, kept, TILE: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    """The channels ``channel`` ``[16]`` of the tokens ``first .. first + TILE``, float32 ``[TILE, 16]``.

    Tokens are ``stride`` elements apart; those past ``last`` are ``last`` once more.
    """
    token = TOKENS + tl.minimum(first + tl.arange(0, TILE), last).to(tl.int64) * stride
    some = tl.arange(0, 16)
    y = tl.zeros([TILE, 16], tl.float32)
    for start in tl.range(0, D, 16):
        part = start + some
        left = tl.load(token[:, None] + part[None, :]).to(tl.float32) - tl.load(MEAN + part)[None, :]
        right = tl.load(FORWARD + part[:, None] * kept + channel[None, :]).to(tl.float32)
        y = tl.dot(left, right, y, input_precision="ieee")
    return y / tl.load(DEVIATION + channel)[None, :]


@triton.jit
def nearest(y, step, top):
    """Nearest codes ``0 .. top``, as floats, of ``y`` to levels ``step`` apart about 0; all three broadcast."""
    middle = top * 0.5
    code = y / step + middle
    code = tl.minimum(tl.maximum(code, -1.0), top + 1.0)
    return tl.minimum(tl.maximum((code + ROUND) - ROUND, 0.0), top)


@triton.jit
def gain_of(code, usual, ZERO: tl.constexpr, OCTAVE: tl.constexpr):
    """Gains of gain codes (floats), OCTAVE of which make an octave."""
    return tl.exp2((code - ZERO) * (1.0 / OCTAVE) + usual)


@triton.jit
def encode_planes(
    TOKENS,
    CODES,
    GAIN,
    IDS,
    of_row,
    to_head,
    TABLE,
    SLOTS,
    WIDTHS,
    STEPS,
    WORTH,
    MEAN,
    FORWARD,
    DEVIATION,
    USUAL,
    kv_head,
    first,
    last,
    stride,
    kept,
    row,
    PLANES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ZERO: tl.constexpr,
    OCTAVE: tl.constexpr,
    FROM: tl.constexpr,
    TRIES: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
):
    """Encode tokens ``first .. first + TILE`` of one head into one tile.

    Args:
        TOKENS: of the row and head.
        CODES: of the pool.
        GAIN: of this head's tile.
        IDS: the table (``pool_tile``).
        of_row: where the table has head 0's tile; those of other heads are ``to_head`` places further each.
        TABLE: ``planes`` of ``PlaneLayout``, which also has SLOTS, WIDTHS, STEPS, WORTH, MEAN, FORWARD, DEVIATION and USUAL.
        row: words of a head's row.
    """
    R: tl.constexpr = TILE // 8
    TOP: tl.constexpr = 15.0  # the largest gain code
    token = tl.arange(0, TILE)
    some = tl.arange(0, 16)
    TABLE += kv_head * PLANES
    SLOTS += kv_head * PLANES * 32
    WIDTHS += kv_head * kept
    STEPS += kv_head * kept
    WORTH += kv_head * kept
    MEAN += kv_head * D
    FORWARD += kv_head * D * kept
    DEVIATION += kv_head * kept
    usual = tl.load(USUAL + kv_head)

    size = tl.zeros([TILE], tl.float32)
    count = tl.zeros([16], tl.float32)
    for start in tl.range(0, kept, 16):
        channel = tl.minimum(start + some, kept - 1)
        stored = tl.where((start + some < kept) & (tl.load(WORTH + channel) > 0), 1.0, 0.0)
        if tl.sum(stored, 0) > 0:
            y = transformed(TOKENS, MEAN, FORWARD, DEVIATION, channel, first, last, stride, kept, TILE, D)
            size += tl.sum(y * y * stored[None, :], 1)
            count += stored
    size = size / tl.maximum(tl.sum(count, 0), 1.0)
    own = (tl.log2(tl.sqrt(tl.maximum(size, 1.0e-30))) - usual) * OCTAVE + ZERO
    own = (own + ROUND) - ROUND

    errors = ()
    for _i in tl.static_range(TRIES):
        errors = errors + (tl.zeros([TILE], tl.float32),)
    for start in tl.range(0, kept, 16):
        channel = tl.minimum(start + some, kept - 1)
        width = tl.load(WIDTHS + channel)
        worth = tl.where((start + some < kept) & (width > 0), tl.load(WORTH + channel), 0.0)
        top = ((1 << width) - 1).to(tl.float32)[None, :]
        spread = tl.where(width > 0, tl.load(STEPS + channel), 1.0)
        if tl.max(width, 0) > 0:
            y = transformed(TOKENS, MEAN, FORWARD, DEVIATION, channel, first, last, stride, kept, TILE, D)
            more = ()
            for i in tl.static_range(TRIES):
                code = tl.minimum(tl.maximum(own + (FROM + i), 0.0), TOP)
                step = gain_of(code, usual, ZERO, OCTAVE)[:, None] * spread[None, :]
                missed = (nearest(y, step, top) - top * 0.5) * step - y
                more = more + (errors[i] + tl.sum(missed * missed * worth[None, :], 1),)
            errors = more
    best = errors[0]
    chosen = tl.minimum(tl.maximum(own + FROM, 0.0), TOP)
    for i in tl.static_range(1, TRIES):
        better = errors[i] < best
        chosen = tl.where(better, tl.minimum(tl.maximum(own + (FROM + i), 0.0), TOP), chosen)
        best = tl.where(better, errors[i], best)

    half = token // (TILE // 2)
    both = tl.sum(tl.reshape(chosen.to(tl.int32) << (4 * half), [2, TILE // 2]), 0)
    tl.store(GAIN + tl.arange(0, TILE // 2), both.to(tl.uint8))
    gain = gain_of(chosen, usual, ZERO, OCTAVE)
    word_row = tl.arange(0, R)
    for p in tl.range(0, PLANES):
        word = tl.load(TABLE + p)
        channel = tl.load(SLOTS + (p * 16 + some) * 2)
        shift = tl.load(SLOTS + (p * 16 + some) * 2 + 1)
        if tl.max(shift, 0) >= 0:  # not a plane that is there a second time
            held = shift >= 0
            shift = tl.maximum(shift, 0)
            top = ((1 << tl.load(WIDTHS + channel)) - 1).to(tl.float32)[None, :]
            spread = tl.where(held, tl.load(STEPS + channel), 1.0)
            y = transformed(TOKENS, MEAN, FORWARD, DEVIATION, channel, first, last, stride, kept, TILE, D)
            code = nearest(y, gain[:, None] * spread[None, :], top).to(tl.int32)
            field = ((code >> shift[None, :]) & 3) << (2 * (token // R))[:, None]
            words = tl.sum(tl.reshape(field, [8, R, 16]), 0)
            if TRANSPOSED:
                where = word + some[None, :] * R + word_row[:, None]
            else:
                where = word + word_row[:, None] * 16 + some[None, :]
            tile = pool_tile(IDS, of_row + (where // row).to(tl.int64) * to_head, RUNS)  # [R, 16]
            tl.store(CODES + tile * row + where % row, words.to(tl.int16), mask=held[None, :] & (tile >= 0))


@triton.jit(do_not_specialize=["length"])
def encode_planes_kernel(
    TOKENS,
    CODES,
    GAIN,
    IDS,
    TABLE,
    SLOTS,
    WIDTHS,
    STEPS,
    WORTH,
    MEAN,
    FORWARD,
    DEVIATION,
    USUAL,
    heads,
    length,
    kept,
    row,
    stride_b,
    stride_h,
    stride_t,
    PLANES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ZERO: tl.constexpr,
    OCTAVE: tl.constexpr,
    FROM: tl.constexpr,
    TRIES: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
):
    """Grid ``[tiles, B * H_kv]``: a tile of ``[B, H_kv, length, D]`` each."""
    number = tl.program_id(0)
    program = tl.program_id(1)
    tiles = tl.num_programs(0)
    batch_row = (program // heads).to(tl.int64)  # a division of 64 bits takes hundreds of cycles
    head = (program % heads).to(tl.int64)
    tile = pool_tile(IDS, program.to(tl.int64) * tiles + number, IDS is None)
    if tile >= 0:
        encode_planes(
            TOKENS + batch_row * stride_b + head * stride_h, CODES, GAIN + tile * (TILE // 2), IDS,
            batch_row * heads * tiles + number, tiles, TABLE, SLOTS, WIDTHS, STEPS, WORTH, MEAN, FORWARD, DEVIATION, USUAL,
            head, number * TILE, length - 1, stride_t, kept, row, PLANES, TRANSPOSED, ZERO, OCTAVE, FROM, TRIES, IDS is None,
            TILE, D,
        )  # fmt: skip
