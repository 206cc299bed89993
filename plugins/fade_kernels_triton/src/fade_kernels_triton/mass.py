"""FADE's ``attention_mass`` op, run by Triton kernels: what a step gives to each token, from the keys alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fade_core import FullSegment, Observation, PackedSegment, attention_mass
from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import PackedFormat
from fade_kernels_triton.device import DTYPES, interpreted, unusable
from fade_kernels_triton.operands import HEAD_DIMS, MAX_COLUMNS, MAX_QUERIES, planes, unsupported_format

BLOCK = 32
"""Window tokens of a program."""

NOTED = ("mass", "seen", "ema", "last", "window")
"""Statistics that the kernels keep, in the order of their arguments."""


class TritonAttentionMass(Kernel):
    """``attention_mass`` of packed keys that ``decode_attention`` reads, and of a window whose lengths are on the device.

    Statistics follow in the same launch. Other windows go through torch.
    """

    name: ClassVar[str] = "triton"
    op: ClassVar[Op] = "attention_mass"
    priority: ClassVar[int] = -10 if interpreted() else 10
    observes: ClassVar[bool] = True

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        reason = unusable(device)
        if not reason and head_dim not in HEAD_DIMS:
            reason = f"head_dim {head_dim} (it takes {', '.join(map(str, HEAD_DIMS))})"
        reason = reason or unsupported_format(format, "key")
        return Support(not reason, reason)

    def accepts(
        self,
        query: Tensor,
        segment: FullSegment | PackedSegment,
        lse: Tensor,
        scaling: float,
        softcap: float | None = None,
        noted: Observation | None = None,
    ) -> Support:
        if isinstance(segment, FullSegment):
            reason = "" if noted is None else _odd_window(query, segment)
        else:
            reason = _refusal(query, segment, softcap)
        if noted is not None and not reason:
            reason = _odd_statistics(noted, query.shape[2])
        return Support(not reason, reason)

    def __call__(
        self,
        query: Tensor,
        segment: FullSegment | PackedSegment,
        lse: Tensor,
        scaling: float,
        softcap: float | None = None,
        noted: Observation | None = None,
    ) -> Tensor | None:
        """As the oracle, ``fade_core.ops.reference.attention_mass``: float32 ``[B, H_kv, Q, T]``; nothing if it is ``noted``.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if refused := self.accepts(query, segment, lse, scaling, softcap, noted).reason:
            raise InputError(f"the Triton mass kernel does not take this call: {refused}")
        if isinstance(segment, FullSegment):
            if _odd_window(query, segment):
                return attention_mass(query, segment, lse, scaling, softcap)
            return _of_window(query, segment, lse, scaling, softcap, noted)
        return _of_tiles(query, segment, lse, scaling, softcap, noted)


def _of_tiles(
    query: Tensor,
    segment: PackedSegment,
    lse: Tensor,
    scaling: float,
    softcap: float | None,
    noted: Observation | None,
) -> Tensor | None:
    from fade_kernels_triton.jit.mass import mass_kernel

    store, keys = segment.store, segment.store.tier.keys
    fmt = keys.format
    if fmt is None:
        raise InputError(f"tier {store.tier.name!r} has no packed format")
    rows, heads, queries, dim = query.shape
    lse = lse.float()
    if keys.own_space:
        grouped = (query.float() * scaling).reshape(rows, store.heads, -1, dim)
        bias = keys.query_bias(grouped)
        query, scaling = keys.transform_query(grouped).reshape(rows, heads, queries, -1), 1.0
        lse = lse if bias is None else lse - bias.reshape(lse.shape)
    query, lse = (query if query.stride(3) == 1 else query.contiguous()), lse.contiguous()
    fields = store.kernel_fields("k")
    mass = _blank(query, store.heads, store.tiles * fmt.tile, noted)
    mass_kernel[(store.tiles, rows * store.heads)](
        query,
        lse,
        *planes(fields, fmt),
        fields["meta"],
        store.table,
        store.used,
        store.counts,
        mass,
        *_statistics(noted),
        float(scaling),
        float(softcap or 1.0),
        *_factors(noted),
        store.heads,
        store.ids.shape[2],
        store.tiles,
        *query.stride()[:3],
        BITS=fmt.bits,
        KEY_CHANNEL=fmt.axis == "channel",
        TILE=fmt.tile,
        **_columns(query, store.heads, softcap),
    )
    return mass


