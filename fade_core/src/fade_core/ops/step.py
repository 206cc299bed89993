"""A decode step as two ops, eager and compiled alike: ``append`` takes tokens in, ``attend`` reads all that is there.

Custom ops take tensors and plain values. What else a step needs (quantizers, kernels, sinks and window, and which tensor is
which) is a ``StepPlan`` known by a name, and the name goes into the graph. Layers of the same meaning share a plan, so that
a graph compiled for one cache serves the next.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.attention_tracker import AttentionTracker
from fade_core.eviction.query_moments import QueryMoments
from fade_core.interfaces import Kernel, RopeScheme, Support, Tier
from fade_core.ops.append import LOGICAL, ODD_MASK, AppendRule, StepBuffers, TorchAppend
from fade_core.ops.attention import (
    AttentionOutput,
    FullSegment,
    PackedSegment,
    Segment,
    TorchAttentionMass,
    TorchDecodeAttention,
)
from fade_core.storage.repositioning import Shift
from fade_core.storage.tile_view import TileView

_REFERENCES: dict[str, Kernel] = {
    "append": TorchAppend(),
    "decode_attention": TorchDecodeAttention(),
    "attention_mass": TorchAttentionMass(),
}
_WITHOUT_SHIFTS = Support(False, "packed keys that are read at other positions (reposition = 'contiguous')")
_plans: weakref.WeakValueDictionary[str, StepPlan] = weakref.WeakValueDictionary()
_numbers = itertools.count()


# --- what a step reads and writes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierBuffers:
    """What a step sees of one tier.

    Attributes:
        tier: name and quantizers.
        fields: pool fields ``[N, ...]`` by side and name, such as "k.codes4".
        ids: int32 ``[B, H_kv, T]``.
        used: int32 ``[B, H_kv]``.
        reserved: int32 ``[B, H_kv]``.
        counts: int32 ``[B, H_kv, T]``, live tokens of each tile.
        starts: int32 ``[B, H_kv, T]``, or ``None`` if there are "positions" among the notes.
        notes: numbers a token, ``[B, H_kv, T, tile]``: "positions", "statistic.NAME", "shift".
        runs: whether ids are ``(b * H_kv + h) * T + n``.
        whole: whether every tile in use is full.
    """

    tier: Tier
    fields: dict[str, Tensor]
    ids: Tensor
    used: Tensor
    reserved: Tensor
    counts: Tensor
    starts: Tensor | None
    notes: dict[str, Tensor]
    runs: bool
    whole: bool

    def view(self, dtype: torch.dtype, look: bool) -> TileView:
        """The tiles as attention reads them: no more than are in use, where the host may ``look``."""
        counts, tiles, even = None if self.whole else self.counts, self.ids.shape[2], False
        if look:
            most, least = int(self.used.max()), int(self.used.min())
            tiles, even = most, most == least
        return TileView(self.tier, self.fields, self.ids, self.used, counts, self.runs, dtype, tiles, even)

    def positions(self, tiles: int) -> Tensor:
        """Positions of the tokens of the first ``tiles``, int64 ``[B, H_kv, tiles * tile]``."""
        if self.starts is None:
            return self.notes["positions"][:, :, :tiles].flatten(2).long()
        slots = torch.arange(self.tier.keys.tile, device=self.starts.device)
        return (self.starts[:, :, :tiles, None].long() + slots).flatten(2)


@dataclass(frozen=True)
class LayerBuffers:
    """What a step reads and writes of a layer; all of it is written in place.

    Attributes:
        keys: full-precision window ``[B, H_kv, capacity, D]``, left-aligned: sinks, then the newest tokens.
        values: likewise.
        positions: int32 ``[B, capacity]``.
        lengths: int32 ``[B, H_kv]``: tokens of the window.
        counters: int64 ``[3]`` (``fade_core.ops.append``).
        notes: numbers a token of the window, ``[B, H_kv, capacity]``: "statistic.NAME", "shift".
        tiers: the packed tiers, finest first.
        moments: weight, mean and scatter of the layer's queries, as far as they are kept.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    counters: Tensor
    notes: dict[str, Tensor]
    tiers: tuple[TierBuffers, ...]
    moments: dict[str, Tensor]

    def appended(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that ``append`` writes, and those that it reads."""
        written = [self.keys, self.values, self.positions, self.lengths, self.counters, *self.notes.values()]
        if not self.tiers:
            return written, []
        first = self.tiers[0]
        written += [*first.fields.values(), first.used, *first.notes.values()]
        return written + ([] if first.starts is None else [first.starts]), [first.ids, first.reserved]

    def attended(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that ``attend`` writes, and those that it reads."""
        held = (self.notes, *(tier.notes for tier in self.tiers))
        written = [note for notes in held for name, note in notes.items() if name.startswith("statistic.")]
        read = [self.keys, self.values, self.positions, self.lengths, *_others(self.notes)]
        for tier in self.tiers:
            read += [*tier.fields.values(), tier.ids, tier.used, tier.reserved, tier.counts, *_others(tier.notes)]
            read += [] if tier.starts is None else [tier.starts]
        return [self.counters, *written, *self.moments.values()], read


def _others(notes: dict[str, Tensor]) -> list[Tensor]:
    return [note for name, note in notes.items() if not name.startswith("statistic.")]


def step_buffers(held: LayerBuffers) -> StepBuffers:
    """What ``append`` sees of ``held``: the window and the first tier."""
    notes = list(held.notes.values())
    window = held.keys, held.values, held.positions, held.lengths, held.counters
    if not held.tiers:
        none = held.lengths.new_zeros((*held.lengths.shape, 0))
        return StepBuffers(*window, {}, {}, none, held.lengths, held.lengths, window_notes=notes)
    tier = held.tiers[0]
    keys, values = ({n[2:]: f for n, f in tier.fields.items() if n[0] == side} for side in "kv")
    packed = [tier.notes[name] for name in held.notes]
    places = tier.ids, tier.used, tier.reserved, tier.starts, tier.notes.get("positions")
    return StepBuffers(*window, keys, values, *places, notes, packed, tier.runs)


# --- plans --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class StepPlan:
    """What the steps of one layer have in common.

    Attributes:
        name: what graphs call it.
        rule: sinks, window, quantizers.
        tiers: name and quantizers of each tier.
        append: implementation of ``append``.
        attention: implementation of ``decode_attention``.
        mass: implementation of ``attention_mass``.
        tracker: what steps note of attention.
        rope: by which keys are moved when they are read; ``None`` if they stay.
        refused: op, implementation and reason of calls that the reference computed instead.
        layouts: which tensor is which in the lists that the ops take, by the name of the layout.
    """

    name: str
    rule: AppendRule
    tiers: tuple[Tier, ...]
    append: Kernel
    attention: Kernel
    mass: Kernel
    tracker: AttentionTracker
    rope: RopeScheme | None = None
    refused: set[tuple[str, str, str]] = field(default_factory=set)
    layouts: dict[str, LayerLayout] = field(default_factory=dict)

    def choose(self, kernel: Kernel, *args: object, shifted: bool = False, **options: object) -> Kernel:
        """``kernel`` if it accepts this very call, else the reference."""
        support = kernel.accepts(*args, **options) if kernel.shifts or not shifted else _WITHOUT_SHIFTS
        if support:
            return kernel
        self.refused.add((kernel.op, kernel.name, support.reason))
        return _REFERENCES[kernel.op]


@dataclass(frozen=True)
class LayerLayout:
    """Which tensor is which in the lists that the custom ops take.

    Attributes:
        notes: names of the window's notes.
        fields: names of the fields of each tier.
        tier_notes: names of the notes of each tier.
        starts: whether each tier has ``starts``.
        runs: ``TierBuffers.runs`` of each.
        whole: ``TierBuffers.whole`` of each.
        moments: names of the statistics of the queries.
    """

    notes: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...]
    tier_notes: tuple[tuple[str, ...], ...]
    starts: tuple[bool, ...]
    runs: tuple[bool, ...]
    whole: tuple[bool, ...]
    moments: tuple[str, ...]

    @classmethod
    def of(cls, held: LayerBuffers) -> LayerLayout:
        """The layout of ``held``."""
        tiers = held.tiers
        return cls(
            tuple(held.notes),
            tuple(tuple(tier.fields) for tier in tiers),
            tuple(tuple(tier.notes) for tier in tiers),
            tuple(tier.starts is not None for tier in tiers),
            tuple(tier.runs for tier in tiers),
            tuple(tier.whole for tier in tiers),
            tuple(held.moments),
        )


