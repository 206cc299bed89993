"""``decode_attention``: a few query tokens against packed tiers and a full-precision window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.packed import PackedFormat
from fade_kernels_triton.config import lookup
from fade_kernels_triton.device import interpreted, multiprocessors
from fade_kernels_triton.launch import DecodeConfig, LaunchCase
from fade_kernels_triton.merge import merge
from fade_kernels_triton.operands import HEAD_DIMS, MAX_COLUMNS, MAX_QUERIES, MAX_TIERS, PackedTier, Window, planes

WINDOW_BLOCK = 16
"""Window tokens a step."""

WINDOW_SHARE = 64
"""Window tokens a split."""

MAX_SPLITS = 512

MAX_WAITED = 16
"""Steps of a program up to which it matters how long its first one is waited for."""


@dataclass(frozen=True)
class Splits:
    """Splits of each segment of a row and head."""

    a: int
    b: int
    window: int

    @property
    def total(self) -> int:
        return self.a + self.b + self.window


def plan_splits(tiers: Sequence[PackedTier], window: Window | None, groups: int, slots: int) -> Splits:
    """Share ``slots`` resident programs among ``groups`` rows and heads, and among the segments by their size."""
    shares = -(-window.keys.shape[2] // WINDOW_SHARE) if window is not None else 0
    budget = max(1, min(slots // groups, MAX_SPLITS)) - shares
    tokens = [tier.max_tiles * tier.key_format.tile for tier in tiers]
    counts = []
    for tier, held in zip(tiers, tokens, strict=True):
        steps = -(-tier.max_tiles // tier.tiles_per_step)
        counts.append(min(max(1, budget * held // max(1, sum(tokens))), steps) if held else 0)
    counts += [0] * (2 - len(counts))
    return Splits(counts[0], counts[1], shares)


def decode_attention(
    query: Tensor,
    tiers: Sequence[PackedTier] = (),
    window: Window | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    query_positions: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    config: DecodeConfig | None = None,
    splits: Splits | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything that a cache holds, in one launch and one merge.

    All packed tokens come before the queries; the queries' own tokens are the last of the window and see each other
    causally. With ``positions`` on the operands, and always for ``sliding_window``, positions decide instead.
    Nothing is read back to the host, so the call can be captured into a CUDA graph.

    Args:
        query: ``[B, H_q, Q, D]`` fp16 or bf16 (without a window also float32), ``Q`` from 1 to 8, contiguous along the
            channels.
        tiers: up to two packed tiers.
        window: full-precision tokens.
        scaling: softmax scale, ``D ** -0.5`` by default.
        softcap: cap of the scores (``cap * tanh(score / cap)``).
        sliding_window: a token is seen by queries less than this many positions after it.
        s_aux: ``[H_q]``, a sink logit a head that takes part in the softmax and has no value.
        query_positions: int32 ``[B, Q]``; needed where operands carry positions.
        output_dtype: of the output; the query's by default.
        config: launch configuration; by default the tuned one (``fade_kernels_triton.config.lookup``).
        splits: splits of each segment; derived from the configuration by default.

    Returns:
        Output ``[B, H_q, Q, D]`` (memory order ``[B, Q, H_q, D]``) and the natural
        log-sum-exp of the scores, sinks included, float32 ``[B, H_q, Q]`` (-inf where nothing is seen).

    Raises:
        InputError: for shapes, dtypes or combinations that the kernel cannot take; the message says which.
        ConfigError: where the user's own file of launch configurations cannot be read.
    """
    from fade_kernels_triton.jit.decode import decode_kernel

    heads_kv = _check(query, tiers, window, softcap, sliding_window, query_positions)
    rows, heads, q_len, dim = query.shape
    group = heads // heads_kv
    columns = group * q_len
    groups = rows * heads_kv
    first = tiers[0] if tiers else None
    second = tiers[1] if len(tiers) > 1 else None
    if config is None:
        bits, fmt = (first.value_format.bits, first.key_format) if first else (4, PackedFormat(4, dim))
        held = _next_power_of_2(sum(t.max_tiles * t.key_format.tile for t in tiers) or WINDOW_SHARE)
        config = lookup(LaunchCase(bits, fmt.axis, fmt.tile, dim, columns, groups, held), query.device)
    if splits is None:
        splits = plan_splits(tiers, window, groups, multiprocessors(query.device) * config.resident)
    if not splits.total:
        raise InputError("decode_attention was given nothing to attend to: no packed tier and no window")

    interpret = interpreted()
    padded_columns = max(8, _next_power_of_2(columns))
    padded_dim = max(64, _next_power_of_2(dim))
    out = torch.empty(rows, q_len, heads, dim, dtype=output_dtype or query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(rows, heads, q_len, dtype=torch.float32, device=query.device)
    part = torch.empty(groups, splits.total, columns, dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(groups, splits.total, columns, dtype=torch.float32, device=query.device)
    overlap = config.overlap and not interpret
    options: dict[str, Any] = {"num_warps": config.warps} | ({"launch_pdl": True} if overlap else {})
    if config.registers and not interpret:
        options["maxnreg"] = config.registers
    decode_kernel[(splits.total, groups)](
        query,
        query_positions,
        *_tier_pointers(first),
        *_tier_pointers(second),
        *((window.keys, window.values, window.length, window.positions) if window else (None,) * 4),
        s_aux,
        part,
        part_lse,
        out,
        lse,
        float(dim**-0.5 if scaling is None else scaling),
        float(softcap or 1.0),
        int(sliding_window or 0),
        heads_kv,
        first.max_tiles if first else 0,
        second.max_tiles if second else 0,
        splits.a,
        splits.b,
        splits.window,
        *query.stride()[:3],
        *out.stride()[:3],
        *(window.keys.stride()[:3] if window else (0,) * 3),
        *(window.values.stride()[:3] if window else (0,) * 3),
        *(_row_head_strides(window.length) if window else (0, 0)),
        *(_row_head_strides(window.positions, trailing=1) if window and window.positions is not None else (0, 0)),
        HEADS=group,
        Q_LEN=q_len,
        D=dim,
        DP=padded_dim,
        N=padded_columns,
        **_tier_constants(first, "A"),
        **_tier_constants(second, "B"),
        HAS_WINDOW=window is not None,
        BLOCK=WINDOW_BLOCK,
        STAGES=config.stages + 2 * any(t.table is not None for t in tiers),
        SOFTCAP=softcap is not None,
        SLIDING=sliding_window is not None,
        PREFETCH=_prefetches(first, splits.a) and not interpret,
        SUBNORMAL=config.subnormal,
        PDL=overlap,
        INTERPRET=interpret,
        **options,
    )
    merge(part, part_lse, s_aux, out, lse, overlap)
    return out, lse


def _prefetches(tier: PackedTier | None, splits: int) -> bool:
    """Whether programs ask for their first tile before they know that it is there: where the wait for it weighs."""
    return tier is not None and tier.table is None and tier.max_tiles <= MAX_WAITED * splits * tier.tiles_per_step


def _check(
    query: Tensor,
    tiers: Sequence[PackedTier],
    window: Window | None,
    softcap: float | None,
    sliding_window: int | None,
    query_positions: Tensor | None,
) -> int:
    """Refuse what the kernel cannot take; the number of KV heads."""
    rows, heads, q_len, dim = _check_query(query, window)
    if len(tiers) > MAX_TIERS:
        raise InputError(f"{len(tiers)} packed tiers; the Triton decode kernel takes at most {MAX_TIERS}")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap={softcap} must be positive")
    shapes = [tuple(tier.count.shape) for tier in tiers] + ([tuple(window.keys.shape[:2])] if window else [])
    if not shapes:
        raise InputError("decode_attention was given nothing to attend to: no packed tier and no window")
    if any(len(s) != 2 or s != shapes[0] for s in shapes) or shapes[0][0] != rows or heads % shapes[0][1]:
        raise InputError(
            f"query {tuple(query.shape)} does not match the rows and KV heads of the operands {shapes}; counts are "
            f"[B, H_kv] and H_q is a multiple of H_kv"
        )
    columns = heads // shapes[0][1] * q_len
    if columns > MAX_COLUMNS:
        raise InputError(f"{columns} query columns a KV head; the Triton decode kernel takes up to {MAX_COLUMNS}")
    for tier in tiers:
        if tier.key_format.head_dim != dim or tier.value_format.head_dim != dim:
            raise InputError(f"a tier of head_dim {tier.key_format.head_dim} beside a query of head_dim {dim}")
    if window is not None and (window.keys.shape[3] != dim or window.keys.dtype != query.dtype):
        raise InputError(
            f"window of {window.keys.dtype} {tuple(window.keys.shape)} beside a query of {query.dtype} head_dim {dim}"
        )
    _check_positions(rows, q_len, tiers, window, sliding_window, query_positions)
    return int(shapes[0][1])


def _check_query(query: Tensor, window: Window | None) -> tuple[int, int, int, int]:
    if query.dim() != 4 or query.stride(3) != 1:
        raise InputError(f"query must be [B, H_q, Q, D] with contiguous channels; found {tuple(query.shape)}")
    rows, heads, q_len, dim = query.shape
    if query.dtype not in (torch.float16, torch.bfloat16) and (query.dtype != torch.float32 or window is not None):
        raise InputError(
            f"query dtype {query.dtype}; the Triton decode kernel takes float16 and bfloat16, without a window float32"
        )
    if dim not in HEAD_DIMS:
        raise InputError(f"head_dim {dim}; the Triton decode kernel takes {', '.join(map(str, HEAD_DIMS))}")
    if not 1 <= q_len <= MAX_QUERIES:
        raise InputError(f"{q_len} query tokens; the Triton decode kernel takes 1 to {MAX_QUERIES}")
    return rows, heads, q_len, dim


def _check_positions(
    rows: int,
    q_len: int,
    tiers: Sequence[PackedTier],
    window: Window | None,
    sliding_window: int | None,
    query_positions: Tensor | None,
) -> None:
    positioned = [tier.positions is not None for tier in tiers] + (
        [window.positions is not None] if window is not None else []
    )
    if (any(positioned) or sliding_window is not None) and query_positions is None:
        raise InputError("query_positions is needed where operands carry positions and for a sliding window")
    if sliding_window is not None and not all(positioned):
        raise InputError("a sliding window needs positions on every tier and on the window")
    if query_positions is not None and (
        query_positions.dtype != torch.int32
        or tuple(query_positions.shape) != (rows, q_len)
        or not query_positions.is_contiguous()
    ):
        raise InputError(f"query_positions must be a contiguous int32 [B, Q]; found {tuple(query_positions.shape)}")


def _tier_pointers(tier: PackedTier | None) -> tuple[Tensor | None, ...]:
    if tier is None:
        return (None,) * 9
    return (
        *planes(tier.keys, tier.key_format),
        tier.keys["meta"],
        planes(tier.values, tier.value_format)[0],
        tier.values["meta"],
        tier.table,
        tier.count,
        tier.valid,
        tier.positions,
    )


def _tier_constants(tier: PackedTier | None, name: str) -> dict[str, Any]:
    return {
        f"{name}_BITS": tier.key_format.bits if tier else 0,
        f"{name}_VALUE_BITS": tier.value_format.bits if tier else 0,
        f"{name}_GROUPS": tier.value_format.groups if tier else 1,
        f"{name}_KEY_CHANNEL": tier.key_format.axis == "channel" if tier else False,
        f"{name}_TILE": tier.key_format.tile if tier else 64,
        f"{name}_TILES": tier.tiles_per_step if tier else 1,
    }


def _row_head_strides(tensor: Tensor, trailing: int = 0) -> tuple[int, int]:
    """Strides along rows and heads of ``[B, ...]`` or ``[B, H_kv, ...]``; 0 where all heads share."""
    return tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 + trailing else 0


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
