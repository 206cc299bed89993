"""From packed int16 words to fp16 matrix operands.

A field of ``w`` bits masked out of a word *is* an fp16 number: a subnormal worth ``code * place * 2**-24``, where
``place = 2 ** ((w * j) % 8)`` is the field's place in its byte. Tensor cores take subnormals exactly, so unpacking is
one AND a pair of codes; ``unit`` is the factor that turns a sum of such products back into codes. ``SUBNORMAL=False``
builds the same codes as normal numbers, ``code * place``, at one more instruction a pair.
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
    CODES, token, channel, BITS: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """int32 codes ``[TILE, DP]`` of the tile at CODES: field ``t // R`` of word row ``t % R`` is token ``t``; zeros past ``D``.

    TRANSPOSED words are ``[D, R]``, others ``[R, D]``.
    """
    if TRANSPOSED:
        where = channel[None, :] * R + (token % R)[:, None]
    else:
        where = (token % R)[:, None] * D + channel[None, :]
    words = tl.load(CODES + where, mask=(channel < D)[None, :], other=0).to(tl.int32)
    return (words >> (BITS * (token // R))[:, None]) & (2**BITS - 1)
