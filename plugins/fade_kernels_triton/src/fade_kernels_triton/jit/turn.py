"""What is done around ``planes_kernel``: queries to the space of the planes, and outputs back from it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn_kernel(
    QUERY,
    CHANNELS,
    SCALES,
    DEVIATION,
    INVERSE,
    MEAN,
    REACH,
    TURNED,
    NORM,
    BIAS,
    scaling,
    kv_heads,
    kept,
    columns,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid ``[planes, B * H_kv, columns / N]``: inner products of N query columns with a step of a plane's channels.

    They are divided by a power of two a column that none exceeds, which is written once a row and head, as are the query's
    inner products with the mean.
    """
    plane = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // kv_heads).to(tl.int64)
    kv_head = (program % kv_heads).to(tl.int64)
    planes = tl.num_programs(0)
    column = tl.program_id(2) * N + tl.arange(0, N)
    channel = tl.arange(0, DP)
    inside = tl.arange(0, 16)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = kv_head * planes + plane
    own = kv_head * kept + tl.load(CHANNELS + at) + inside
    worth = tl.load(DEVIATION + own) * tl.load(SCALES + at)
    inverse = tl.load(INVERSE + own[:, None] * D + channel[None, :], mask=(channel < D)[None, :], other=0.0)
    mean = tl.load(MEAN + kv_head * D + channel, mask=channel < D, other=0.0)
    reach = tl.load(REACH + kv_head)
    if PDL:
        tl.extra.cuda.gdc_wait()
    start = (
        row * query_stride_b + (kv_head * HEADS + column % HEADS) * query_stride_h + (column // HEADS) * query_stride_q
    )
    mask = (column < Q_LEN * HEADS)[None, :] & (channel < D)[:, None]
    query = tl.load(QUERY + start[None, :] + channel[:, None], mask=mask, other=0.0).to(tl.float32) * scaling
    largest = tl.maximum(tl.sqrt(tl.sum(query * query, 0)) * reach, 1.0e-30)
    bits = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000  # the exponent, rounded up
    shrink = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    turned = tl.dot(inverse.to(tl.float32), query, input_precision="ieee") * worth[:, None] * shrink[None, :]
    places = TURNED + ((program.to(tl.int64) * planes + plane) * columns + column)[None, :] * 16 + inside[:, None]
    tl.store(places, turned.to(tl.float16))
    if plane == 0:
        tl.store(NORM + program * columns + column, bits.to(tl.float32, bitcast=True))
        tl.store(BIAS + program * columns + column, tl.sum(query * mean[:, None], 0))


@triton.jit
def finish_kernel(
    MERGED,
    MERGED_LSE,
    BIAS,
    CHANNELS,
    SCALES,
    DEVIATION,
    INVERSE,
    MEAN,
    OTHER,
    OTHER_LSE,
    SINK,
    OUT,
    LSE,
    kv_heads,
    kept,
    columns,
    other_stride_b,
    other_stride_h,
    other_stride_q,
    out_stride_b,
    out_stride_h,
    out_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    N: tl.constexpr,
    PLANES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid ``[D / BLOCK, B * H_kv, columns / N]``: a tier's merged output to BLOCK channels of the model's, with its mean.

    OTHER, an output in the model's space, and the SINK take their shares.
    """
    block = tl.program_id(0)
    program = tl.program_id(1)
    row = (program // kv_heads).to(tl.int64)
    kv_head = (program % kv_heads).to(tl.int64)
    column = tl.program_id(2) * N + tl.arange(0, N)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = tl.arange(0, 16)
    head = kv_head * HEADS + column % HEADS
    query = column // HEADS
    meant = column < HEADS * Q_LEN
    seen = channel < D
    at = (row * kv_heads * HEADS + head) * Q_LEN + query
    mean = tl.load(MEAN + kv_head * D + channel, mask=seen, other=0.0)
    worth = ()
    inverse = ()
    for p in tl.static_range(PLANES):
        own = kv_head * kept + tl.load(CHANNELS + kv_head * PLANES + p) + inside
        worth = worth + (tl.load(DEVIATION + own) * tl.load(SCALES + kv_head * PLANES + p),)
        inverse = inverse + (tl.load(INVERSE + own[:, None] * D + channel[None, :], mask=seen[None, :], other=0.0),)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lse = tl.load(MERGED_LSE + at, mask=meant, other=float("-inf"))
    lse += tl.load(BIAS + program * columns + column, mask=meant, other=0.0)
    out = tl.zeros([N, BLOCK], tl.float32)
    for p in tl.static_range(PLANES):
        part = tl.load(MERGED + at[:, None] * (PLANES * 16) + p * 16 + inside[None, :], mask=meant[:, None], other=0.0)
        out = tl.dot(part * worth[p][None, :], inverse[p].to(tl.float32), out, input_precision="ieee")
    live = lse > float("-inf")
    out += tl.where(live[:, None], mean[None, :], 0.0)
    best = tl.where(live, lse, -1.0e30)
    if OTHER is not None:
        other_lse = tl.load(OTHER_LSE + at, mask=meant, other=float("-inf"))
        best = tl.maximum(best, other_lse)
    if SINK is not None:
        sink = tl.load(SINK + head, mask=meant, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, sink)
    share = tl.exp(lse - best)
    total = share
    out = out * share[:, None]
    if OTHER is not None:
        other = row * other_stride_b + head * other_stride_h + query * other_stride_q
        mask = meant[:, None] & seen[None, :]
        other_out = tl.load(OTHER + other[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        share = tl.exp(other_lse - best)
        total += share
        out += other_out * share[:, None]
    if SINK is not None:
        total += tl.exp(sink - best)
    any_mass = total > 0
    out = out * tl.where(any_mass, 1.0 / tl.where(any_mass, total, 1.0), 0.0)[:, None]
    target = row * out_stride_b + head * out_stride_h + query * out_stride_q
    tl.store(
        OUT + target[:, None] + channel[None, :],
        out.to(OUT.dtype.element_ty),
        mask=meant[:, None] & seen[None, :],
    )
    if block == 0:
        lse = tl.where(any_mass, best + tl.log(tl.where(any_mass, total, 1.0)), float("-inf"))
        tl.store(LSE + at, lse, mask=meant)
