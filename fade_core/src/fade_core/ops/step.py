"""A decode step as two ops, eager and compiled alike: ``append`` takes tokens in, ``attend`` reads all that is there.

Custom ops take tensors and plain values. What else a step needs (quantizers, kernels, sinks and window, and which tensor is
which) is a ``StepPlan`` known by a name, and the name goes into the graph. Compatible layers share a plan, so that a graph
compiled for one cache serves the next.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.attention_tracker import AttentionTracker
from fade_core.eviction.query_moments import QueryMoments
from fade_core.interfaces import Kernel, RopeScheme, Support, Tier
from fade_core.ops.buffers import LOGICAL, ODD_MASK, AppendRule, LayerBuffers, operands
from fade_core.ops.reference import REFERENCES, AttentionOutput, FullSegment, PackedSegment, Segment
from fade_core.storage.repositioning import Shift
from fade_core.storage.slots import under

_WITHOUT_SHIFTS = Support(False, "packed keys that are read at other positions (reposition = 'contiguous')")
_plans: weakref.WeakValueDictionary[str, StepPlan] = weakref.WeakValueDictionary()
_numbers = itertools.count()


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
        layouts: names and flags of the ``LayerBuffers`` that graphs were made for, by name.
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
    layouts: dict[str, tuple[tuple[str, ...], Sequence[tuple[bool, bool]]]] = field(default_factory=dict)

    def choose(self, kernel: Kernel, *args: object, shifted: bool = False, **options: object) -> Kernel:
        """``kernel`` if it accepts this very call, else the reference."""
        if type(kernel) is type(REFERENCES[kernel.op]):
            return kernel
        support = kernel.accepts(*args, **options) if kernel.shifts or not shifted else _WITHOUT_SHIFTS
        if support:
            return kernel
        self.refused.add((kernel.op, kernel.name, support.reason))
        return REFERENCES[kernel.op]


def plan_step(plan: StepPlan, compatibility_key: str, fresh: bool = False) -> StepPlan:
    """``plan`` under its name, or the plan of a compatible layer whose quantizers hold the same tensors.

    To be asked again when those tensors were replaced (codebooks, a loaded state).

    Args:
        plan: without a name.
        compatibility_key: what the quantizers were made from: their configuration and the model's layers and heads.
        fresh: give it a name that no other has: its quantizers learn, and belong to it alone.
    """
    rule, tracker, contents = replace(plan.rule, tier=None), plan.tracker, "" if fresh else _contents(plan.tiers)
    kernels = plan.append.name, plan.attention.name, plan.mass.name
    noted = tracker.statistics, tracker.query_statistics, tracker.decay, tracker.observation_window
    facts = rule, kernels, noted, compatibility_key, type(plan.rope), contents
    plan.name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    shared = _plans.get(plan.name)
    if shared is not None and _contents(shared.tiers) == contents:
        return shared
    if fresh or shared is not None:  # or its tensors were replaced after it was named
        plan.name += f":{next(_numbers)}"
    _plans[plan.name] = plan
    return plan


def _contents(tiers: Sequence[Tier]) -> str:
    """A hash of what the quantizers are, and of each tensor that they keep."""
    digest = hashlib.sha256()
    for quantizer in (q for tier in tiers for q in (tier.keys, tier.values)):
        made = type(quantizer).__name__, quantizer.head_dim, quantizer.tile, quantizer.field_shapes()
        digest.update(repr(made).encode())
        for name, tensor in quantizer.state_dict().items():
            digest.update(repr((name, tensor.shape, tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def step_name(plan: StepPlan, held: LayerBuffers) -> str:
    """What a graph calls a step of ``plan`` over buffers like ``held``."""
    layout = tuple(held.tensors), held.flags
    name = hashlib.sha256(repr(layout).encode()).hexdigest()[:8]
    plan.layouts.setdefault(name, layout)
    return f"{plan.name}/{name}"


# --- the two ops, as functions ------------------------------------------------------------------------------------------


def take_in(plan: StepPlan, keys: Tensor, values: Tensor, held: LayerBuffers, rule: AppendRule | None = None) -> None:
    """Take new tokens ``[B, H_kv, Q, D]`` into ``held``, by the chosen kernel; ``rule``: in place of the plan's."""
    call = keys, values, held.step, plan.rule if rule is None else rule
    plan.choose(plan.append, *call)(*call)


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
    on_host = query.device.type == "cpu" and not plan.attention.reads_counts
    segments, statistics = segments_of(plan, held, mask, on_host, shifts)
    tracker, call = plan.tracker, (query, segments, scaling, softcap, sinks)
    tracked = tracker.active and any(statistics)
    shifted = any(segment.shift is not None for segment in segments)
    kernel = plan.choose(plan.attention, *call, shifted=shifted, probabilities=tracked)
    result: AttentionOutput = kernel(*call, probabilities=tracked)
    for number, (segment, noted) in enumerate(zip(segments, statistics, strict=True) if tracked else ()):
        if result.probabilities:
            probabilities = result.probabilities[number]
        else:
            given, shifted = (query, segment, result.lse, scaling, softcap), segment.shift is not None
            observation = tracker.observation(noted, query.shape[2])
            if plan.mass.observes and not shifted and plan.mass.accepts(*given, noted=observation):
                plan.mass(*given, noted=observation)
                continue
            probabilities = plan.choose(plan.mass, *given, shifted=shifted)(*given)
        tracker.age(noted, query.shape[2])
        tracker.observe(noted, probabilities, segment.seen(query.shape[2]))
    if held.moments:
        QueryMoments.over(held.moments).observe(query * scaling, tracker.keeps(query.shape[2]))
    return result.output


