"""FADE's ``decode_attention`` op, run by the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from fade_core import AttentionOutput, FullSegment, PackedSegment
from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, PlaneLayout, Quantizer, Support
from fade_core.packed import PackedFormat
from fade_kernels_triton.decode import decode_attention
from fade_kernels_triton.device import DTYPES, interpreted, unusable
from fade_kernels_triton.operands import (
    HEAD_DIMS,
    MAX_COLUMNS,
    MAX_QUERIES,
    MAX_TIERS,
    PackedTier,
    Window,
    unsupported_format,
    unsupported_pair,
)
from fade_kernels_triton.planes import PlanesTier, planes_attention, unsupported_planes

Segment = FullSegment | PackedSegment


class TritonDecodeAttention(Kernel):
    """``decode_attention`` over packed tiers and window, read in place.

    Tiers whose quantizers rotate, and those whose channels have widths of their own, are launched one by one, with a query
    of their own, and merged by log-sum-exp; all others and the window share a launch. Probabilities are not given: the core
    asks ``attention_mass`` for them.
    """

    name: ClassVar[str] = "triton"
    op: ClassVar[Op] = "decode_attention"
    reads_counts: ClassVar[bool] = True
    priority: ClassVar[int] = -10 if interpreted() else 10  # interpreted it checks, and serves nobody unasked

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        reason = unusable(device) or _unsupported(head_dim, dtype)
        if format is not None:  # without one there may be planes: `accepts` will see
            reason = reason or unsupported_format(format, "key")
        return Support(not reason, reason)

    def accepts(
        self,
        query: Tensor,
        segments: Sequence[Segment],
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        probabilities: bool = False,
    ) -> Support:
        reason = _unsupported(query.shape[-1], query.dtype) or _refusal(query, segments, softcap)
        return Support(not reason, reason)

    def __call__(
        self,
        query: Tensor,
        segments: Sequence[Segment],
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        probabilities: bool = False,
    ) -> AttentionOutput:
        """As the oracle, ``fade_core.ops.reference.decode_attention``, without probabilities.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if refused := self.accepts(query, segments, scaling, softcap).reason:
            raise InputError(f"the Triton decode kernel does not take this call: {refused}")
        query = query if query.stride(3) == 1 else query.contiguous()
        packed = [s for s in segments if isinstance(s, PackedSegment)]
        moved = [s for s in packed if _has_planes(s) or s.store.tier.keys.own_space or s.store.tier.values.own_space]
        tiers = [_tier(s) for s in packed if s not in moved]
        window = next((_window(s, query) for s in segments if isinstance(s, FullSegment)), None)
        softcap = softcap or None
        wide = torch.float32 if moved else None
        parts = []
        if tiers or window is not None:
            options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "output_dtype": wide}
            parts.append(decode_attention(query, tiers, window, s_aux=sinks, **options))
            sinks = None
        for segment in (s for s in moved if not _has_planes(s)):
            parts.append(_attend_moved(query, segment, scaling, softcap, sinks))
            sinks = None
        found = merged(parts) if len(parts) > 1 else parts[0] if parts else None
        planes = [s for s in moved if _has_planes(s)]
        for number, segment in enumerate(planes, 1):
            dtype = query.dtype if number == len(planes) else torch.float32
            found = planes_attention(query, _planes_tier(segment), scaling, found, sinks, dtype)
            sinks = None
        if found is None:  # `accepts` refuses a call without segments
            raise InputError("decode_attention was given nothing to attend to: no packed tier and no window")
        return AttentionOutput(found[0].to(query.dtype), found[1])


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge normalised outputs ``[B, H_q, Q, D]`` by their log-sum-exps ``[B, H_q, Q]``; -inf is an empty part."""
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    shares = torch.exp(lses - lse.clamp_min(torch.finfo(lse.dtype).min))
    output = sum(out * share[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return torch.as_tensor(output), lse


def _attend_moved(
    query: Tensor, segment: PackedSegment, scaling: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one tier whose codes live in a space of their own, in the model's space."""
    keys, values = segment.store.tier.keys, segment.store.tier.values
    rows, heads, queries, _ = query.shape
    grouped = (query.float() * scaling).reshape(rows, segment.store.heads, -1, query.shape[-1])
    turned = keys.transform_query(grouped).reshape(rows, heads, queries, -1).contiguous()
    bias = keys.query_bias(grouped)
    output, lse = decode_attention(turned, [_tier(segment)], scaling=1.0, softcap=softcap)
    if bias is not None:
        lse = lse + bias.reshape(lse.shape)
    back = output.reshape(rows, segment.store.heads, -1, output.shape[-1])
    mass = (lse > -torch.inf).to(back.dtype).reshape(back[..., :1].shape)
    output = values.transform_output(back, mass).reshape(rows, heads, queries, -1)
    return (output, lse) if sinks is None else _with_sinks(output, lse, sinks)