def _of_window(
    query: Tensor, segment: FullSegment, lse: Tensor, scaling: float, softcap: float | None, noted: Observation | None
) -> Tensor | None:
    from fade_kernels_triton.jit.mass import window_mass_kernel

    rows, heads, tokens, _ = segment.keys.shape
    mass = _blank(query, heads, tokens, noted)
    window_mass_kernel[(-(-tokens // BLOCK), rows * heads)](
        query if query.stride(3) == 1 else query.contiguous(),
        lse.float().contiguous(),
        segment.keys,
        segment.lengths,
        mass,
        *_statistics(noted),
        float(scaling),
        float(softcap or 1.0),
        *_factors(noted),
        heads,
        tokens,
        *query.stride()[:3],
        *segment.keys.stride()[:3],
        BLOCK=BLOCK,
        INTERPRET=interpreted(),
        **_columns(query, heads, softcap),
    )
    return mass


def _blank(query: Tensor, kv_heads: int, tokens: int, noted: Observation | None) -> Tensor | None:
    """Where probabilities go ``[B, H_kv, Q, T]``, unless they are only ``noted``."""
    if noted is not None:
        return None
    return torch.empty(query.shape[0], kv_heads, query.shape[2], tokens, dtype=torch.float32, device=query.device)


def _statistics(noted: Observation | None) -> tuple[Tensor | None, ...]:
    return tuple(None if noted is None else noted.held.get(name) for name in NOTED)


def _factors(noted: Observation | None) -> tuple[float, float]:
    return (1.0, 1.0) if noted is None else (noted.decay, noted.keeps)


def _columns(query: Tensor, kv_heads: int, softcap: float | None) -> dict[str, Any]:
    group, queries, dim = query.shape[1] // kv_heads, query.shape[2], query.shape[3]
    return {
        "HEADS": group,
        "Q_LEN": queries,
        "D": dim,
        "DP": max(64, 1 << (dim - 1).bit_length()),
        "N": max(8, 1 << (group * queries - 1).bit_length()),
        "SOFTCAP": bool(softcap),
        "num_warps": 4,
    }


def _odd_statistics(noted: Observation, queries: int) -> str:
    """Why the kernels cannot keep these statistics; empty if they can."""
    for name, held in noted.held.items():
        if name not in NOTED or held.dtype != torch.float32 or not held.is_contiguous():
            return f"statistic {name!r} of {held.dtype} {tuple(held.shape)}, strides {held.stride()}"
    if "window" in noted.held and noted.observed < queries:
        return f"{noted.observed} observed of {queries} queries"
    return ""


def _odd_window(query: Tensor, segment: FullSegment) -> str:
    """Why the window kernel cannot take this segment; empty if it can."""
    keys, lengths, (_, heads, queries, dim) = segment.keys, segment.lengths, query.shape
    if not segment.plain or segment.mask is not None or lengths is None or lengths.dtype != torch.int32:
        return "a window that a mask or the host tells of"
    if lengths.shape != keys.shape[:2] or not lengths.is_contiguous() or keys.stride(3) != 1:
        return f"window lengths {tuple(lengths.shape)} of keys {tuple(keys.shape)}, strides {keys.stride()}"
    if keys.dtype != query.dtype or query.dtype not in DTYPES or keys.shape[3] != dim or dim not in HEAD_DIMS:
        return f"a window of {keys.dtype} {tuple(keys.shape)} beside a query of {query.dtype}"
    if queries > MAX_QUERIES or heads // keys.shape[1] * queries > MAX_COLUMNS:
        return f"{queries} query tokens of {heads} heads (it takes 1 to {MAX_QUERIES}, and {MAX_COLUMNS} columns)"
    return ""


def _refusal(query: Tensor, segment: PackedSegment, softcap: float | None) -> str:
    """Why the kernel cannot take this segment; empty if it can."""
    keys, (_, heads, queries, dim) = segment.store.tier.keys, query.shape
    if reason := unsupported_format(keys.format, "key"):
        return reason
    if keys.head_dim != dim:
        return f"codes of {keys.head_dim} channels beside a query of {dim}"
    if queries > MAX_QUERIES or heads // segment.store.heads * queries > MAX_COLUMNS:
        return f"{queries} query tokens of {heads} heads (it takes 1 to {MAX_QUERIES}, and {MAX_COLUMNS} columns)"
    if segment.mask is not None and not segment.plain:
        return "a mask that hides stored tokens"
    if softcap and type(keys).query_bias is not Quantizer.query_bias:
        return "a soft cap over keys that are stored about a mean"
    return ""