def segments_of(
    plan: StepPlan, held: LayerBuffers, mask: Tensor | None, on_host: bool, shifts: Sequence[Shift | None] | None = None
) -> tuple[list[Segment], list[dict[str, Tensor]]]:
    """Packed tiers and window as attention reads them, and the statistics of each one's tokens, views.

    Arguments are those of ``read_all``; ``on_host``: lengths may be read on the host, so that no more than is in use is read.
    """
    segments: list[Segment] = []
    statistics: list[dict[str, Tensor]] = []

    def shift_of(notes: Mapping[str, Tensor]) -> Shift | None:
        """``None`` if no token of the part is moved, as far as the host may read it."""
        if shifts is not None:
            return shifts[len(segments)]
        if plan.rope is None:
            return None
        moving = notes["shift"].amax((0, 1)).nonzero() if on_host else None  # [n, 1]
        if moving is None:
            return Shift(plan.rope, notes["shift"])
        return Shift(plan.rope, notes["shift"][:, :, : int(moving[-1]) + 1]) if len(moving) else None

    for every in held.tiers:
        view = every.in_use() if on_host else every
        if not view.tiles:
            continue
        notes = {n: view.slots[n][:, :, : view.tiles].flatten(2) for n in held.notes}  # [B, H_kv, tiles * tile]
        seen = None if mask is None else gathered(mask, view.positions(), view.valid())
        shift = shift_of(notes)
        segments.append(PackedSegment(view, seen, mask is None, shift))
        statistics.append(under(notes, "statistic.") if notes else {})
    longest, even, seen = held.keys.shape[2], False, None
    if on_host:
        longest = min(int(held.lengths.max()), longest)  # a window that ran over is reported later
        even = held.lengths.shape[0] == 1 or int(held.lengths.min()) == longest
    notes = {name: note[:, :, :longest] for name, note in held.notes.items()}
    if mask is not None:
        live = None if even else torch.arange(longest, device=mask.device) < held.lengths[:, :1, None]
        seen = gathered(mask, held.positions[:, None, :longest].long(), live)
    shift = shift_of(notes)
    keys = held.keys[:, :, :longest] if shift is None else shift.moved(held.keys[:, :, :longest])
    segments.append(FullSegment(keys, held.values[:, :, :longest], seen, mask is None, None if even else held.lengths))
    statistics.append(under(notes, "statistic.") if notes else {})
    return segments, statistics


def gathered(mask: Tensor, positions: Tensor, live: Tensor | None) -> Tensor:
    """``mask`` ``[B or 1, 1, Q, T]`` at ``positions`` ``[B, H_kv or 1, N]``: bool ``[B, H_kv or 1, Q, N]``."""
    index = positions.clamp(0, mask.shape[3] - 1)[:, :, None].expand(-1, -1, mask.shape[2], -1)
    seen = mask.expand(*positions.shape[:2], -1, -1).gather(3, index)
    return seen if live is None else seen & live[:, :, None]


# --- and as custom ops --------------------------------------------------------------------------------------------------


@torch.library.custom_op("fade::append", mutates_args=("written",))
def append(keys: Tensor, values: Tensor, written: Sequence[Tensor], read: Sequence[Tensor], step: str) -> None:
    """``take_in`` in a graph; ``written, read``: ``LayerBuffers.operands``; ``step``: ``step_name``."""
    plan, held = _step("append", step, written, read)
    take_in(plan, keys, values, held)


@torch.library.custom_op("fade::attend", mutates_args=("written",))
def attend(
    query: Tensor,
    written: Sequence[Tensor],
    read: Sequence[Tensor],
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    step: str,
    first: Tensor | None = None,
) -> Tensor:
    """``read_all`` in a graph; ``written, read``: ``LayerBuffers.operands``; ``step``: ``step_name``.

    ``first`` is the position of each row's first token, int64 ``[B]``, where the mask is taken to hide no more than what lies
    before: nobody reads it on the host, but a mask that hides stored tokens is counted.
    """
    plan, held = _step("attend", step, written, read)
    if mask is not None and first is not None:
        where = torch.arange(mask.shape[3], device=mask.device)
        stored = (where >= first[:, None]) & (where < held.counters[LOGICAL])
        held.counters[ODD_MASK] += (stored & ~mask[:, 0, 0]).any()
        mask = None
    if mask is not None and query.device.type == "cpu":
        hidden, _ = segments_of(plan, held, ~mask, True, [None] * (len(held.tiers) + 1))
        if not any(bool(segment.mask.any()) for segment in hidden if segment.mask is not None):
            mask = None  # every stored token is seen
    return read_all(plan, query, held, mask, sinks, scaling, softcap).contiguous()


append.register_fake(lambda *_: None)
attend.register_fake(lambda query, _, read, *__, **___: query.new_empty((*query.shape[:3], read[1].shape[3])))  # values


def _step(op: str, name: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[StepPlan, LayerBuffers]:
    """What ``step_name`` called so: its plan, and its buffers made again from what ``op`` is given."""
    plan_name, _, layout_name = name.partition("/")
    plan = _plans.get(plan_name)
    if plan is None or layout_name not in plan.layouts:
        raise InputError("a compiled step was run for a cache that is gone; run it with the cache it is meant for")
    names, flags = plan.layouts[layout_name]
    writes, reads = operands(op, names)
    tensors = dict(zip((*writes, *reads), (*written, *read), strict=True))
    return plan, LayerBuffers(tensors, plan.tiers, flags)