def plan_step(plan: StepPlan, meaning: str, fresh: bool = False) -> StepPlan:
    """``plan`` under its name, shared with every layer of the same ``meaning`` whose quantizers hold the same tensors.

    To be asked again when those tensors were replaced (codebooks, a loaded state).

    Args:
        plan: without a name.
        meaning: what the quantizers were made from, written out: their configuration and the model's layers and heads.
        fresh: give it a name that no other has: its quantizers learn, and belong to it alone.
    """
    rule, tracker = plan.rule, plan.tracker
    kernels = plan.append.name, plan.attention.name, plan.mass.name
    noted = tracker.statistics, tracker.query_statistics, tracker.decay, tracker.observation_window
    facts = (rule.layer, rule.n_sink, rule.threshold, rule.on_nonfinite, kernels, noted, meaning, type(plan.rope))
    contents = None if fresh else _contents(plan.tiers)
    plan.name = hashlib.sha256(repr((*facts, contents)).encode()).hexdigest()[:16]
    found = None if fresh else _plans.get(plan.name)
    if fresh or (found is not None and _contents(found.tiers) != contents):  # its own were replaced after it was named
        plan.name, found = f"{plan.name}:{next(_numbers)}", None
    if found is None:
        _plans[plan.name] = found = plan
    return found


