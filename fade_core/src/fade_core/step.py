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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.fixedstore import TileView
from fade_core.interfaces import Kernel
from fade_core.kernels.append import AppendRule, FixedBuffers, TorchAppend
from fade_core.kernels.attention import FullSegment, PackedSegment, Segment, TorchDecodeAttention

_ORACLES: dict[str, Kernel] = {"append": TorchAppend(), "decode_attention": TorchDecodeAttention()}
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
        refused: op, implementation and reason of calls that the oracle computed instead.
    """

    name: str
    rule: AppendRule
    append: Kernel
    attention: Kernel
    refused: set[tuple[str, str, str]] = field(default_factory=set)

    def choose(self, kernel: Kernel, *args: object) -> Kernel:
        """``kernel`` if it accepts this very call, else the oracle."""
        support = kernel.accepts(*args)
        if support:
            return kernel
        self.refused.add((kernel.op, kernel.name, support.reason))
        return _ORACLES[kernel.op]


def plan_step(rule: AppendRule, append: Kernel, attention: Kernel, meaning: str) -> StepPlan:
    """The plan of a layer, shared with every layer of the same ``meaning`` whose quantizers hold the same tensors.

    To be asked again when those tensors were replaced (codebooks, a loaded state).

    Args:
        rule: sinks, window, quantizers.
        append: implementation of ``append``.
        attention: implementation of ``decode_attention``.
        meaning: what the quantizers were made from, written out: their configuration and the model's layers and heads.
    """
    facts = (rule.layer, rule.n_sink, rule.threshold, rule.on_nonfinite, append.name, attention.name, meaning)
    name = hashlib.sha256(repr((*facts, _contents(rule))).encode()).hexdigest()[:16]
    found = _plans.get(name)
    if found is not None and _contents(found.rule) != _contents(rule):  # its own were replaced after it was named
        name, found = f"{name}:{next(_numbers)}", None
    if found is None:
        _plans[name] = found = StepPlan(name, rule, append, attention)
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
    mutates_args=("window_keys", "window_values", "key_fields", "value_fields", "lengths", "used", "counters"),
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
    plan: str,
) -> None:
    """Take one token a row in (``fade_core.kernels.append.append``).

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
    ours.choose(ours.append, keys, values, held, ours.rule)(keys, values, held, ours.rule)


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
    tier = ours.rule.tier
    keys = dict(zip(tier.keys.field_shapes(), key_fields, strict=True))
    values = dict(zip(tier.values.field_shapes(), value_fields, strict=True))
    view = TileView(tier, keys, values, used, window_keys.dtype)
    host = query.device.type == "cpu"
    if host and mask is not None and _hides_padding_alone(mask, padding, used[:, :1] * view.tile + lengths[:, :1]):
        mask = None
    look = host and isinstance(ours.attention, TorchDecodeAttention)  # kernels take the buffers whole
    segments = step_segments(view, window_keys, window_values, lengths, padding, mask, ours.rule.n_sink, look)
    kernel = ours.choose(ours.attention, query, segments, scaling, softcap, sinks)
    output: Tensor = kernel(query, segments, scaling, softcap, sinks).output
    return output.contiguous()


@decode_attention.register_fake
def _decode_attention_fake(query: Tensor, window_keys: Tensor, window_values: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], window_values.shape[3]))


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
    tile, held, tiles, longest = view.tile, view.used[:, :1], view.tiles, keys.shape[2]
    if look:
        tiles, longest = int(held.max()), int(lengths.max())
        view = view.first(tiles)
    slots = torch.arange(tiles * tile, device=keys.device)
    packed = slots < held * tile  # [B, T]
    recent = torch.arange(longest, device=keys.device)
    live = recent < lengths[:, :1]
    plain = mask is None
    masks: list[Tensor | None] = [packed[:, None, None], live[:, None, None]]
    if mask is not None:
        behind = torch.where(recent < n_sink, 0, held * tile)
        masks[0] = packed[:, None, None] & _at(mask, padding[:, None] + n_sink + slots)
        masks[1] = live[:, None, None] & _at(mask, padding[:, None] + behind + recent)
    elif look:  # a mask that hides nothing costs time and says nothing
        masks = [None if bool(there.all()) else m for there, m in zip((packed, live), masks, strict=True)]
    found: list[Segment] = [PackedSegment(view, masks[0], plain)] if tiles else []
    found.append(FullSegment(keys[:, :, :longest], values[:, :, :longest], masks[1], plain, lengths))
    return found


def _at(mask: Tensor, positions: Tensor) -> Tensor:
    """``mask`` ``[B or 1, 1, 1, T]`` at ``positions`` ``[B, N]``, as bool ``[B, 1, 1, N]``."""
    rows = mask.expand(len(positions), -1, -1, -1)[:, 0, 0]
    return rows.gather(1, positions.clamp(0, rows.shape[1] - 1))[:, None, None]


def _hides_padding_alone(mask: Tensor, padding: Tensor, stored: Tensor) -> bool:
    """Whether every stored token is seen. Reads the mask: for a CPU."""
    where = torch.arange(mask.shape[3], device=mask.device)
    ours = (where >= padding[:, None]) & (where < padding[:, None] + stored)
    return bool((mask[:, 0, 0] | ~ours).all())