def _with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let the sink logits ``[H_q]`` take their share of the mass."""
    whole = torch.logaddexp(lse, sinks.float().view(1, -1, 1))
    return output * torch.exp(lse - whole)[..., None], whole


def _has_planes(segment: PackedSegment) -> bool:
    """Whether the tier is read by the planes of its quantizers: they have no packed format."""
    return segment.store.tier.keys.format is None


def _planes_tier(segment: PackedSegment) -> PlanesTier:
    store = segment.store
    keys, values = store.tier.keys.planes(), store.tier.values.planes()
    if keys is None or values is None:
        raise InputError(f"tier {store.tier.name!r} has no planes")
    return PlanesTier(
        keys, values, store.kernel_fields("k"), store.kernel_fields("v"), store.used, store.table, store.counts
    )


def _tier(segment: PackedSegment) -> PackedTier:
    store = segment.store
    key_fields, value_fields = store.kernel_fields("k"), store.kernel_fields("v")
    keys, values = store.tier.keys.format, store.tier.values.format
    if keys is None or values is None:
        raise InputError(f"tier {store.tier.name!r} has no packed format")
    return PackedTier(
        keys,
        values,
        {name: key_fields[name] for name in keys.field_shapes()},
        {name: value_fields[name] for name in values.field_shapes()},
        store.used,
        store.table,
        store.counts,
    )


def _window(segment: FullSegment, query: Tensor) -> Window:
    rows, tokens = query.shape[0], segment.keys.shape[2]
    if (
        segment.lengths is not None and segment.lengths.dtype == torch.int32
    ):  # on the device already: nothing is read back
        return Window(segment.keys, segment.values, segment.lengths)
    lengths = (tokens,) if segment.lengths is None else tuple(segment.lengths.tolist())
    return Window(segment.keys, segment.values, _on_device(lengths, query.device).expand(rows))


@lru_cache(maxsize=64)
def _on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Window lengths as int32; all layers of a step share them."""
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def _unsupported(head_dim: int, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        return f"{dtype} (it takes {', '.join(map(str, DTYPES))})"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} (it takes {', '.join(map(str, HEAD_DIMS))})"
    return ""


def _refusal(query: Tensor, segments: Sequence[Segment], softcap: float | None) -> str:
    """Why the kernel cannot take these segments; empty if it can."""
    packed = [s for s in segments if isinstance(s, PackedSegment)]
    full = [s for s in segments if isinstance(s, FullSegment)]
    queries = query.shape[2]
    if not segments or len(packed) > MAX_TIERS or len(full) > 1:
        return f"{len(packed)} packed tiers and {len(full)} windows (it takes up to {MAX_TIERS} tiers and one window)"
    if queries > MAX_QUERIES:
        return f"{queries} query tokens (it takes 1 to {MAX_QUERIES})"
    heads = full[0].keys.shape[1] if full else packed[0].store.heads
    if query.shape[1] // heads * queries > MAX_COLUMNS:
        return f"{query.shape[1] // heads * queries} query columns a KV head (it takes up to {MAX_COLUMNS})"
    if any(s.mask is not None and not s.plain for s in segments):
        return "a mask that hides stored tokens"
    if any(queries > 1 and not s.plain for s in full):
        return "several queries that see all of the window (it reads windows causally)"
    for window in full:
        if window.keys.shape != window.values.shape or window.keys.shape[-1] != query.shape[-1]:
            return f"keys and values of {window.keys.shape[-1]} and {window.values.shape[-1]} channels"
        if window.keys.dtype != query.dtype or window.values.dtype != query.dtype:
            return f"a window of {window.keys.dtype} beside a query of {query.dtype}"
    for tier in (s.store.tier for s in packed):
        if reason := _unreadable(tier.keys, tier.values, query.shape[-1]):
            return f"tier {tier.name!r}: {reason}"
        if softcap and type(tier.keys).query_bias is not Quantizer.query_bias:
            return f"tier {tier.name!r}: a soft cap over keys that are stored about a mean"
    return ""


def _unreadable(keys: Quantizer, values: Quantizer, head_dim: int) -> str:
    """Why a tier of these quantizers cannot be read; empty if it can."""
    if keys.format is not None or values.format is not None:
        return unsupported_pair(keys.format, values.format, head_dim)
    layouts: list[PlaneLayout] = []
    for side, quantizer in (("key", keys), ("value", values)):
        planes = quantizer.planes()
        if planes is None:
            return (
                f"the {side} quantizer {quantizer.kind!r} has no packed format and no planes of 2 bits (calibrated codes have "
                f"planes with widths = [0, 2, 4, 6, 8] and levels = 'uniform')"
            )
        if reason := unsupported_planes(planes, side):
            return reason
        layouts.append(planes)
    if layouts[0].tile != layouts[1].tile:
        return f"keys in tiles of {layouts[0].tile} tokens beside values in tiles of {layouts[1].tile}"
    return ""
