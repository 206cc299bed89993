"""From packed int16 words to fp16 matrix operands.

A field of ``w`` bits masked out of a word *is* an fp16 number: a subnormal worth ``code * place * 2**-24``, where
``place = 2 ** ((w * j) % 8)`` is the field's place in its byte. Tensor cores take subnormals exactly, so unpacking is
one AND a pair of codes; ``unit`` is the factor that turns a sum of such products back into codes. ``SUBNORMAL=False``
builds the same codes as normal numbers, ``code * place``, at one more instruction a pair.

A code of 3 bits is put together where the field of its high two bits lies, from words of both planes.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUBNORMAL_UNIT = tl.constexpr(2.0**24)


@triton.jit
def unpack(words, BITS: tl.constexpr, SUBNORMAL: tl.constexpr, INTERPRET: tl.constexpr):
    """Words ``[M, N]`` to a tuple of ``16 // BITS`` fp16 tensors ``[M, N]``, one a field."""
    if INTERPRET:
        fields = _unpack_portable(words, BITS, SUBNORMAL)
    elif BITS == 4:
        if SUBNORMAL:
            fields = _unpack4_subnormal(words)
        else:
            fields = _unpack4_normal(words)
    elif SUBNORMAL:
        fields = _unpack2_subnormal(words)
    else:
        fields = _unpack2_normal(words)
    return fields


