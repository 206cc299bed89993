"""A decode step over buffers of fixed size, as two custom ops that a compiled graph holds: take a token in, attend.

Custom ops take tensors and plain values. What else a step needs (quantizers, kernels, sinks and window) is a ``StepPlan``
known by a name, and the name goes into the graph. Layers of the same meaning share a plan, so that a graph compiled for one
cache serves the next.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.attention_tracker import AttentionTracker
from fade_core.interfaces import Kernel
from fade_core.ops.append import LOGICAL, AppendRule, FixedBuffers, TorchAppend, carry
from fade_core.ops.attention import (
    AttentionOutput,
    FullSegment,
    PackedSegment,
    Segment,
    TorchAttentionMass,
    TorchDecodeAttention,
)
from fade_core.storage.fixedstore import TileView

_ORACLES: dict[str, Kernel] = {
    "append": TorchAppend(),
    "decode_attention": TorchDecodeAttention(),
    "attention_mass": TorchAttentionMass(),
}
_plans: weakref.WeakValueDictionary[str, StepPlan] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclass(eq=False)
class StepPlan:
    """What the steps of one layer have in common.

    Attributes:
        name: what graphs call it.
        rule: sinks, window, quantizers.
        append: implementation of ``append``.
        attention: implementation of ``decode_attention``.
        mass: implementation of ``attention_mass``.
        tracker: what steps note of attention.
        refused: op, implementation and reason of calls that the oracle computed instead.
    """

    name: str
    rule: AppendRule
    append: Kernel
    attention: Kernel
    mass: Kernel
    tracker: AttentionTracker
    refused: set[tuple[str, str, str]] = field(default_factory=set)

    def choose(self, kernel: Kernel, *args: object, **options: object) -> Kernel:
        """``kernel`` if it accepts this very call, else the oracle."""
        support = kernel.accepts(*args, **options)
        if support:
            return kernel
        self.refused.add((kernel.op, kernel.name, support.reason))
        return _ORACLES[kernel.op]


def plan_step(
    rule: AppendRule, append: Kernel, attention: Kernel, mass: Kernel, tracker: AttentionTracker, meaning: str
) -> StepPlan:
    """The plan of a layer, shared with every layer of the same ``meaning`` whose quantizers hold the same tensors.

    To be asked again when those tensors were replaced (codebooks, a loaded state).

    Args:
        rule: sinks, window, quantizers.
        append: implementation of ``append``.
        attention: implementation of ``decode_attention``.
        mass: implementation of ``attention_mass``.
        tracker: what steps note of attention.
        meaning: what the quantizers were made from, written out: their configuration and the model's layers and heads.
    """
    kernels = append.name, attention.name, mass.name
    noted = tracker.statistics, tracker.decay, tracker.observation_window
    facts = (rule.layer, rule.n_sink, rule.threshold, rule.on_nonfinite, kernels, noted, meaning)
    name = hashlib.sha256(repr((*facts, _contents(rule))).encode()).hexdigest()[:16]
    found = _plans.get(name)
    if found is not None and _contents(found.rule) != _contents(rule):  # its own were replaced after it was named
        name, found = f"{name}:{next(_numbers)}", None
    if found is None:
        _plans[name] = found = StepPlan(name, rule, append, attention, mass, tracker)
    return found


def _contents(rule: AppendRule) -> list[tuple[object, ...]]:
    """What the quantizers of a rule are, and a hash of each tensor that they keep."""
    return [
        (type(q).__name__, q.head_dim, q.tile, q.field_shapes(), {n: _digest(t) for n, t in q.state_dict().items()})
        for q in (rule.tier.keys, rule.tier.values)
    ]


def _digest(tensor: Tensor) -> str:
    held = tensor.detach().cpu().contiguous()
    return hashlib.sha256(held.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16] + str(held.shape)


def _plan(name: str) -> StepPlan:
    found = _plans.get(name)
    if found is None:
        raise InputError("a compiled step was run for a cache that is gone; run it with the cache it is meant for")
    return found


@torch.library.custom_op(
    "fade::append",
    mutates_args=(
        *("window_keys", "window_values", "key_fields", "value_fields", "lengths", "used", "counters"),
        *("window_notes", "tile_notes"),
    ),
)
def append(
    keys: Tensor,
    values: Tensor,
    window_keys: Tensor,
    window_values: Tensor,
    key_fields: Sequence[Tensor],
    value_fields: Sequence[Tensor],
    lengths: Tensor,
    used: Tensor,
    counters: Tensor,
    window_notes: Sequence[Tensor],
    tile_notes: Sequence[Tensor],
    plan: str,
) -> None:
    """Take one token a row in (``fade_core.ops.append.append``), and what is noted of tokens with it (``carry``).

    Args:
        keys: ``[B, H_kv, 1, D]``.
        values: likewise.
        window_keys: ``[B, H_kv, capacity, D]``.
        window_values: likewise.
        key_fields: ``[B, H_kv, tiles, ...]``, in the order of the quantizer's ``field_shapes``.
        value_fields: likewise.
        lengths: int32 ``[B, H_kv]``.
        used: int32 ``[B, H_kv]``.
        counters: int64 ``[3]``.
        window_notes: what is noted of the window's tokens, if the layer evicts: positions, int32 ``[B, capacity]``, and
            statistics, float32 ``[B, H_kv, capacity]``.
        tile_notes: the same of packed tokens, ``[B, H_kv, tiles, tile]``.
        plan: name of the layer's ``StepPlan``.
    """
    ours = _plan(plan)
    tier = ours.rule.tier
    held = FixedBuffers(
        window_keys,
        window_values,
        dict(zip(tier.keys.field_shapes(), key_fields, strict=True)),
        dict(zip(tier.values.field_shapes(), value_fields, strict=True)),
        lengths,
        used,
        counters,
    )
    before = replace(held, lengths=lengths.clone(), used=used.clone()) if window_notes else held
    ours.choose(ours.append, keys, values, held, ours.rule)(keys, values, held, ours.rule)
    if window_notes:
        places, *statistics = window_notes
        fresh = [counters[LOGICAL] - 1, *(counters.new_zeros(()) for _ in statistics)]
        carry([places[:, None], *statistics], tile_notes, fresh, before, ours.rule)


@append.register_fake
def _append_fake(*_: object) -> None:
    return


@torch.library.custom_op("fade::decode_attention", mutates_args=())
def decode_attention(
    query: Tensor,
    window_keys: Tensor,
    window_values: Tensor,
    key_fields: Sequence[Tensor],
    value_fields: Sequence[Tensor],
    lengths: Tensor,
    used: Tensor,
    padding: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    plan: str,
) -> Tensor:
    """Attention of the newest token over all that a layer of fixed size holds.

    Args:
        query: ``[B, H_q, 1, D]``.
        window_keys: ``[B, H_kv, capacity, D]``; the query's own token is the last of each row.
        window_values: likewise.
        key_fields: ``[B, H_kv, tiles, ...]``.
        value_fields: likewise.
        lengths: int32 ``[B, H_kv]``.
        used: int32 ``[B, H_kv]``.
        padding: int64 ``[B]``: positions before the first token of each row, which are not stored.
        mask: bool ``[B or 1, 1, 1, T]`` over positions, honoured token by token; ``None`` if it hides padding alone.
        sinks: attention-sink logits ``[H_q]``.
        scaling: factor of the logits.
        softcap: soft cap of the logits.
        plan: name of the layer's ``StepPlan``.

    Returns:
        ``[B, H_q, 1, D_v]`` in the query's dtype.
    """
    ours = _plan(plan)
    view = _view(ours, key_fields, value_fields, used, window_keys.dtype)
    host = query.device.type == "cpu"
    if host and mask is not None and _hides_padding_alone(mask, padding, used[:, :1] * view.tile + lengths[:, :1]):
        mask = None
    look = host and isinstance(ours.attention, TorchDecodeAttention)  # kernels take the buffers whole
    segments = step_segments(view, window_keys, window_values, lengths, padding, mask, ours.rule.n_sink, look)
    kernel = ours.choose(ours.attention, query, segments, scaling, softcap, sinks)
    output: Tensor = kernel(query, segments, scaling, softcap, sinks).output
    return output.contiguous()


def _view(
    plan: StepPlan, keys: Sequence[Tensor], values: Sequence[Tensor], used: Tensor, dtype: torch.dtype
) -> TileView:
    tier = plan.rule.tier
    named = [dict(zip(q.field_shapes(), f, strict=True)) for q, f in ((tier.keys, keys), (tier.values, values))]
    return TileView(tier, named[0], named[1], used, dtype)


@decode_attention.register_fake
def _decode_attention_fake(query: Tensor, window_keys: Tensor, window_values: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], window_values.shape[3]))


@torch.library.custom_op("fade::decode_noting", mutates_args=("window_notes", "tile_notes"))
def decode_noting(
    query: Tensor,
    window_keys: Tensor,
    window_values: Tensor,
    key_fields: Sequence[Tensor],
    value_fields: Sequence[Tensor],
    lengths: Tensor,
    used: Tensor,
    window_notes: Sequence[Tensor],
    tile_notes: Sequence[Tensor],
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    plan: str,
) -> Tensor:
    """``decode_attention`` over a layer that evicts; what each token is given goes into its statistics.

    Arguments are those of ``decode_attention`` and, in place of ``padding``, the notes of ``append``. Heads may have tiles
    of their own.
    """
    ours = _plan(plan)
    view = _view(ours, key_fields, value_fields, used, window_keys.dtype)
    look = query.device.type == "cpu" and isinstance(ours.attention, TorchDecodeAttention)
    places = (window_notes[0], tile_notes[0])
    segments = noted_segments(view, window_keys, window_values, lengths, places, mask, look)
    names = ours.tracker.statistics if len(window_notes) > 1 else ()
    tracked = ours.tracker.active and bool(names)
    call = query, segments, scaling, softcap, sinks
    kernel = ours.choose(ours.attention, *call, probabilities=tracked)
    result: AttentionOutput = kernel(*call, probabilities=tracked)
    if tracked:
        for number, segment in enumerate(segments):
            if isinstance(segment, PackedSegment):
                notes, ends = tile_notes, segment.store.tiles
            else:
                notes, ends = window_notes, segment.keys.shape[2]
            held = {name: note[:, :, :ends].flatten(2) for name, note in zip(names, notes[1:], strict=True)}
            given = query, segment, result.lse, scaling, softcap
            found = result.probabilities[number] if result.probabilities else ours.choose(ours.mass, *given)(*given)
            ours.tracker.age(held, 1)
            ours.tracker.observe(held, found, segment.mask)
    return result.output.contiguous()


@decode_noting.register_fake
def _decode_noting_fake(query: Tensor, window_keys: Tensor, window_values: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], window_values.shape[3]))


def noted_segments(
    view: TileView,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    places: tuple[Tensor, Tensor],
    mask: Tensor | None,
    look: bool,
) -> list[Segment]:
    """``step_segments`` of a layer that evicts: heads have tiles of their own, and tokens tell their positions.

    Args:
        view: packed tiles.
        keys: window ``[B, H_kv, capacity, D]``.
        values: likewise.
        lengths: tokens of it, int32 ``[B, H_kv]``.
        places: positions of the window, int32 ``[B, capacity]``, and of packed tokens, ``[B, H_kv, tiles, tile]``.
        mask: bool ``[B or 1, 1, 1, T]`` over positions, or ``None`` if it hides padding alone.
        look: whether lengths may be read on the host.
    """
    view, longest, packed, live = _in_use(view, view.used, keys, lengths, look)
    seen: list[Tensor] = []
    if mask is not None:
        where = places[1][:, :, : view.tiles].flatten(2), places[0][:, None, :longest]
        seen = [_at(mask, at.long()) for at in where]
        if keys.device.type == "cpu" and all(bool((s | ~m).all()) for s, m in zip(seen, (packed, live), strict=True)):
            seen = []
    return _segments(view, keys[:, :, :longest], values[:, :, :longest], lengths, (packed, live), seen, look)


def step_segments(
    view: TileView,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    padding: Tensor,
    mask: Tensor | None,
    n_sink: int,
    look: bool,
) -> list[Segment]:
    """Packed tiles and window with masks of what is there; where the host may ``look``, no more of them than is in use.

    Args:
        view: packed tiles.
        keys: window ``[B, H_kv, capacity, D]``.
        values: likewise.
        lengths: tokens of it, int32 ``[B, H_kv]``.
        padding: positions before each row's first token, int64 ``[B]``.
        mask: bool ``[B or 1, 1, 1, T]`` over positions, or ``None`` if it hides padding alone.
        n_sink: tokens of the window that come before the packed ones.
        look: whether lengths may be read on the host.
    """
    held = view.used[:, :1]
    view, longest, packed, live = _in_use(view, held, keys, lengths, look)
    seen: list[Tensor] = []
    if mask is not None:
        slots, recent = (torch.arange(m.shape[2], device=keys.device) for m in (packed, live))
        behind = torch.where(recent < n_sink, 0, held * view.tile)
        where = padding[:, None] + n_sink + slots, padding[:, None] + behind + recent
        seen = [_at(mask, at[:, None]) for at in where]
    return _segments(view, keys[:, :, :longest], values[:, :, :longest], lengths, (packed, live), seen, look)


def _in_use(
    view: TileView, used: Tensor, keys: Tensor, lengths: Tensor, look: bool
) -> tuple[TileView, int, Tensor, Tensor]:
    """Tiles and tokens of the window to read, and which of them are there: bool ``[B, H_kv or 1, T]`` each.

    Args:
        view: packed tiles.
        used: tiles in use, int32 ``[B, H_kv or 1]``.
        keys: window ``[B, H_kv, capacity, D]``.
        lengths: tokens of it, int32 ``[B, H_kv]``.
        look: whether lengths may be read on the host, so that no more than is in use is read.
    """
    longest = keys.shape[2]
    if look:
        view, longest = view.first(int(used.max())), int(lengths.max())
    packed = torch.arange(view.tiles * view.tile, device=keys.device) < used[..., None] * view.tile
    return view, longest, packed, torch.arange(longest, device=keys.device) < lengths[:, :1, None]


def _segments(
    view: TileView,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    there: tuple[Tensor, Tensor],
    seen: Sequence[Tensor],
    look: bool,
) -> list[Segment]:
    """Segments of what is ``there``, as far as it is ``seen``; nothing ``seen`` if all of it is."""
    plain = not seen
    masks: list[Tensor | None] = [m[:, :, None] for m in there]
    if not plain:
        masks = [(m & s)[:, :, None] for m, s in zip(there, seen, strict=True)]
    elif look:  # a mask that hides nothing costs time and says nothing
        masks = [None if bool(m.all()) else m[:, :, None] for m in there]
    found: list[Segment] = [PackedSegment(view, masks[0], plain)] if view.tiles else []
    found.append(FullSegment(keys, values, masks[1], plain, lengths))
    return found


def _at(mask: Tensor, positions: Tensor) -> Tensor:
    """``mask`` ``[B or 1, 1, 1, T]`` at ``positions`` ``[B, H_kv or 1, N]``, as bool of their shape."""
    rows = mask[:, 0].expand(len(positions), positions.shape[1], -1)
    return rows.gather(2, positions.clamp(0, rows.shape[2] - 1))


def _hides_padding_alone(mask: Tensor, padding: Tensor, stored: Tensor) -> bool:
    """Whether every stored token is seen. Reads the mask: for a CPU."""
    where = torch.arange(mask.shape[3], device=mask.device)
    ours = (where >= padding[:, None]) & (where < padding[:, None] + stored)
    return bool((mask[:, 0, 0] | ~ours).all())
