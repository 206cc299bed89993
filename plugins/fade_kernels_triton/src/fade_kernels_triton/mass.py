"""FADE's ``attention_mass`` op, run by a Triton kernel: what the tracker needs of a decode step, without the values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_core import FullSegment, PackedSegment, attention_mass
from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import PackedFormat
from fade_kernels_triton.device import interpreted, unusable
from fade_kernels_triton.operands import HEAD_DIMS, MAX_COLUMNS, MAX_QUERIES, planes, unsupported_format


class TritonAttentionMass(Kernel):
    """``attention_mass`` of packed keys that ``decode_attention`` reads; a window's few tokens go through torch."""

    name: ClassVar[str] = "triton"
    op: ClassVar[Op] = "attention_mass"
    priority: ClassVar[int] = -10 if interpreted() else 10

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
    ) -> Support:
        reason = "" if isinstance(segment, FullSegment) else _refusal(query, segment, softcap)
        return Support(not reason, reason)

    def __call__(
        self,
        query: Tensor,
        segment: FullSegment | PackedSegment,
        lse: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """As the oracle, ``fade_core.ops.reference.attention_mass``: float32 ``[B, H_kv, Q, T]``.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if isinstance(segment, FullSegment):
            return attention_mass(query, segment, lse, scaling, softcap)
        if refused := _refusal(query, segment, softcap):
            raise InputError(f"the Triton mass kernel does not take this call: {refused}")
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
        group = heads // store.heads
        mass = torch.empty(rows, store.heads, queries, store.tiles * fmt.tile, dtype=torch.float32, device=query.device)
        mass_kernel[(store.tiles, rows * store.heads)](
            query,
            lse,
            *planes(fields, fmt),
            fields["meta"],
            store.table,
            store.used,
            store.counts,
            mass,
            float(scaling),
            float(softcap or 1.0),
            store.heads,
            store.ids.shape[2],
            store.tiles,
            *query.stride()[:3],
            HEADS=group,
            Q_LEN=queries,
            BITS=fmt.bits,
            KEY_CHANNEL=fmt.axis == "channel",
            TILE=fmt.tile,
            D=dim,
            DP=max(64, 1 << (dim - 1).bit_length()),
            N=max(8, 1 << (group * queries - 1).bit_length()),
            SOFTCAP=bool(softcap),
            num_warps=4,
        )
        return mass


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
