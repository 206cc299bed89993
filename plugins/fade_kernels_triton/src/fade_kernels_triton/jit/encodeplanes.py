"""Encoding to planes of 2 bits (``PlaneLayout``): one tile for ``append``, and the kernel that encodes all tiles of a prompt.

The transformed channels of a tile are made once, on the tensor cores, and stay in registers: for the tokens' size, for the
error of each gain that is tried, and for the codes. Slots pick their channels' codes by a product with zeros and ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.encode import ROUND, pool_tile

SHORT = tl.constexpr(-8192)
"""The bits of a float32 that tf32 keeps."""


@triton.jit
def transformed(TOKENS, MEAN, FORWARD, first, last, stride, kept, TILE: tl.constexpr, D: tl.constexpr,
                KEPT: tl.constexpr):  # fmt: skip
    """Tokens ``first .. first + TILE`` about MEAN, times FORWARD: float32 ``[TILE, KEPT]``, zero past ``kept``.

    Tokens are ``stride`` elements apart; those past ``last`` are ``last`` once more. FORWARD is float16, which tf32 holds; a
    token is two such numbers, all but its last two bits.
    """
    BLOCK: tl.constexpr = 32 if D % 32 == 0 else 16
    token = TOKENS + tl.minimum(first + tl.arange(0, TILE), last).to(tl.int64) * stride
    channel = tl.arange(0, KEPT)
    inside = (channel < kept)[None, :]
    y = tl.zeros([TILE, KEPT], tl.float32)
    for start in tl.range(0, D, BLOCK):
        part = start + tl.arange(0, BLOCK)
        left = tl.load(token[:, None] + part[None, :]).to(tl.float32) - tl.load(MEAN + part)[None, :]
        right = tl.load(FORWARD + part[:, None] * kept + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        high = (left.to(tl.int32, bitcast=True) & SHORT).to(tl.float32, bitcast=True)
        y = tl.dot(high, right, y, input_precision="tf32")
        y = tl.dot(left - high, right, y, input_precision="tf32")
    return y


@triton.jit
def nearest(y, per_step, top):
    """Nearest codes ``0 .. top``, as floats, of ``y`` to levels ``1 / per_step`` apart about 0; all three broadcast."""
    return (tl.minimum(tl.maximum(y * per_step + top * 0.5, 0.0), top) + ROUND) - ROUND


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
    KEPT: tl.constexpr,
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
        KEPT: ``kept`` or more channels, a power of 2 from 16 on.
    """
    R: tl.constexpr = TILE // 8
    TOP: tl.constexpr = 15.0  # the largest gain code
    SLOTS_AT_ONCE: tl.constexpr = 32 if PLANES % 2 == 0 else 16
    token = tl.arange(0, TILE)
    TABLE += kv_head * PLANES
    SLOTS += kv_head * PLANES * 32
    channel = tl.arange(0, KEPT)
    own_channel = kv_head * kept + channel
    inside = channel < kept
    width = tl.load(WIDTHS + own_channel, mask=inside, other=0)
    worth = tl.load(WORTH + own_channel, mask=inside, other=0.0)
    deviation = tl.load(DEVIATION + own_channel, mask=inside, other=1.0)
    spread = tl.where(width > 0, tl.load(STEPS + own_channel, mask=inside, other=1.0), 1.0)
    top = ((1 << width) - 1).to(tl.float32)[None, :]
    usual = tl.load(USUAL + kv_head)
    y = transformed(TOKENS, MEAN + kv_head * D, FORWARD + kv_head * D * kept, first, last, stride, kept, TILE, D, KEPT)
    y = y / deviation[None, :]

    stored = tl.where(worth > 0, 1.0, 0.0)
    size = tl.sum(y * y * stored[None, :], 1) / tl.maximum(tl.sum(stored, 0), 1.0)
    own = (tl.log2(tl.sqrt(tl.maximum(size, 1.0e-30))) - usual) * OCTAVE + ZERO
    own = (own + ROUND) - ROUND

    worth = tl.where(width > 0, worth, 0.0) * spread * spread  # of an error in steps
    y = y / spread[None, :]  # in steps of a gain of 1
    chosen = tl.minimum(tl.maximum(own + FROM, 0.0), TOP)
    best = tl.full([TILE], float("inf"), tl.float32)
    for i in tl.range(0, TRIES):
        tried = tl.minimum(tl.maximum(own + (FROM + i), 0.0), TOP)
        gain = gain_of(tried, usual, ZERO, OCTAVE)[:, None]
        missed = (nearest(y, 1.0 / gain, top) - top * 0.5) * gain - y
        error = tl.sum(missed * missed * worth[None, :], 1)
        chosen = tl.where(error < best, tried, chosen)
        best = tl.minimum(error, best)

    half = token // (TILE // 2)
    both = tl.sum(tl.reshape(chosen.to(tl.int32) << (4 * half), [2, TILE // 2]), 0)
    tl.store(GAIN + tl.arange(0, TILE // 2), both.to(tl.uint8))
    codes = nearest(y, 1.0 / gain_of(chosen, usual, ZERO, OCTAVE)[:, None], top).to(tl.float16)
    slot = tl.arange(0, SLOTS_AT_ONCE)
    word_row = tl.arange(0, R)
    for p in tl.range(0, PLANES, SLOTS_AT_ONCE // 16):
        word = tl.load(TABLE + p + slot // 16)
        of_slot = tl.load(SLOTS + (p * 16 + slot) * 2)
        shift = tl.load(SLOTS + (p * 16 + slot) * 2 + 1)
        held = shift >= 0  # nothing, another head's, or of a plane that is there a second time
        picks = (channel[:, None] == of_slot[None, :]).to(tl.float16)
        of_slots = tl.dot(codes, picks).to(tl.int32)  # [TILE, SLOTS_AT_ONCE]
        field = ((of_slots >> tl.maximum(shift, 0)[None, :]) & 3) << (2 * (token // R))[:, None]
        words = tl.sum(tl.reshape(field, [8, R, SLOTS_AT_ONCE]), 0)
        if TRANSPOSED:
            where = (word + slot % 16 * R)[None, :] + word_row[:, None]
        else:
            where = (word + slot % 16)[None, :] + word_row[:, None] * 16
        tile = pool_tile(IDS, of_row + (where // row).to(tl.int64) * to_head, RUNS)  # [R, SLOTS_AT_ONCE]
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
    KEPT: tl.constexpr,
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
            TILE, D, KEPT,
        )  # fmt: skip
