"""From packed words of 2 or 4 bits to the fp16 levels of their codes.

Tables are constants of the compiled kernel and never leave the registers: PRMT picks four bytes out of eight. Codes of 2 bits
take one for a pair of levels. Levels of 4-bit codes are symmetric about 0, so that eight magnitudes say all: two PRMT look up
the bytes of two pairs, two more put the pairs together, and the signs are set.

Every table word is added to a zero that ptxas does not see through (``lane * (lane + 1)`` is even): it would keep a constant
in a uniform register and move it from there again for each PRMT.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look_up2(words, LOW: tl.constexpr, HIGH: tl.constexpr, INTERPRET: tl.constexpr):
    """Words ``[M, N]`` of 2-bit codes to a tuple of eight fp16 tensors ``[M, N]``, one a field.

    Args:
        words: int16.
        LOW: the low bytes of the four levels as an int32; HIGH: their high bytes.
    """
    low = tl.full(words.shape, LOW, tl.int32)
    high = tl.full(words.shape, HIGH, tl.int32)
    if INTERPRET:
        levels = _portable2(words, low, high)
    else:
        levels = _prmt2(words, low, high)
    return levels


@triton.jit
def look_up4(words, LOW0: tl.constexpr, LOW1: tl.constexpr, HIGH0: tl.constexpr, HIGH1: tl.constexpr,
             INTERPRET: tl.constexpr):  # fmt: skip
    """Words ``[M, N]`` of 4-bit codes to a tuple of four fp16 tensors ``[M, N]``, one a field.

    Args:
        words: int16.
        LOW0: the low bytes of levels 8 to 11 as an int32, LOW1 those of levels 12 to 15; level ``15 - c`` is that of ``c``
            negated.
        HIGH0: their high bytes, likewise HIGH1.
    """
    low0 = tl.full(words.shape, LOW0, tl.int32)
    low1 = tl.full(words.shape, LOW1, tl.int32)
    high0 = tl.full(words.shape, HIGH0, tl.int32)
    high1 = tl.full(words.shape, HIGH1, tl.int32)
    if INTERPRET:
        levels = _portable4(words, low0, low1, high0, high1)
    else:
        levels = _prmt4(words, low0, low1, high0, high1)
    return levels


@triton.jit
def _portable2(words, low, high):
    levels = ()
    bits = words.to(tl.int32)
    for j in tl.static_range(8):
        place = 8 * ((bits >> (2 * j)) & 3)
        number = ((low >> place) & 0xFF) | (((high >> place) & 0xFF) << 8)
        levels = levels + (number.to(tl.int16).to(tl.float16, bitcast=True),)
    return levels


@triton.jit
def _portable4(words, low0, low1, high0, high1):
    levels = ()
    bits = words.to(tl.int32)
    for j in tl.static_range(4):
        code = (bits >> (4 * j)) & 15
        index = tl.where(code < 8, 7 - code, code - 8)
        place = 8 * (index % 4)
        low = tl.where(index < 4, low0, low1)
        high = tl.where(index < 4, high0, high1)
        number = ((low >> place) & 0xFF) | (((high >> place) & 0xFF) << 8) | tl.where(code < 8, 0x8000, 0)
        levels = levels + (number.to(tl.int16).to(tl.float16, bitcast=True),)
    return levels


@triton.jit
def _prmt2(words, low, high):
    """Operands come in pairs of neighbours: $8 holds two words, $9 and $10 their (one) table, and so on."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 codes, pick, lows, highs;
        .reg .b32 zero, next;
        mov.u32 zero, %laneid;
        add.u32 next, zero, 1;
        mul.lo.u32 zero, zero, next;
        and.b32 zero, zero, 1;
        add.u32 lows, $9, zero;
        add.u32 highs, $11, zero;
        prmt.b32 codes, $8, $8, 0x3120;
        and.b32 pick, codes, 0x03030303;
        mad.lo.u32 pick, pick, 17, 0x40404040;
        prmt.b32 $0, lows, highs, pick;
        shr.u32 pick, pick, 16;
        prmt.b32 $4, lows, highs, pick;
        shr.u32 pick, codes, 2;
        and.b32 pick, pick, 0x03030303;
        mad.lo.u32 pick, pick, 17, 0x40404040;
        prmt.b32 $1, lows, highs, pick;
        shr.u32 pick, pick, 16;
        prmt.b32 $5, lows, highs, pick;
        shr.u32 pick, codes, 4;
        and.b32 pick, pick, 0x03030303;
        mad.lo.u32 pick, pick, 17, 0x40404040;
        prmt.b32 $2, lows, highs, pick;
        shr.u32 pick, pick, 16;
        prmt.b32 $6, lows, highs, pick;
        shr.u32 pick, codes, 6;
        and.b32 pick, pick, 0x03030303;
        mad.lo.u32 pick, pick, 17, 0x40404040;
        prmt.b32 $3, lows, highs, pick;
        shr.u32 pick, pick, 16;
        prmt.b32 $7, lows, highs, pick;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [words, low, high],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _prmt4(words, low0, low1, high0, high1):
    """Operands come in pairs of neighbours: $4 holds two words, $5 and $6 their (one) table, and so on."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 below, flip, index, low, high, sign, l0, l1, h0, h1;
        .reg .b32 zero, next;
        mov.u32 zero, %laneid;
        add.u32 next, zero, 1;
        mul.lo.u32 zero, zero, next;
        and.b32 zero, zero, 1;
        add.u32 l0, $5, zero;
        add.u32 l1, $7, zero;
        add.u32 h0, $9, zero;
        add.u32 h1, $11, zero;
        not.b32 below, $4;
        and.b32 below, below, 0x88888888;
        shr.u32 flip, below, 3;
        sub.u32 flip, below, flip;
        xor.b32 index, $4, flip;
        and.b32 index, index, 0x77777777;
        prmt.b32 index, index, index, 0x3120;
        prmt.b32 low, l0, l1, index;
        prmt.b32 high, h0, h1, index;
        prmt.b32 $0, low, high, 0x6240;
        prmt.b32 $1, low, high, 0x7351;
        shr.u32 index, index, 16;
        prmt.b32 low, l0, l1, index;
        prmt.b32 high, h0, h1, index;
        prmt.b32 $2, low, high, 0x6240;
        prmt.b32 $3, low, high, 0x7351;
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
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [words, low0, low1, high0, high1],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