def _contents(tiers: Sequence[Tier]) -> list[tuple[object, ...]]:
    """What the quantizers are, and a hash of each tensor that they keep."""
    return [
        (type(q).__name__, q.head_dim, q.tile, q.field_shapes(), {n: _digest(t) for n, t in q.state_dict().items()})
        for tier in tiers
        for q in (tier.keys, tier.values)
    ]


def _digest(tensor: Tensor) -> str:
    held = tensor.detach().cpu().contiguous()
    return hashlib.sha256(held.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16] + str(held.shape)


def step_name(plan: StepPlan, held: LayerBuffers) -> str:
    """What a graph calls a step of ``plan`` over buffers like ``held``."""
    found = LayerLayout.of(held)
    layout = hashlib.sha256(repr(found).encode()).hexdigest()[:8]
    plan.layouts.setdefault(layout, found)
    return f"{plan.name}/{layout}"


def _plan(name: str) -> tuple[StepPlan, LayerLayout]:
    base, _, layout = name.rpartition("/")
    found = _plans.get(base)
    if found is None or layout not in found.layouts:
        raise InputError("a compiled step was run for a cache that is gone; run it with the cache it is meant for")
    return found, found.layouts[layout]


# --- the two ops, as functions ------------------------------------------------------------------------------------------


def take_in(plan: StepPlan, keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule | None = None) -> None:
    """Take new tokens ``[B, H_kv, Q, D]`` into ``buffers``, by the chosen kernel; ``rule``: in place of the plan's."""
    rule = plan.rule if rule is None else rule
    plan.choose(plan.append, keys, values, buffers, rule)(keys, values, buffers, rule)


def read_all(
    plan: StepPlan,
    query: Tensor,
    held: LayerBuffers,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    shifts: Sequence[Shift | None] | None = None,
) -> Tensor:
    """Attention of the newest tokens over all that a layer holds; what each token is given goes into its statistics.

    Args:
        plan: the layer's.
        query: ``[B, H_q, Q, D]``; the queries' own tokens are the last of each row of the window.
        held: what the layer holds.
        mask: bool ``[B or 1, 1, Q, T]`` over positions, honoured token by token; ``None`` if it hides padding alone.
        sinks: attention-sink logits ``[H_q]``.
        scaling: factor of the logits.
        softcap: soft cap of the logits.
        shifts: how far the tokens of each part are moved, if not as noted.

    Returns:
        ``[B, H_q, Q, D_v]`` in the query's dtype.
    """
    host = query.device.type == "cpu"
    look = host and isinstance(plan.attention, TorchDecodeAttention)  # kernels take the buffers whole
    segments, notes = segments_of(plan, held, query.shape[2], mask, look, shifts)
    tracker, call = plan.tracker, (query, segments, scaling, softcap, sinks)
    tracked = tracker.active and any(notes)
    shifted = any(isinstance(segment, PackedSegment) and segment.shift is not None for segment in segments)
    kernel = plan.choose(plan.attention, *call, shifted=shifted, probabilities=tracked)
    result: AttentionOutput = kernel(*call, probabilities=tracked)
    if tracked:
        for number, (segment, statistics) in enumerate(zip(segments, notes, strict=True)):
            given = query, segment, result.lse, scaling, softcap
            moved = isinstance(segment, PackedSegment) and segment.shift is not None
            found = (
                result.probabilities[number]
                if result.probabilities
                else plan.choose(plan.mass, *given, shifted=moved)(*given)
            )
            tracker.age(statistics, query.shape[2])
            tracker.observe(statistics, found, segment.seen(query.shape[2]))
    if held.moments:
        QueryMoments.over(held.moments).observe(query * scaling, tracker.keeps(query.shape[2]))
    return result.output


