"""FADE's ``append`` op, run by a Triton kernel: one launch a layer and step, no length read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fade_core import MOST_TOKENS, AppendRule, StepBuffers
from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import PackedFormat
from fade_kernels_triton.device import interpreted, unusable
from fade_kernels_triton.encode import unplain
from fade_kernels_triton.operands import HEAD_DIMS, TOKEN_DTYPES, planes, unsupported_format, unsupported_pair
from fade_kernels_triton.planes import encoding_of, encoding_warps, gains_of, padded_kept, unencodable

BLOCK = 16
"""Window tokens that move together; at most a tile."""


class TritonAppend(Kernel):
    """``append`` for what the Triton decode kernel reads: uniform codes of 2, 3 and 4 bits, and planes of 2 bits.

    Uniform codes and their metadata are those of the torch quantizer, bit by bit. Behind a rotation or a calibrated
    transform, whose products are summed in another order, they may be one step apart where a number lies on an edge.
    """

    name: ClassVar[str] = "triton"
    op: ClassVar[Op] = "append"
    priority: ClassVar[int] = -10 if interpreted() else 10

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        reason = unusable(device) or _unsupported(head_dim, dtype)
        if format is not None:  # without one there may be planes: `accepts` will see
            reason = reason or unsupported_format(format, "key")
        return Support(not reason, reason)

    def accepts(self, keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule) -> Support:
        reason = _refusal(keys, values, buffers, rule)
        return Support(not reason, reason)

    def __call__(self, keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule) -> None:
        """As the oracle, ``fade_core.append``; NaN and infinity are counted, never raised.

        Raises:
            InputError: for what ``accepts`` refuses.
        """
        if refused := _refusal(keys, values, buffers, rule):
            raise InputError(f"the Triton append kernel does not take this call: {refused}")
        keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (keys, values))
        fmt, value_fmt = rule.packed.keys.format, rule.packed.values.format
        if fmt is None or value_fmt is None:
            _append_planes(keys, values, buffers, rule)
            return
        key_plain, value_plain = (q.plain_encoding(keys.device) for q in (rule.packed.keys, rule.packed.values))
        if key_plain is None or value_plain is None:  # `accepts` refuses it
            raise InputError(f"the quantizers of tier {rule.packed.name!r} have ways of their own to encode")
        from fade_kernels_triton.jit.append import append_kernel

        launch = _launch(keys, values, buffers, rule)
        append_kernel[launch.grid](
            *launch.tensors,
            key_plain.rotation,
            value_plain.rotation,
            *launch.sizes,
            *launch.strides,
            KEY_BITS=fmt.bits,
            VALUE_BITS=value_fmt.bits,
            KEY_CHANNEL=fmt.axis == "channel",
            VALUE_GROUPS=value_fmt.groups,
            KEY_OUTWARD=key_plain.outward,
            VALUE_OUTWARD=value_plain.outward,
            **launch.constants,
        )


def _append_planes(keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule) -> None:
    """The launch for tiers of planes."""
    from fade_kernels_triton.jit.appendplanes import append_planes_kernel

    key_layout, value_layout = rule.packed.keys.planes(), rule.packed.values.planes()
    if key_layout is None or value_layout is None:
        raise InputError(f"tier {rule.packed.name!r} has no planes")
    launch = _launch(keys, values, buffers, rule)
    kept = padded_kept(key_layout), padded_kept(value_layout)
    append_planes_kernel[launch.grid](
        *launch.tensors,
        *encoding_of(key_layout),
        *encoding_of(value_layout),
        *launch.sizes,
        key_layout.worth.shape[1],
        value_layout.worth.shape[1],
        key_layout.row,
        value_layout.row,
        *launch.strides,
        KEY_PLANES=key_layout.planes.shape[1],
        VALUE_PLANES=value_layout.planes.shape[1],
        KEY_GAINS=gains_of(key_layout),
        VALUE_GAINS=gains_of(value_layout),
        KEY_KEPT=kept[0],
        VALUE_KEPT=kept[1],
        **launch.constants | {"num_warps": encoding_warps(rule.tile, max(kept))},
    )


class _Launch(NamedTuple):
    """What both kernels take, in their order; each has arguments of its own after ``tensors`` and around ``strides``."""

    grid: tuple[int]
    tensors: tuple[object, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    constants: dict[str, int | bool]


def _launch(keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule) -> _Launch:
    rows, heads, capacity, dim = buffers.keys.shape
    tensors = (
        keys,
        values,
        buffers.keys,
        buffers.values,
        *_fields(rule.packed.keys, buffers.key_fields, keys),
        *_fields(rule.packed.values, buffers.value_fields, keys),
        buffers.lengths,
        buffers.counters,
        buffers.ids,
        buffers.used,
        buffers.reserved,
        buffers.positions,
        buffers.starts,
        buffers.tile_positions,
        *(tuple(n.view(torch.int32) for n in notes) for notes in (buffers.window_notes, buffers.tile_notes)),  # words
    )
    constants = {
        "RUNS": buffers.runs,
        "TILE": rule.tile,
        "BLOCK": BLOCK,
        "MOST": MOST_TOKENS,
        "ZERO": rule.on_nonfinite == "zero",
        "D": dim,
        "DP": max(16, 1 << (dim - 1).bit_length()),
        "num_warps": 4,
    }
    sizes = heads, keys.shape[2], capacity, buffers.ids.shape[2], rule.threshold, rule.n_sink
    return _Launch((rows * heads,), tensors, sizes, (*keys.stride()[:3], *values.stride()[:3]), constants)


def _fields(quantizer: Quantizer, fields: Mapping[str, Tensor], like: Tensor) -> list[Tensor | None]:
    """Codes and gains, or codes, those of a second plane, if any, and metadata; empty ones for a layer that has no tiles."""
    fields = fields or {name: like.new_empty(0, dtype=dtype) for name, (_, dtype) in quantizer.field_shapes().items()}
    fmt = quantizer.format
    return list(fields.values()) if fmt is None else [*planes(fields, fmt), fields["meta"]]


def _unsupported(head_dim: int, dtype: torch.dtype) -> str:
    if dtype not in TOKEN_DTYPES:
        return f"{dtype} (it takes {', '.join(map(str, TOKEN_DTYPES))})"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} (it takes {', '.join(map(str, HEAD_DIMS))})"
    return ""


def _unwritable(buffers: StepBuffers, rule: AppendRule) -> str:
    """Why the kernel cannot encode what this tier holds; empty if it can."""
    sides = (("key", rule.packed.keys, buffers.keys), ("value", rule.packed.values, buffers.values))
    if all(quantizer.format is None for _, quantizer, _ in sides):
        return next(filter(None, (unencodable(quantizer, side, window) for side, quantizer, window in sides)), "")
    if reason := unsupported_pair(rule.packed.keys.format, rule.packed.values.format, buffers.keys.shape[3]):
        return reason
    return next(filter(None, (unplain(quantizer, window.device) for _, quantizer, window in sides)), "")


def _refusal(keys: Tensor, values: Tensor, buffers: StepBuffers, rule: AppendRule) -> str:
    """Why the kernel cannot take this call; empty if it can."""
    if rule.tier is None:
        return "a ladder without tiers"
    dim = buffers.keys.shape[3]
    if reason := _unsupported(dim, buffers.keys.dtype) or _unwritable(buffers, rule):
        return reason
    alike = keys.dtype == buffers.keys.dtype and values.dtype == buffers.values.dtype
    if not 1 <= keys.shape[2] <= MOST_TOKENS or not alike:
        return (
            f"{keys.shape[2]} tokens of {keys.dtype} for a window of {buffers.keys.dtype} "
            f"(it takes 1 to {MOST_TOKENS} of the same)"
        )
    if buffers.values.shape != buffers.keys.shape:
        return f"keys and values of {dim} and {buffers.values.shape[3]} channels"
    notes = (*buffers.window_notes, *buffers.tile_notes)
    if odd := [note.dtype for note in notes if note.element_size() != 4]:
        return f"notes of {odd[0]} (it takes numbers of 4 bytes)"
    tensors = (
        *(*buffers.key_fields.values(), *buffers.value_fields.values(), buffers.keys, buffers.values, *notes),
        *(t for t in vars(buffers).values() if isinstance(t, Tensor)),
    )
    if not all(t.is_contiguous() for t in tensors):
        return "buffers that are not contiguous"
    return ""
