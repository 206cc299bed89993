"""From packed words of 1, 2 or 4 bits to the fp16 levels of their codes.

Planes of every width are read as one of four bits, whose word rows are a quarter of the tile: word row ``r`` of ``R`` is
read for each row ``r, r + R, ...`` of the quarter, and a shift brings the field that is meant to the top of a nibble. Nibble
``i`` of row ``r`` is then token ``i * tile / 4 + r``, whatever the width, and scores of several widths add up in registers.

Levels are symmetric about 0, so that a table holds eight magnitudes: four words of bytes, high bytes first. Two PRMT look
up four bytes each, two more put pairs of fp16 together: the tables never leave the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look_up(words, shift, table, INTERPRET: tl.constexpr):
    """Words ``[M, N]`` to a tuple of four fp16 tensors ``[M, N]``, the levels of nibbles 0 to 3.

    Args:
        words: int16.
        shift: int32 ``[M, N]``, what takes the field of a row to the top of each nibble.
        table: five int32: the bits of a code in all nibbles, twice; the high bytes of magnitudes 0 to 3 and 4 to 7; their
            low bytes.
    """
    mask, high0, high1, low0, low1 = table
    if INTERPRET:
        levels = _portable(words, shift, mask, high0, high1, low0, low1)
    else:
        levels = _prmt(
            words,
            shift,
            tl.full(words.shape, 0, tl.int32) + mask,
            tl.full(words.shape, 0, tl.int32) + high0,
            tl.full(words.shape, 0, tl.int32) + high1,
            tl.full(words.shape, 0, tl.int32) + low0,
            tl.full(words.shape, 0, tl.int32) + low1,
        )
    return levels


@triton.jit
def _portable(words, shift, mask, high0, high1, low0, low1):
    levels = ()
    bits = ((words.to(tl.int32) & 0xFFFF) << shift) & mask & 0xFFFF
    for i in tl.static_range(4):
        code = (bits >> (4 * i)) & 15
        index = tl.where(code < 8, 7 - code, code - 8)
        place = 8 * (index % 4)
        high = (tl.where(index < 4, high0, high1) >> place) & 0xFF
        low = (tl.where(index < 4, low0, low1) >> place) & 0xFF
        number = (high << 8) | low | tl.where(code < 8, 0x8000, 0)
        levels = levels + (number.to(tl.int16).to(tl.float16, bitcast=True),)
    return levels


@triton.jit
def _prmt(words, shift, mask, high0, high1, low0, low1):
    """Operands come in pairs of neighbours: $4 holds two words, $5 and $6 their shifts (alike), and so on."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 code, below, flip, index, rest, ha, la, hb, lb, sign;
        shl.b32 code, $4, $5;
        and.b32 code, code, $7;
        not.b32 below, code;
        and.b32 below, below, 0x88888888;
        shr.u32 flip, below, 3;
        sub.u32 flip, below, flip;
        xor.b32 index, code, flip;
        and.b32 index, index, 0x77777777;
        prmt.b32 index, index, index, 0x3120;
        shr.u32 rest, index, 16;
        prmt.b32 ha, $9, $11, index;
        prmt.b32 la, $13, $15, index;
        prmt.b32 hb, $9, $11, rest;
        prmt.b32 lb, $13, $15, rest;
        prmt.b32 $0, la, ha, 0x6240;
        prmt.b32 $1, la, ha, 0x7351;
        prmt.b32 $2, lb, hb, 0x6240;
        prmt.b32 $3, lb, hb, 0x7351;
        shl.b32 sign, below, 12;
        and.b32 sign, sign, 0x80008000;
        xor.b32 $0, $0, sign;
        shl.b32 sign, below, 8;
        and.b32 sign, sign, 0x80008000;
        xor.b32 $1, $1, sign;
        shl.b32 sign, below, 4;
        and.b32 sign, sign, 0x80008000;
        xor.b32 $2, $2, sign;
        and.b32 sign, below, 0x80008000;
        xor.b32 $3, $3, sign;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [words, shift, mask, high0, high1, low0, low1],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
