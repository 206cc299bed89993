"""What is done around ``planes_kernel``: queries to the space of the planes, and outputs back from it."""

from __future__ import annotations

import triton
import triton.language as tl

from fade_kernels_triton.jit.decode import LN2, power_above


@triton.jit
def turn_kernel(
    QUERY,
    SLOTS,
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
    query_stride_b,
    query_stride_h,
    query_stride_q,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid ``[planes, query columns, B * H_kv]``: a query's inner products with what one step of each slot of a plane is worth.

    They are divided by a power of two that none exceeds, which is written once a column, as is the query's inner product with
    the mean.
    """
    plane = tl.program_id(0)
    column = tl.program_id(1)
    program = tl.program_id(2)
    planes = tl.num_programs(0)
    columns = tl.num_programs(1)
    row = (program // kv_heads).to(tl.int64)
    kv_head = (program % kv_heads).to(tl.int64)
    channel = tl.arange(0, DP)
    inside = tl.arange(0, 16)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = (kv_head * planes + plane) * 16 + inside
    own = kv_head * kept + tl.load(SLOTS + slot * 2)
    worth = tl.load(DEVIATION + own) * tl.load(SCALES + slot)
    inverse = tl.load(INVERSE + own[:, None] * D + channel[None, :], mask=(channel < D)[None, :], other=0.0)
    mean = tl.load(MEAN + kv_head * D + channel, mask=channel < D, other=0.0)
    reach = tl.load(REACH + kv_head)
    if PDL:
        tl.extra.cuda.gdc_wait()  # until here only what no launch writes was read
    start = (
        row * query_stride_b + (kv_head * HEADS + column % HEADS) * query_stride_h + column // HEADS * query_stride_q
    )
    query = tl.load(QUERY + start + channel, mask=channel < D, other=0.0).to(tl.float32) * scaling
    power, shrink = power_above(tl.sqrt(tl.sum(query * query, 0)) * reach)
    turned = tl.sum(inverse.to(tl.float32) * query[None, :], 1) * worth * shrink
    at = program.to(tl.int64) * columns + column
    tl.store(TURNED + (at * planes + plane) * 16 + inside, turned.to(tl.float16))
    if plane == 0:
        tl.store(NORM + at, power)
        tl.store(BIAS + at, tl.sum(query * mean, 0))


@triton.jit(do_not_specialize=["splits"])
def finish_kernel(
    PART,
    PART_LSE,
    BIAS,
    SLOTS,
    SCALES,
    DEVIATION,
    INVERSE,
    MEAN,
    OTHER,
    OTHER_LSE,
    SINK,
    OUT,
    LSE,
    splits,
    kv_heads,
    kept,
    other_stride_b,
    other_stride_h,
    other_stride_q,
    out_stride_b,
    out_stride_h,
    out_stride_q,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid ``[D / BLOCK, query columns, B * H_kv]``: merge what the splits have left of one query column, and bring it back.

    The merged output, of PLANES * 16 slots (WIDTH, a power of two, with room), is multiplied by what each is worth in the
    model's channels, of which a program makes BLOCK; the mean is added. OTHER, an output in the model's space, and the SINK
    take their shares. SPLITS is the next power of two of ``splits``, of which CHUNK are read at once.
    """
    block = tl.program_id(0)
    column = tl.program_id(1)
    program = tl.program_id(2)
    row = (program // kv_heads).to(tl.int64)
    kv_head = (program % kv_heads).to(tl.int64)
    head = kv_head * HEADS + column % HEADS
    query = column // HEADS
    COLUMNS: tl.constexpr = HEADS * Q_LEN
    channel = block * BLOCK + tl.arange(0, BLOCK)
    seen = channel < D
    inside = tl.arange(0, WIDTH)
    stored = inside < PLANES * 16
    at = program.to(tl.int64) * COLUMNS + column
    slot = kv_head * (PLANES * 16) + inside
    own = kv_head * kept + tl.load(SLOTS + slot * 2, mask=stored, other=0)
    worth = tl.load(DEVIATION + own, mask=stored, other=0.0) * tl.load(SCALES + slot, mask=stored, other=0.0)
    inverse = tl.load(INVERSE + own[:, None] * D + channel[None, :], mask=stored[:, None] & seen[None, :], other=0.0)
    mean = tl.load(MEAN + kv_head * D + channel, mask=seen, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: the next programs would crowd where this layer's end first

    # all parts by their log-sum-exps, base 2
    bias = tl.load(BIAS + at)
    split = tl.arange(0, SPLITS)
    places = PART_LSE + program.to(tl.int64) * splits * COLUMNS + column
    lses = tl.load(places + split * COLUMNS, mask=split < splits, other=float("-inf"))
    best = tl.max(lses, 0)
    live = best > float("-inf")
    peak = tl.where(live, best, 0.0)
    mass = tl.sum(tl.exp2(lses - peak), 0)
    merged = tl.zeros([WIDTH], tl.float32)
    for first in tl.static_range(0, SPLITS, CHUNK):
        number = first + tl.arange(0, CHUNK)
        there = number < splits
        weight = tl.exp2(tl.load(places + number * COLUMNS, mask=there, other=float("-inf")) - peak)
        part = tl.load(
            PART
            + ((program.to(tl.int64) * splits + number) * COLUMNS + column)[:, None] * (PLANES * 16)
            + inside[None, :],
            mask=there[:, None] & stored[None, :],
            other=0.0,
        )
        merged += tl.sum(part * weight[:, None], 0)
    merged = merged * worth / tl.where(live, mass, 1.0)
    out = tl.sum(merged[:, None] * inverse.to(tl.float32), 0) + tl.where(live, mean, 0.0)
    lse = tl.where(live, (peak + tl.log2(tl.where(live, mass, 1.0))) * LN2 + bias, float("-inf"))

    # beside what else was attended to
    where = (row * kv_heads * HEADS + head) * Q_LEN + query
    top = lse
    if OTHER is not None:
        other_lse = tl.load(OTHER_LSE + where)
        top = tl.maximum(top, other_lse)
    if SINK is not None:
        sink = tl.load(SINK + head).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.exp(lse - top)
    out = out * total
    if OTHER is not None:
        start = OTHER + row * other_stride_b + head * other_stride_h + query * other_stride_q
        share = tl.exp(other_lse - top)
        out += tl.load(start + channel, mask=seen, other=0.0).to(tl.float32) * share
        total += share
    if SINK is not None:
        total += tl.exp(sink - top)
    any_mass = total > 0
    out = out * tl.where(any_mass, 1.0 / tl.where(any_mass, total, 1.0), 0.0)
    target = OUT + row * out_stride_b + head * out_stride_h + query * out_stride_q
    tl.store(target + channel, out.to(OUT.dtype.element_ty), mask=seen)
    if block == 0:
        tl.store(LSE + where, tl.where(any_mass, top + tl.log(tl.where(any_mass, total, 1.0)), float("-inf")))
