"""FADE's ``decode_attention`` op on a CPU, by native code."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int32
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from fade_core import AttentionOutput, FullSegment, PackedSegment
from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import PackedFormat, planes_of
from fade_kernels_cpu import build
from fade_kernels_cpu.layouts import Call, Full, Runs, Segment, Side

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of queries and windows; the numbers are those of ``FadeFull``."""

CHANNELS = 8
"""A head has a multiple of these."""

COLUMNS = 4
"""More than one query of a KV head are padded to a multiple of these."""


class CpuDecodeAttention(Kernel):
    """``decode_attention`` over packed tiers and windows, each token unpacked once, in the core's own cache.

    Any ``PackedFormat`` and any ``RunLayout``, whatever quantizers do around them; any mask. Computed in float32, in as many
    threads as torch has; the bits do not depend on their number.
    """

    name: ClassVar[str] = "cpu"
    op: ClassVar[Op] = "decode_attention"
    priority: ClassVar[int] = 10

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        reason = _unsupported(head_dim, device, dtype) or _unbuilt()
        return Support(not reason, reason)

    def accepts(
        self,
        query: Tensor,
        segments: Sequence[FullSegment | PackedSegment],
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        probabilities: bool = False,
    ) -> Support:
        reason = _unsupported(query.shape[-1], query.device, query.dtype) or _refusal(segments)
        return Support(not reason, reason)

    def __call__(
        self,
        query: Tensor,
        segments: Sequence[FullSegment | PackedSegment],
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        probabilities: bool = False,
    ) -> AttentionOutput:
        """As the reference, ``fade_core.ops.reference.decode_attention``.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if refused := self.accepts(query, segments, scaling, softcap).reason:
            raise InputError(f"the CPU decode kernel does not take this call: {refused}")
        native = build.library()
        rows, query_heads, queries, dim = query.shape
        heads = _kv_heads(segments[0])
        problem = Problem((query.float() * scaling).reshape(rows, heads, -1, dim), queries, probabilities)
        parts = (Segment * len(segments))(*map(problem.segment, segments))
        lse = torch.empty(rows, query_heads, queries)
        logits = None if sinks is None else sinks.float().contiguous()
        call = Call(
            segment=parts,
            sinks=None if logits is None else logits.data_ptr(),
            lse=lse.data_ptr(),
            rows=rows,
            heads=heads,
            segments=len(segments),
            count=problem.count,
            padded=problem.padded,
            queries=queries,
            softcap=softcap or 0.0,
            threads=torch.get_num_threads(),
        )
        native.fade_decode_attention(byref(call))
        output = problem.output().view(rows, query_heads, queries, -1).to(query.dtype)
        return AttentionOutput(output, lse, problem.probabilities if probabilities else None)


class Problem:
    """What native code is told of a call, and the tensors that it points to.

    Args:
        query: float32 ``[B, H_kv, N, D]``, scaled.
        queries: query tokens ``Q``.
        probabilities: whether they are wanted.
    """

    def __init__(self, query: Tensor, queries: int, probabilities: bool) -> None:
        self.query, self.queries, self.wanted = query, queries, probabilities
        self.count = query.shape[2]
        self.padded = 1 if self.count == 1 else -(-self.count // COLUMNS) * COLUMNS
        self.kept: list[Tensor] = []
        self.at_query = self._columns(query)
        self.sums: dict[int, Tensor] = {}  # by value channels: what segments give that are in the model's space
        self.moved: list[tuple[Quantizer, Tensor, Tensor]] = []
        self.probabilities: list[Tensor] = []

    def segment(self, given: FullSegment | PackedSegment) -> Segment:
        """``given`` as native code reads it."""
        made = self._full(given) if isinstance(given, FullSegment) else self._packed(given)
        lead = self.query.shape[:2]
        if given.mask is not None:
            mask = given.mask.expand(*lead, self.queries, made.slots).view(torch.uint8)  # a bool is a byte
            made.mask = self._keep(mask)
            made.mask_row, made.mask_head, made.mask_query, made.mask_slot = mask.stride()
        elif given.plain and isinstance(given, FullSegment):
            made.causal = 1
        if self.wanted:
            self.probabilities.append(torch.empty(*lead, self.queries, made.slots))
            made.probabilities = self.probabilities[-1].data_ptr()
        return made

    def _full(self, given: FullSegment) -> Segment:
        tokens = given.keys.shape[2]
        made = Segment(slots=tokens, key_dim=given.keys.shape[3], value_dim=given.values.shape[3])
        made.full_keys, made.full_values = self._tokens(given.keys), self._tokens(given.values)
        if given.lengths is not None and given.mask is None:
            lengths = given.lengths.to(torch.int32).reshape(len(given.lengths), -1)  # [B, 1 or H_kv]
            made.lengths = self._keep(lengths.expand(self.query.shape[:2]).contiguous())
        made.query, made.output = self.at_query, self._sum(made.value_dim)
        return made

    def _packed(self, given: PackedSegment) -> Segment:
        store = given.store
        keys, values = store.tier.keys, store.tier.values
        made = Segment(packed=1, slots=store.tiles * store.tile, table_width=store.ids.shape[2])
        made.keys, made.key_runs = self._side(keys, store.pool_fields("k"))
        made.values, made.value_runs = self._side(values, store.pool_fields("v"))
        made.key_dim, made.value_dim = made.keys.dim, made.values.dim
        made.table, made.used = self._keep(store.ids), self._keep(store.used)
        if store.counts is not None:
            made.counts = self._keep(store.counts)
        made.query = self.at_query
        if keys.own_space:
            made.query = self._columns(keys.transform_query(self.query), made.key_dim)
            bias = keys.query_bias(self.query)
            made.bias = None if bias is None else self._keep(bias.contiguous())  # [B, H_kv, N, 1]
        if values.own_space:
            found, mass = (self.query.new_zeros(*self.query.shape[:3], dim) for dim in (made.value_dim, 1))
            made.output, made.mass = self._keep(found), self._keep(mass)
            self.moved.append((values, found, mass))
        else:
            made.output = self._sum(made.value_dim)
        return made

    def output(self) -> Tensor:
        """What all segments give, ``[B, H_kv, N, D_v]``."""
        parts = [*self.sums.values()]
        for values, found, mass in self.moved:
            runs = values.runs()
            parts.append(values.transform_output(found if runs is None else found[..., : runs.widths.shape[1]], mass))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def _columns(self, query: Tensor, dim: int = 0) -> int:
        """Where ``query`` ``[B, H_kv, N, D]`` lies, padded with zeros to ``padded`` columns, and ``dim`` channels."""
        missing = 0, max(0, dim - query.shape[3]), 0, self.padded - self.count
        return self._keep(torch.nn.functional.pad(query, missing) if any(missing) else query.contiguous())

    def _sum(self, dim: int) -> int:
        """Where segments of ``dim`` value channels add what they give."""
        if dim not in self.sums:
            self.sums[dim] = self.query.new_zeros(*self.query.shape[:3], dim)
        return self.sums[dim].data_ptr()

    def _side(self, quantizer: Quantizer, pool: dict[str, Tensor]) -> tuple[Side, Runs]:
        """Codes of keys or values of a tier; one of the two says where."""
        runs = quantizer.runs()
        if quantizer.format is not None:
            return self._plain(quantizer.format, pool), Runs()
        if runs is None:
            raise InputError(f"quantizer {quantizer.kind!r} has no packed format and no runs")
        kept = runs.widths.shape[1]
        side = Side(tile=runs.tile, dim=-(-kept // CHANNELS) * CHANNELS, by_token=runs.layout == "token")
        places = (pool["codes"], pool["gain"], runs.blocks, runs.widths, runs.levels, runs.gains)
        return side, Runs(*map(self._keep, places), runs.blocks.shape[1], runs.row, kept)

    def _plain(self, fmt: PackedFormat, pool: dict[str, Tensor]) -> Side:
        widths = planes_of(fmt.bits)
        made = Side(planes=len(widths), tile=fmt.tile, dim=fmt.head_dim, group=fmt.group)
        made.by_token, made.per_channel = fmt.layout == "token", fmt.axis == "channel"
        made.widths = (c_int32 * 2)(*widths)
        for number, width in enumerate(widths):
            made.codes[number] = self._keep(pool[f"codes{width}"])
        made.meta = self._keep(pool["meta"])
        if fmt.levels is not None:
            made.levels = self._keep(torch.tensor(fmt.levels))
        return made

    def _tokens(self, held: Tensor) -> Full:
        return Full(self._keep(held), *held.stride()[:3], DTYPES[held.dtype])

    def _keep(self, tensor: Tensor) -> int:
        """Where ``tensor`` lies; it stays alive as long as this does."""
        self.kept.append(tensor)
        return tensor.data_ptr()


def _kv_heads(segment: FullSegment | PackedSegment) -> int:
    return segment.keys.shape[1] if isinstance(segment, FullSegment) else segment.store.heads


def _unsupported(head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"tokens on {device} (it runs on a CPU)"
    if dtype not in DTYPES:
        return f"{dtype} (it takes {', '.join(map(str, DTYPES))})"
    if head_dim % CHANNELS:
        return f"head_dim {head_dim} (it takes multiples of {CHANNELS})"
    return ""


@cache
def _unbuilt() -> str:
    """Why there is no native code; empty if there is. Found out once: a compiler that fails takes its time."""
    try:
        build.library()
    except build.BuildError as error:
        return str(error)
    return ""


def _refusal(segments: Sequence[FullSegment | PackedSegment]) -> str:
    """Why these segments cannot be read; empty if they can."""
    if not segments:
        return "nothing to attend to"
    for segment in segments:
        if isinstance(segment, FullSegment):
            keys, values = segment.keys, segment.values
            if keys.dtype not in DTYPES or values.dtype != keys.dtype:
                return f"a window of {keys.dtype} and {values.dtype} (it takes {', '.join(map(str, DTYPES))})"
            if keys.stride(3) != 1 or values.stride(3) != 1:
                return "a window whose channels do not lie side by side"
            if keys.shape[3] % CHANNELS or values.shape[3] % CHANNELS:
                return f"a window of {keys.shape[3]} and {values.shape[3]} channels (it takes multiples of {CHANNELS})"
            continue
        tier = segment.store.tier
        for side, quantizer in (("key", tier.keys), ("value", tier.values)):
            if quantizer.format is None and quantizer.runs() is None:
                return f"tier {tier.name!r}: the {side} quantizer {quantizer.kind!r} has no packed format and no runs"
            if quantizer.format is not None and quantizer.format.head_dim % CHANNELS:
                return f"tier {tier.name!r}: {side}s of {quantizer.format.head_dim} channels"
        if tier.keys.tile != tier.values.tile:
            return f"tier {tier.name!r}: keys in tiles of {tier.keys.tile} beside values in tiles of {tier.values.tile}"
        if not segment.store.ids.is_contiguous() or not segment.store.used.is_contiguous():
            return f"tier {tier.name!r}: a table that does not lie in one piece"
    return ""