@triton.jit
def unpack3(high, low, half, SUBNORMAL: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes of 3 bits from words of both planes ``[M, N]``: eight fp16 tensors, in the places of fields of 2 bits.

    Fields of ``low`` are half as long: where int16 ``half`` is 1, the code's low bit is one field further on.
    """
    if SUBNORMAL and not INTERPRET:
        fields = tl.inline_asm_elementwise(
            """{
            .reg .b32 one, two, bits, more, last;
            shl.b32 one, $8, 1;
            shr.u32 two, $8, 7;
            and.b32 last, $10, 1;
            shr.u32 bits, $9, last;
            shr.u32 more, bits, 8;
            and.b32 last, bits, 0x00010001;
            lop3.b32 $0, one, 0x00060006, last, 0xea;
            and.b32 last, bits, 0x00040004;
            lop3.b32 $1, one, 0x00180018, last, 0xea;
            and.b32 last, bits, 0x00100010;
            lop3.b32 $2, one, 0x00600060, last, 0xea;
            and.b32 last, bits, 0x00400040;
            lop3.b32 $3, one, 0x01800180, last, 0xea;
            and.b32 last, more, 0x00010001;
            lop3.b32 $4, two, 0x00060006, last, 0xea;
            and.b32 last, more, 0x00040004;
            lop3.b32 $5, two, 0x00180018, last, 0xea;
            and.b32 last, more, 0x00100010;
            lop3.b32 $6, two, 0x00600060, last, 0xea;
            and.b32 last, more, 0x00400040;
            lop3.b32 $7, two, 0x01800180, last, 0xea;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [high, low, half],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        fields = ()
        for j in tl.static_range(8):
            two = (high.to(tl.int32) >> (2 * j)) & 3
            code = ((two << 1) | ((low.to(tl.int32) >> (half.to(tl.int32) + 2 * j)) & 1)) << (2 * (j % 4))
            if SUBNORMAL:
                fields = fields + (code.to(tl.int16).to(tl.float16, bitcast=True),)
            else:
                fields = fields + (code.to(tl.float16),)
    return fields


@triton.jit
def _unpack_portable(words, BITS: tl.constexpr, SUBNORMAL: tl.constexpr):
    fields = ()
    bits = words.to(tl.int32) & 0xFFFF
    for j in tl.static_range(16 // BITS):
        field = (bits >> (8 * ((BITS * j) // 8))) & ((2**BITS - 1) << ((BITS * j) % 8))
        if SUBNORMAL:
            fields = fields + (field.to(tl.int16).to(tl.float16, bitcast=True),)
        else:
            fields = fields + (field.to(tl.float16),)
    return fields


@triton.jit
def _unpack4_subnormal(words):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 high;
        and.b32 $0, $4, 0x000f000f;
        and.b32 $1, $4, 0x00f000f0;
        shr.u32 high, $4, 8;
        and.b32 $2, high, 0x000f000f;
        and.b32 $3, high, 0x00f000f0;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _unpack4_normal(words):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 high, bias;
        mov.b32 bias, 0x64006400;
        lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
        shr.u32 high, $4, 8;
        lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
        sub.rn.f16x2 $0, $0, bias;
        sub.rn.f16x2 $1, $1, bias;
        sub.rn.f16x2 $2, $2, bias;
        sub.rn.f16x2 $3, $3, bias;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _unpack2_subnormal(words):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 high;
        and.b32 $0, $8, 0x00030003;
        and.b32 $1, $8, 0x000c000c;
        and.b32 $2, $8, 0x00300030;
        and.b32 $3, $8, 0x00c000c0;
        shr.u32 high, $8, 8;
        and.b32 $4, high, 0x00030003;
        and.b32 $5, high, 0x000c000c;
        and.b32 $6, high, 0x00300030;
        and.b32 $7, high, 0x00c000c0;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _unpack2_normal(words):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 high, bias;
        mov.b32 bias, 0x64006400;
        lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xea;
        lop3.b32 $1, $8, 0x000c000c, 0x64006400, 0xea;
        lop3.b32 $2, $8, 0x00300030, 0x64006400, 0xea;
        lop3.b32 $3, $8, 0x00c000c0, 0x64006400, 0xea;
        shr.u32 high, $8, 8;
        lop3.b32 $4, high, 0x00030003, 0x64006400, 0xea;
        lop3.b32 $5, high, 0x000c000c, 0x64006400, 0xea;
        lop3.b32 $6, high, 0x00300030, 0x64006400, 0xea;
        lop3.b32 $7, high, 0x00c000c0, 0x64006400, 0xea;
        sub.rn.f16x2 $0, $0, bias;
        sub.rn.f16x2 $1, $1, bias;
        sub.rn.f16x2 $2, $2, bias;
        sub.rn.f16x2 $3, $3, bias;
        sub.rn.f16x2 $4, $4, bias;
        sub.rn.f16x2 $5, $5, bias;
        sub.rn.f16x2 $6, $6, bias;
        sub.rn.f16x2 $7, $7, bias;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def low_half(meta):
    """The fp16 scale of metadata words."""
    return (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def high_half(meta):
    """The fp16 minimum of metadata words."""
    return (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def scale_query(query, meta, INTERPRET: tl.constexpr):
    """Query ``[D, N]`` times the fp16 scales of ``meta`` ``[D]``, rounded to fp16."""
    wide = tl.broadcast_to(meta[:, None], query.shape[0], query.shape[1])
    if INTERPRET:
        scaled = query * low_half(wide)
    else:
        scaled = tl.inline_asm_elementwise(
            """{
            .reg .b32 scale;
            prmt.b32 scale, $2, $3, 0x5410;
            mul.rn.f16x2 $0, $1, scale;
            }""",
            "=r,r,r,r",
            [query, wide],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return scaled


@triton.jit
def unit(BITS: tl.constexpr, j: tl.constexpr, SUBNORMAL: tl.constexpr):
    """What one unit of field ``j``'s products is worth in codes."""
    place: tl.constexpr = 2 ** ((BITS * j) % 8)
    if SUBNORMAL:
        return SUBNORMAL_UNIT / place
    else:
        return 1.0 / place


@triton.jit
def codes_by_token(
    CODES, LOW, token, channel, BITS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr
):
    """int32 codes ``[TILE, DP]`` of a tile whose planes are at CODES and, for 3 bits, at LOW; zeros past ``D``."""
    if BITS == 3:
        high = _plane_by_token(CODES, token, channel, 2, TRANSPOSED, TILE, D)
        codes = (high << 1) | _plane_by_token(LOW, token, channel, 1, TRANSPOSED, TILE, D)
    else:
        codes = _plane_by_token(CODES, token, channel, BITS, TRANSPOSED, TILE, D)
    return codes


@triton.jit
def _plane_by_token(
    CODES, token, channel, BITS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr
):
    """Field ``t // R`` of word row ``t % R`` is token ``t``. TRANSPOSED words are ``[D, R]``, others ``[R, D]``."""
    R: tl.constexpr = TILE * BITS // 16
    if TRANSPOSED:
        where = channel[None, :] * R + (token % R)[:, None]
    else:
        where = (token % R)[:, None] * D + channel[None, :]
    words = tl.load(CODES + where, mask=(channel < D)[None, :], other=0).to(tl.int32)
    return (words >> (BITS * (token // R))[:, None]) & (2**BITS - 1)