def segments_of(
    plan: StepPlan,
    held: LayerBuffers,
    queries: int,
    mask: Tensor | None,
    look: bool,
    shifts: Sequence[Shift | None] | None = None,
) -> tuple[list[Segment], list[dict[str, Tensor]]]:
    """Packed tiers and window as attention reads them, and the statistics of each one's tokens, views.

    Args:
        plan: the layer's.
        held: what the layer holds.
        queries: tokens of this step.
        mask: bool ``[B or 1, 1, Q, T]`` over positions, or ``None`` if it hides padding alone.
        look: whether lengths may be read on the host, so that no more than is in use is read.
        shifts: as for ``read_all``.
    """
    longest, even = held.keys.shape[2], False
    if look:
        longest = min(int(held.lengths.max()), longest)  # a window that ran over is reported later
        even = held.lengths.shape[0] == 1 or int(held.lengths.min()) == longest
    segments: list[Segment] = []
    notes: list[dict[str, Tensor]] = []
    for tier in held.tiers:
        view = tier.view(held.keys.dtype, look)
        if not view.tiles:
            continue
        noted = {name: note[:, :, : view.tiles].flatten(2) for name, note in tier.notes.items()}
        seen = None if mask is None else gathered(mask, tier.positions(view.tiles), view.valid())
        shift = _noted_shift(plan, noted, look) if shifts is None else shifts[len(segments)]
        segments.append(PackedSegment(view, seen, mask is None, shift))
        notes.append(_statistics(noted))
    noted = {name: note[:, :, :longest] for name, note in held.notes.items()}
    keys, lengths = held.keys[:, :, :longest], None if even else held.lengths
    seen = None
    if mask is not None:
        live = None if even else (torch.arange(longest, device=keys.device) < held.lengths[:, :1, None])
        seen = gathered(mask, held.positions[:, None, :longest].long(), live)
    shift = _noted_shift(plan, noted, look) if shifts is None else shifts[len(segments)]
    if shift is not None:
        keys = shift.moved(keys)
    segments.append(FullSegment(keys, held.values[:, :, :longest], seen, mask is None, lengths))
    notes.append(_statistics(noted))
    return segments, notes


def _statistics(noted: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[10:]: note for name, note in noted.items() if name.startswith("statistic.")}


def _noted_shift(plan: StepPlan, noted: dict[str, Tensor], look: bool) -> Shift | None:
    """How far the tokens of one part are moved; ``None`` if none is, as far as the host may ``look``."""
    if plan.rope is None or "shift" not in noted:
        return None
    by = noted["shift"]
    if look:
        moving = by.amax((0, 1)).nonzero()
        if not len(moving):
            return None
        by = by[:, :, : int(moving[-1]) + 1]
    return Shift(plan.rope, by)


def gathered(mask: Tensor, positions: Tensor, live: Tensor | None) -> Tensor:
    """``mask`` ``[B or 1, 1, Q, T]`` at ``positions`` ``[B, H_kv or 1, N]``: bool ``[B, H_kv or 1, Q, N]``."""
    index = positions.clamp(0, mask.shape[3] - 1)[:, :, None].expand(-1, -1, mask.shape[2], -1)
    seen = mask.expand(*positions.shape[:2], -1, -1).gather(3, index)
    return seen if live is None else seen & live[:, :, None]


# --- and as custom ops --------------------------------------------------------------------------------------------------


@torch.library.custom_op("fade::append", mutates_args=("written",))
def append(keys: Tensor, values: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], plan: str) -> None:
    """``take_in`` in a graph.

    Args:
        keys: ``[B, H_kv, Q, D]``.
        values: likewise.
        written: ``LayerBuffers.appended``'s first list.
        read: its second.
        plan: ``step_name``.
    """
    ours, layout = _plan(plan)
    queue, other = iter(written), iter(read)
    window = _five(queue)
    notes = [next(queue) for _ in layout.notes]
    if not layout.fields:
        none = window[3].new_zeros((*window[3].shape, 0))
        take_in(ours, keys, values, StepBuffers(*window, {}, {}, none, window[3], window[3], window_notes=notes))
        return
    fields = {name: next(queue) for name in layout.fields[0]}
    used = next(queue)
    packed = {name: next(queue) for name in layout.tier_notes[0]}
    starts = next(queue) if layout.starts[0] else None
    ids, reserved = next(other), next(other)
    keyed, valued = ({n[2:]: f for n, f in fields.items() if n[0] == side} for side in "kv")
    moved = [packed[name] for name in layout.notes]
    places = ids, used, reserved, starts, packed.get("positions")
    take_in(ours, keys, values, StepBuffers(*window, keyed, valued, *places, notes, moved, layout.runs[0]))


def _five(queue: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The next five tensors."""
    return next(queue), next(queue), next(queue), next(queue), next(queue)


@append.register_fake
def _append_fake(*_: object) -> None:
    return


@torch.library.custom_op("fade::attend", mutates_args=("written",))
def attend(
    query: Tensor,
    written: Sequence[Tensor],
    read: Sequence[Tensor],
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    plan: str,
    first: Tensor | None = None,
) -> Tensor:
    """``read_all`` in a graph.

    Args:
        query: ``[B, H_q, Q, D]``.
        written: ``LayerBuffers.attended``'s first list.
        read: its second.
        mask: bool ``[B or 1, 1, Q, T]`` over positions; ``None`` if it hides padding alone.
        sinks: attention-sink logits ``[H_q]``.
        scaling: factor of the logits.
        softcap: soft cap of the logits.
        plan: ``step_name``.
        first: position of each row's first token, int64 ``[B]``, where the mask is taken to hide no more than what lies
            before: nobody looks at it, but a mask that hides stored tokens is counted.

    Returns:
        ``[B, H_q, Q, D_v]`` in the query's dtype.
    """
    ours, layout = _plan(plan)
    held = _attended(ours, layout, iter(written), iter(read))
    if mask is not None and first is not None:
        where = torch.arange(mask.shape[3], device=mask.device)
        stored = (where >= first[:, None]) & (where < held.counters[LOGICAL])
        held.counters[ODD_MASK] += (stored & ~mask[:, 0, 0]).any()
        mask = None
    if mask is not None and query.device.type == "cpu" and _hides_padding_alone(mask, held):
        mask = None
    return read_all(ours, query, held, mask, sinks, scaling, softcap).contiguous()


@attend.register_fake
def _attend_fake(query: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], *_: object, **__: object) -> Tensor:
    return query.new_empty((*query.shape[:3], read[1].shape[3]))


def _attended(plan: StepPlan, layout: LayerLayout, written: Iterator[Tensor], read: Iterator[Tensor]) -> LayerBuffers:
    """Undo ``LayerBuffers.attended``."""
    window = (next(read), next(read), next(read), next(read), next(written))

    def noted(names: Sequence[str]) -> dict[str, Tensor]:
        statistics = {name: next(written) for name in names if name.startswith("statistic.")}
        others = {name: next(read) for name in names if not name.startswith("statistic.")}
        return statistics | others

    notes, tiers = noted(layout.notes), []
    for number, tier in enumerate(plan.tiers):
        fields = {name: next(read) for name in layout.fields[number]}
        ids, used, reserved, counts = (next(read) for _ in range(4))
        own = noted(layout.tier_notes[number])
        starts = next(read) if layout.starts[number] else None
        flags = layout.runs[number], layout.whole[number]
        tiers.append(TierBuffers(tier, fields, ids, used, reserved, counts, starts, own, *flags))
    moments = {name: next(written) for name in layout.moments}
    return LayerBuffers(*window, notes, tuple(tiers), moments)


def _hides_padding_alone(mask: Tensor, held: LayerBuffers) -> bool:
    """Whether every stored token is seen. Reads the mask: for a CPU."""
    longest = min(int(held.lengths.max()), held.keys.shape[2])  # a window that ran over is reported later
    live = torch.arange(longest) < held.lengths[:, :1, None]
    parts = [(gathered(mask, held.positions[:, None, :longest].long(), None), live)]
    for tier in held.tiers:
        view = tier.view(held.keys.dtype, True)
        if view.tiles:
            valid = view.valid()
            parts.append(
                (gathered(mask, tier.positions(view.tiles), None), valid if valid is not None else live.new_ones(()))
            )
    return all(bool((seen | ~there[..., None, :] if there.dim() else seen).all()) for seen, there in parts)
